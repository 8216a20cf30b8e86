"""Notes the W3C trace context of every HTTP request, for whoever traces what is done for it."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from spotjax.telemetry.trace_context import HEADER, set_traceparent


class Traced:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request; a header that is there twice counts as none."""
        if scope["type"] == "http" and len(values := Headers(scope=scope).getlist(HEADER)) == 1:
            set_traceparent(values[0])
        await self._app(scope, receive, send)
