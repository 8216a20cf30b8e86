"""Everything that HTTP serves, put together. What a group of routes answers is in a module of its own."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection

from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from spotjax.api.access.gate import OpenGate
from spotjax.api.backend import Backend
from spotjax.api.http import fleet, health, metrics, openai, ui
from spotjax.api.http.access import AccessMiddleware
from spotjax.api.http.errors import on_bug, on_error, on_refusal
from spotjax.api.http.event_stream import ClientGone, on_client_gone
from spotjax.api.http.origin import OwnPagesOnly
from spotjax.api.http.traced import Traced
from spotjax.errors import SpotjaxError

log = logging.getLogger(__name__)


def application(
    backend: Backend, names: Collection[str] | None = (), registry: CollectorRegistry | None = None
) -> ASGIApp:
    """The application of a server.

    Args:
      backend: what it serves, which may come later.
      names: under which the server is reached; see ``OwnPagesOnly``.
      registry: what ``/metrics`` shows; by default nothing.
    """
    app = Starlette(
        routes=[
            *health.routes(backend),
            *fleet.routes(backend),
            *openai.routes(backend),
            *ui.routes(),
            *metrics.routes(registry or CollectorRegistry()),
        ],
        exception_handlers={
            SpotjaxError: on_error,
            HTTPException: on_refusal,
            ClientGone: on_client_gone,
            Exception: on_bug,
        },
    )
    app.router.redirect_slashes = False
    without_keys = isinstance(backend.gate, OpenGate)
    return Guarded(OwnPagesOnly(AccessMiddleware(Traced(app), backend.gate), names if without_keys else None))


class Guarded:
    """Around everything: an error that is not ours is a bug, and is logged; what clients learn is sent already."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        try:
            await self._app(scope, receive, send)
        except asyncio.CancelledError:
            return  # the server stops: uvicorn closes the connection, with its answer incomplete
        except Exception:
            log.exception("%s %s failed", scope["method"], scope["path"])
