"""A reader that stops reading holds no memory but its connection's window, is given up, and delays nobody."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import pytest
from scripted_server import Running, until

from spotjax.api import generation
from spotjax.api.proto.spotjax.v1 import generation_pb2 as pb
from spotjax.api.proto.spotjax.v1 import generation_pb2_grpc
from spotjax.api.validation import MAX_MESSAGE_BYTES, ServedModel
from spotjax.engine.generation import Delta
from spotjax.testing.scripted_service import ByteTokenizer

TOKENS = 6000
WINDOW = 64 << 10
OPTIONS = (("grpc.http2.lookahead_bytes", WINDOW), ("grpc.http2.bdp_probe", 0))
"""Of a channel whose flow-control window stays as it is; gRPC's own grows with what the connection has carried."""
BUFFERED = 6 * WINDOW
"""More than what the window, and both sides' buffers, take of a stream that nobody reads."""


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """Bytes of messages that were made, by request."""
    sizes: dict[str, int] = {}

    def counted(delta: Delta) -> pb.GenerateResponse:
        message = made(delta)
        sizes[delta.request_id] = sizes.get(delta.request_id, 0) + message.ByteSize()
        return message

    made = generation.delta_to
    monkeypatch.setattr(generation, "delta_to", counted)
    yield sizes


@pytest.fixture
async def small_window(running: Running) -> AsyncIterator[Any]:
    """A stub whose streams are not read ahead of whom they are for."""
    async with grpc.aio.insecure_channel(running.address, options=OPTIONS) as channel:
        yield generation_pb2_grpc.GenerationStub(channel)


def asked(request_id: str, tokens: int) -> pb.GenerateRequest:
    sampling = pb.Sampling(max_tokens=tokens, logprobs=20, seed=1)
    return pb.GenerateRequest(text="x", request_id=request_id, resumable=True, sampling=sampling)


async def test_who_stops_reading_is_written_no_more_while_others_go_on_and_misses_nothing(
    running: Running, small_window: Any, written: dict[str, int]
) -> None:
    await running.server.attach(running.service, ServedModel("scripted", ByteTokenizer(), 100_000))
    running.steps.let_all()
    stopped = small_window.Generate(asked("stopped", TOKENS))
    await stopped.initial_metadata()
    seen = len((await stopped.read()).token_ids)
    others = [running.generation.Generate(asked(f"other-{n}", 50)) for n in range(3)]
    for other in others:
        assert sum([len(response.token_ids) async for response in other]) == 50
    await until(lambda: running.service.requests["stopped"].finished)
    assert 0 < written["stopped"] < BUFFERED < 200 * TOKENS  # a token has more bytes, with its 20 log-probabilities
    offset = seen
    while (response := await stopped.read()) is not grpc.aio.EOF:
        assert response.offset == offset and response.ByteSize() < MAX_MESSAGE_BYTES
        offset += len(response.token_ids)
    assert offset == TOKENS


async def test_who_takes_nothing_for_long_is_given_up_and_can_resume(
    running: Running, small_window: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "SLOW_READER_SECONDS", 0.3)
    await running.server.attach(running.service, ServedModel("scripted", ByteTokenizer(), 100_000))
    running.steps.let_all()
    stopped = small_window.Generate(asked("stopped", TOKENS))
    await stopped.initial_metadata()
    await until(lambda: running.service.requests["stopped"].finished)
    await asyncio.sleep(0.6)
    seen = 0
    with pytest.raises(grpc.aio.AioRpcError) as error:
        async for response in stopped:
            seen = response.offset + len(response.token_ids)
    assert error.value.code() is grpc.StatusCode.UNAVAILABLE and 0 < seen < TOKENS
    monkeypatch.setattr(generation, "SLOW_READER_SECONDS", 60)
    rest = running.generation.Resume(pb.ResumeRequest(request_id="stopped", offsets=[seen]))
    assert sum([len(response.token_ids) async for response in rest]) == TOKENS - seen
