"""Refuses what pages of other sites make a browser send.

A server without API keys trusts whoever can reach it, and a browser on the same machine or network can: so any site
that an operator visits could try. Two ways are closed here.

Cross-site requests: those that change something must come from a page of this server, or from no page at all; after
``CrossOriginProtection`` of Go's net/http.

DNS rebinding: a site lets its own name point here, and then is this server's page in the browser's eyes. So without
keys the name that a request came to must be one that no stranger can have: an address, ``localhost``, a name without
dots or of a private domain, or one that the setting ``http_names`` gives; after Ollama's allowed hosts. A key that a
page does not know makes that needless.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from spotjax.api.http.errors import refusal

HOST = re.compile(r"(?:\[([0-9a-f:.]+(?:%[\w.-]+)?)\]|([^:\[\]\s]+))(?::\d+)?")
SAFE = ("GET", "HEAD", "OPTIONS")
PRIVATE = ("localhost", "local", "internal", "lan", "svc", "home.arpa")
"""Domains that nobody can register a name in."""


class OwnPagesOnly:
    """ASGI middleware.

    Args:
      app: what is behind it.
      names: under which this server is reached, besides those that are private anyway; None where keys are asked for,
        so that any name will do.
    """

    def __init__(self, app: ASGIApp, names: Collection[str] | None) -> None:
        self._app = app
        self._names = None if names is None else {name.lower().rstrip(".") for name in names}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers what is foreign, passes on the rest."""
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            problem, code = cross_site(scope["method"], headers), "cross_site"
            if problem is None and self._names is not None:
                problem, code = foreign_name(headers.get("host", ""), self._names), "foreign_name"
            if problem is not None:
                await refusal(403, problem, code=code)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def cross_site(verb: str, headers: Headers) -> str | None:
    """Why a request is another site's; None if it is not, or changes nothing."""
    if verb in SAFE:
        return None
    if (site := headers.get("sec-fetch-site")) is not None:
        if site in ("same-origin", "none"):
            return None
        return f"the request comes from a page of another site (sec-fetch-site: {site})"
    origin = headers.get("origin")
    if origin is None or address_of(origin) == headers.get("host", "").lower():
        return None
    return f"the request comes from a page of another site (origin: {origin})"


def address_of(origin: str) -> str:
    """HOST:PORT of an origin; empty for one that is none, such as ``null``."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def foreign_name(host: str, names: Collection[str]) -> str | None:
    """Why the name that a request came to is not ours; None if it is. HTTP/1.0 may give none."""
    if not host.strip():
        return None
    name = host_name(host)
    if name in names or is_private(name):
        return None
    return (
        f"this server has no API keys, and {name!r} may be anybody's name for it: use its address, or let the setting "
        "http_names give the name"
    )


def host_name(host: str) -> str:
    """The name in a ``Host`` header, without port, brackets and case; all of it if it is malformed."""
    matched = HOST.fullmatch(host.strip().lower())
    return (matched[1] or matched[2].rstrip(".")) if matched else host


def is_private(name: str) -> bool:
    """Whether no stranger can have the name."""
    if re.fullmatch(r"[\w-]+", name):
        return True
    if any(name.endswith(f".{domain}") for domain in PRIVATE):
        return True
    try:
        ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return False
    return True
