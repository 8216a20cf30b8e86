"""A Spotjax server over gRPC is measured as one over HTTP is: against a scripted service whose steps are known."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
from openai_server import planned

from spotjax.api.server import ApiServer
from spotjax.api.validation import ServedModel
from spotjax.async_client import AsyncSpotjaxClient
from spotjax.bench.exchange import INTERRUPTED
from spotjax.bench.goodput import Objectives
from spotjax.bench.grpc_endpoint import GrpcEndpoint
from spotjax.bench.load import apply_load
from spotjax.bench.statistics import summarise
from spotjax.errors import EndpointFailed
from spotjax.testing.scripted_service import ByteTokenizer, ScriptedService

STEP = 0.02


@contextlib.asynccontextmanager
async def served(step: float = STEP) -> AsyncIterator[tuple[ScriptedService, AsyncSpotjaxClient]]:
    """A service that commits a token of every request each ``step`` seconds, and a client of it."""
    service, server = ScriptedService(delay=lambda: asyncio.sleep(step)), ApiServer()
    port = await server.start("127.0.0.1:0")
    await server.attach(service, ServedModel("scripted", ByteTokenizer(), max_model_len=512))
    async with AsyncSpotjaxClient(f"127.0.0.1:{port}", patience=0) as client:
        yield service, client
    await service.stop()
    await server.stop()


async def test_times_tokens_and_counts_are_those_of_the_service() -> None:
    async with served() as (_, client):
        endpoint = GrpcEndpoint(client, options={"temperature": 0.0, "ignore_eos": True})
        assert await endpoint.find_model() == "scripted" and await endpoint.vocabulary() == ByteTokenizer.vocab_size
        run = await apply_load(endpoint, [planned(output=10), planned(output=10, prompt=(5, 6, 7))], timeout=20)
    text, ids = run.exchanges
    assert text.failure is None and ids.failure is None and text.finish == "length"
    assert (text.prompt_tokens, ids.prompt_tokens) == (len("the way") + 1, 3)
    assert sum(text.counts) == text.output_tokens == 10 and len(text.text) == 10
    summary = summarise(run.exchanges, run.duration, Objectives())
    assert summary.e2el is not None and summary.tpot is not None and 9 * STEP < summary.e2el.least < 9 * STEP + 1
    assert summary.total_output_tokens == 20 and summary.uncounted_outputs == 0
    assert STEP * 0.8 < summary.tpot.mean < STEP + 0.1


async def test_what_the_server_refuses_is_counted_under_its_name() -> None:
    async with served() as (_, client):
        endpoint = GrpcEndpoint(client, "scripted", {"temperature": 0.0})
        run = await apply_load(endpoint, [planned(output=100_000), planned()], timeout=20)
        other = await apply_load(GrpcEndpoint(client, "another"), [planned()], timeout=20)
        with pytest.raises(EndpointFailed, match="no model"):
            await GrpcEndpoint(client, "another").vocabulary()
    assert [e.failure and e.failure.kind for e in run.exchanges] == ["InvalidRequest", None]
    assert other.exchanges[0].failure is not None and "another" in other.exchanges[0].failure.message


async def test_a_server_that_is_gone_is_not_waited_for() -> None:
    async with served() as (_, client):
        pass
    async with AsyncSpotjaxClient(client.server, patience=0) as gone:
        run = await apply_load(GrpcEndpoint(gone, "scripted"), [planned()], timeout=20)
        with pytest.raises(EndpointFailed, match="Unreachable"):
            await GrpcEndpoint(gone).find_model()
    assert run.exchanges[0].failure is not None and run.exchanges[0].failure.kind == "Unreachable"


async def test_a_request_that_takes_too_long_is_cancelled_at_the_server_and_so_is_an_interrupted_one() -> None:
    async with served(step=0.05) as (service, client):
        endpoint = GrpcEndpoint(client, "scripted")
        late = await apply_load(endpoint, [planned(output=400)], timeout=0.2)
        task = asyncio.create_task(apply_load(endpoint, [planned(output=400)]))
        while len(service.requests) < 2:
            await asyncio.sleep(0.005)
        task.cancel()
        interrupted = await task
        while not all(state.ended for state in service.requests.values()):
            await asyncio.sleep(0.005)
    assert late.exchanges[0].failure is not None and late.exchanges[0].failure.kind == "timeout"
    assert interrupted.interrupted and interrupted.exchanges[0].failure == INTERRUPTED
