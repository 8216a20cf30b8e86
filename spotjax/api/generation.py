"""The gRPC service ``spotjax.v1.Generation``: requests in, committed tokens out.

Owns when a client that goes away ends its request. Checking requests is ``validation.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator

from spotjax.api.access.current import current_caller
from spotjax.api.backend import Backend
from spotjax.api.errors import Context, Unavailable, rpc
from spotjax.api.generation_messages import delta_to
from spotjax.api.proto.spotjax.v1 import generation_pb2 as pb
from spotjax.api.proto.spotjax.v1 import generation_pb2_grpc as pb_grpc
from spotjax.api.validation import accepted_request, checked_request_id
from spotjax.engine.generation import Delta
from spotjax.errors import UnknownRequest
from spotjax.fleet.service import GenerationService
from spotjax.telemetry.trace_context import HEADER, set_traceparent

log = logging.getLogger(__name__)

REQUEST_ID_KEY = "spotjax-request-id"

SLOW_READER_SECONDS = 60.0
"""For a client to take what was written to it. Until then what it has not read waits with the request, which it keeps
from being forgotten; nothing is buffered for it beyond the window of its connection."""

CLOCK_SLACK = 0.25
"""A disconnect so many seconds before the deadline is the deadline: the client's own timer runs ahead of ours."""


class GenerationServicer(pb_grpc.GenerationServicer):
    """Serves the backend's generation half."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    @rpc
    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:
        """Takes a request and streams its output."""
        service, model = self._backend.for_caller()
        set_traceparent(traceparent_of(context))
        accepted = await accepted_request(request, model)
        recorded = asyncio.ensure_future(service.submit(accepted))
        try:
            await asyncio.shield(recorded)  # a client that leaves does not undo what others may take up
            log.info("accepted", extra={"request": accepted.request_id, "prompt_tokens": len(accepted.prompt)})
            await context.send_initial_metadata(((REQUEST_ID_KEY, accepted.request_id),))
            await forward(service.stream(accepted.request_id), context, set(range(accepted.n)))
            log.info("finished", extra={"request": accepted.request_id})
        except BaseException as error:
            log.info("stream broke", extra={"request": accepted.request_id, "reason": type(error).__name__})
            if not accepted.resumable:
                reason = reason_to_leave(context)
                recorded.add_done_callback(lambda _: abandon(service, accepted.request_id, reason))
            raise

    @rpc
    async def Resume(self, request: pb.ResumeRequest, context: Context) -> None:
        """Streams the output of an accepted request from where the client says."""
        service, _ = self._backend.for_caller()
        request_id = checked_request_id(request.request_id)
        stream = service.stream(request_id, tuple(request.offsets))
        await context.send_initial_metadata(((REQUEST_ID_KEY, request_id),))
        await forward(stream, context, set(range(len(request.offsets))))

    @rpc
    async def Cancel(self, request: pb.CancelRequest, context: Context) -> pb.CancelResponse:
        """Ends a request."""
        service, _ = self._backend.for_caller()
        return pb.CancelResponse(cancelled=service.cancel(checked_request_id(request.request_id)))

    @rpc
    async def Models(self, request: pb.ModelsRequest, context: Context) -> pb.ModelsResponse:
        """Lists the one model, if the caller may use it."""
        _, model = self._backend.for_caller()
        if not current_caller().may_use(model.name):
            return pb.ModelsResponse()
        vocab_size = model.tokenizer.vocab_size
        served = pb.Model(name=model.name, max_model_len=model.max_model_len, vocab_size=vocab_size)
        return pb.ModelsResponse(models=[served])


async def forward(stream: AsyncIterator[Delta], context: Context, unfinished: set[int]) -> None:
    """Writes a stream to the client.

    Args:
      unfinished: choices that the client waits for; those that turn up in the stream are added.

    Raises:
      Unavailable: the stream ended before each choice had a finish reason, because the service stopped; or the client
        takes nothing of what is written.
    """
    try:
        async for delta in stream:
            async with asyncio.timeout(SLOW_READER_SECONDS):
                await context.write(delta_to(delta))
            if delta.finish is None:
                unfinished.add(delta.choice)
            else:
                unfinished.discard(delta.choice)
    except TimeoutError as error:
        raise Unavailable(
            f"the client took nothing for {SLOW_READER_SECONDS:g} s; take the request up again with Resume"
        ) from error
    finally:
        if isinstance(stream, AsyncGenerator):
            await stream.aclose()
    if unfinished:
        raise Unavailable("the server stopped before the request finished; take it up again with Resume")


def traceparent_of(context: Context) -> str:
    """What the call's metadata has under that key; empty if it has nothing, or not one value."""
    values = [value for key, value in context.invocation_metadata() or () if key == HEADER]
    return values[0] if len(values) == 1 and isinstance(values[0], str) else ""


def reason_to_leave(context: Context) -> str:
    """Why a client went away: ``deadline`` or ``cancelled``."""
    remaining = context.time_remaining()
    return "deadline" if remaining is not None and remaining <= CLOCK_SLACK else "cancelled"


def abandon(service: GenerationService, request_id: str, reason: str) -> None:
    """Ends a request that its client does not wait for any more."""
    with contextlib.suppress(UnknownRequest):  # it was not accepted, or it finished and its retention is over
        service.cancel(request_id, reason)
