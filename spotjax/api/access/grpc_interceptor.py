"""Asks every gRPC call who it is from, before anything of it is read."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import grpc

from spotjax.api.access.callers import Caller
from spotjax.api.access.current import set_caller
from spotjax.api.access.gate import Gate, bearer
from spotjax.api.access.rights import open_method, right_of_method
from spotjax.api.errors import status_of, trailing_metadata
from spotjax.errors import PermissionDenied, SpotjaxError, Unauthenticated

KEY_METADATA = "authorization"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any] | None"
Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[Handler]]


class AccessInterceptor(grpc.aio.ServerInterceptor):
    """Lets calls through whose metadata ``authorization`` has the key of a caller with the right for them.

    Others get UNAUTHENTICATED or PERMISSION_DENIED.
    """

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Handler:
        """Sets the current caller, or answers the call."""
        method = str(handler_call_details.method)
        if not open_method(method):
            try:
                set_caller(self._admitted(method, handler_call_details))
            except (Unauthenticated, PermissionDenied) as refusal:
                return refusing(refusal)
        return await continuation(handler_call_details)

    def _admitted(self, method: str, details: grpc.HandlerCallDetails) -> Caller:
        values = [value for key, value in details.invocation_metadata or () if key == KEY_METADATA]
        if len(values) > 1 or any(isinstance(value, bytes) for value in values):
            raise Unauthenticated("send one authorization, as text")
        caller = self._gate.caller_of(bearer(str(values[0]) if values else None))
        if (right := right_of_method(method)) is not None:
            caller.require(right)
        return caller


def refusing(refusal: SpotjaxError) -> grpc.RpcMethodHandler[Any, Any]:
    """Answers any method with an error. A handler of streams, because such a one reads nothing of what was sent."""

    async def refuse(requests: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        await context.abort(status_of(refusal), str(refusal), trailing_metadata(refusal))

    return grpc.stream_stream_rpc_method_handler(refuse)
