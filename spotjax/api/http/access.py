"""Asks every HTTP request who it is from, before its body is read."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from spotjax.api.access.callers import Caller
from spotjax.api.access.current import set_caller
from spotjax.api.access.gate import Gate, bearer
from spotjax.api.access.rights import open_path, right_of_path
from spotjax.api.http.errors import error_response
from spotjax.errors import PermissionDenied, Unauthenticated


class AccessMiddleware:
    """ASGI middleware. Lets requests through whose ``Authorization: Bearer`` is the key of a caller with the right."""

    def __init__(self, app: ASGIApp, gate: Gate) -> None:
        self._app, self._gate = app, gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sets the current caller, or answers the request."""
        if scope["type"] == "http" and not open_path(scope["path"]):
            try:
                set_caller(self._admitted(scope))
            except (Unauthenticated, PermissionDenied) as refusal:
                await error_response(refusal)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _admitted(self, scope: Scope) -> Caller:
        values = Headers(scope=scope).getlist("authorization")
        if len(values) > 1:
            raise Unauthenticated("send one Authorization header")
        caller = self._gate.caller_of(bearer(values[0] if values else None))
        caller.require(right_of_path(scope["method"], scope["path"]))
        return caller
