"""Where workers knock: they are asked to come again while the controller is starting, then shown to the sessions."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from spotjax.protocol import control

Join = Callable[[Any, grpc.aio.ServicerContext[Any, Any]], Awaitable[None]]


class Door:
    """Takes the workers' calls from the first moment on.

    Attributes:
      join: takes them once it is set.
    """

    def __init__(self) -> None:
        self.join: Join | None = None

    def handler(self) -> grpc.GenericRpcHandler:
        """For the server that workers call."""
        service, _, method = control.METHOD.strip("/").partition("/")
        answer = grpc.stream_stream_rpc_method_handler(
            self._answer, request_deserializer=control.decode_from_worker, response_serializer=control.encode
        )
        return grpc.method_handlers_generic_handler(service, {method: answer})

    async def _answer(self, requests: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        if self.join is not None:
            await self.join(requests, context)
        else:
            await context.read()  # the registration: what ends a call before it has begun looks like a failure
            await context.write(control.Refused("the controller is starting", retry=True))
