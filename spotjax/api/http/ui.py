"""``/ui``: the page that shows the fleet. Its files are in ``page/``, what it asks for is in ``fleet``."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from hashlib import sha256
from importlib import resources
from typing import NamedTuple

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}
"""The page loads nothing from elsewhere, sends nothing elsewhere, and cannot be put into another page."""


class PageFile(NamedTuple):
    """A file as it is served."""

    content: bytes
    type: str
    tag: str


def routes() -> list[Route]:
    """The page at ``/ui/``, and the ways there; relative, so that a proxy may put the server below another path."""

    async def file(request: Request) -> Response:
        return answer(request, page_files()[request.url.path.rpartition("/")[2] or "index.html"])

    async def to_page(request: Request) -> Response:
        return RedirectResponse("ui/")

    return [Route("/", to_page), Route("/ui", to_page)] + [Route(f"/ui/{name}", file) for name in ("", *page_files())]


@cache
def page_files() -> Mapping[str, PageFile]:
    """All files of the page by name: nothing else can be asked for."""
    found = {}
    for entry in (resources.files("spotjax.api.http") / "page").iterdir():
        content = entry.read_bytes()
        kind = TYPES["." + entry.name.rpartition(".")[2]]
        found[entry.name] = PageFile(content, kind, f'"{sha256(content).hexdigest()[:16]}"')
    return found


def answer(request: Request, file: PageFile) -> Response:
    """The file, or that the browser has it."""
    headers = HEADERS | {"ETag": file.tag}
    if request.headers.get("if-none-match") == file.tag:
        return Response(status_code=304, headers=headers)
    return Response(file.content, headers=headers, media_type=file.type)
