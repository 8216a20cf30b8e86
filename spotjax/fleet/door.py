"""Where workers knock: they prove that they may come in; then they are shown to the sessions, or asked to come again
while the controller is starting.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from spotjax.errors import TransportError
from spotjax.protocol import control
from spotjax.transport.join_token import NONCE_BYTES, JoinToken

log = logging.getLogger(__name__)
PURPOSE = control.METHOD.encode()
PROOF_SECONDS = 10.0
"""For a worker to prove that it has the join token."""
Join = Callable[[Any, grpc.aio.ServicerContext[Any, Any]], Awaitable[None]]


class Door:
    """Takes the workers' calls from the first moment on.

    Attributes:
      join: takes them once it is set.
    """

    def __init__(self, token: JoinToken | None = None) -> None:
        """With a token, for those that have it, too."""
        self._token = token
        self.join: Join | None = None

    def handler(self) -> grpc.GenericRpcHandler:
        """For the server that workers call."""
        service, _, method = control.METHOD.strip("/").partition("/")
        answer = grpc.stream_stream_rpc_method_handler(
            self._answer, request_deserializer=control.decode_from_worker, response_serializer=control.encode
        )
        return grpc.method_handlers_generic_handler(service, {method: answer})

    async def _answer(self, requests: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        try:
            await self._require_proof(context)
        except (TransportError, TimeoutError) as problem:
            log.warning("a worker at %s is turned away: %s", context.peer(), problem or "it did not go on")
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, f"{problem}; join_token must be the controller's")
        if self.join is not None:
            await self.join(requests, context)
        else:
            await context.read()  # the registration: what ends a call before it has begun looks like a failure
            await context.write(control.Refused("the controller is starting", retry=True))

    async def _require_proof(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """Lets through those that have the token; a worker learns from the metadata whether we have it.

        Raises:
          TransportError: it has none, or another one, or one where none is wanted.
          TimeoutError: it says nothing.
        """
        metadata: Any = context.invocation_metadata()
        offered = dict(metadata or ()).get(control.NONCE_KEY)
        if self._token is None:
            await context.send_initial_metadata(())
            if offered is not None:
                raise TransportError("the worker has a join token, and this controller has none")
            return
        if not isinstance(offered, str) or len(nonce := nonce_of(offered)) != NONCE_BYTES:
            raise TransportError("the worker shows no join token")
        ours = secrets.token_bytes(NONCE_BYTES)
        proof = self._token.proof("called", PURPOSE, nonce, ours)
        await context.send_initial_metadata(((control.NONCE_KEY, ours.hex()), (control.PROOF_KEY, proof.hex())))
        async with asyncio.timeout(PROOF_SECONDS):
            message = await context.read()
        if not isinstance(message, control.Proof):
            raise TransportError("the worker proves nothing")
        self._token.require(message.proof, "caller", PURPOSE, nonce, ours)


def nonce_of(text: str) -> bytes:
    """A number in metadata; empty if it is none."""
    try:
        return bytes.fromhex(text)
    except ValueError:
        return b""
