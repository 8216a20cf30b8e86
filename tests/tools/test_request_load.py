"""Continuous load on a scripted server: it notices what is wrong, and measures what it saw."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterator

import pytest

from spotjax.api.server import ApiServer
from spotjax.api.validation import ServedModel
from spotjax.async_client import AsyncSpotjaxClient
from spotjax.engine.generation import GenerationRequest
from spotjax.errors import LogUnavailable
from spotjax.testing.scripted_service import ByteTokenizer, ScriptedService, ScriptedStructures
from spotjax.tools import load as load_module
from spotjax.tools.load import Load, Stream, answers, longest, median_gap
from spotjax.tools.request_mix import mix

REQUESTS = mix(1, 16, longest=12)
STREAMS = [Stream("a", 0.0, [1.0, 1.1, 1.2, 2.0, 2.1]), Stream("b", 0.0, [1.05, 1.5])]


@pytest.fixture
async def service() -> AsyncIterator[ScriptedService]:
    service = ScriptedService()
    yield service
    await service.stop()


@pytest.fixture
async def client(service: ScriptedService) -> AsyncIterator[AsyncSpotjaxClient]:
    server = ApiServer()
    port = await server.start("127.0.0.1:0")
    await server.attach(service, ServedModel("scripted", ByteTokenizer(), 4096, ScriptedStructures()))
    async with AsyncSpotjaxClient(f"127.0.0.1:{port}", patience=0) as client:
        yield client
    await server.stop()


async def test_requests_go_on_until_stopped_and_all_end_as_expected(client: AsyncSpotjaxClient) -> None:
    load = Load(client, REQUESTS, await answers(client, REQUESTS), clients=3, seed=0)
    assert await load.until(lambda: load.finished >= 40, 30)
    await load.stop(30)
    assert load.problems == [] and load.running == {}
    assert sum(len(stream.times) for stream in load.streams) <= load.tokens


async def test_an_output_that_differs_is_a_problem_and_ends_the_load(client: AsyncSpotjaxClient) -> None:
    expected = copy.deepcopy(await answers(client, REQUESTS))
    for output in expected.values():
        output.tokens[0][-1] += 1
    load = Load(client, REQUESTS, expected, clients=2, seed=0)
    assert await load.until(lambda: False, 30)
    await load.stop(30)
    assert 1 <= len(load.problems) <= 2 and "differs" in load.problems[0]


async def test_a_request_that_does_not_end_is_a_problem(client: AsyncSpotjaxClient, service: ScriptedService) -> None:
    expected = await answers(client, REQUESTS)
    service._delay = asyncio.Event().wait
    load = Load(client, REQUESTS, expected, clients=2, seed=0)
    while len(load.running) < 2:
        await asyncio.sleep(0)
    await load.stop(0.2)
    assert len(load.problems) == 1 and "not complete after 0.2 s" in load.problems[0]


async def test_a_broken_connection_is_a_problem(client: AsyncSpotjaxClient, service: ScriptedService) -> None:
    expected = await answers(client, REQUESTS)
    service._delay = asyncio.Event().wait
    load = Load(client, REQUESTS, expected, clients=1, seed=0)
    while not load.running:
        await asyncio.sleep(0)
    await service.stop()
    assert await load.until(lambda: False, 30)
    await load.stop(30)
    assert len(load.problems) == 1


async def test_a_request_that_could_not_be_recorded_is_asked_for_again(
    client: AsyncSpotjaxClient, service: ScriptedService, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, submit, refused = await answers(client, REQUESTS), service.submit, 0

    async def full(request: GenerationRequest) -> None:
        nonlocal refused
        refused += 1
        if refused <= 3:
            raise LogUnavailable("the commit log cannot be written: disk full")
        await submit(request)

    monkeypatch.setattr(service, "submit", full)
    monkeypatch.setattr(load_module, "REFUSED_SECONDS", 0.0)
    load = Load(client, REQUESTS, expected, clients=1, seed=0)
    assert await load.until(lambda: load.finished >= 2, 30)
    await load.stop(30)
    assert load.problems == [] and load.refused == 3 and load.asked == load.finished == len(load.ended)


async def test_a_burst_is_asked_for_at_once_and_once(client: AsyncSpotjaxClient) -> None:
    load = Load(client, REQUESTS, await answers(client, REQUESTS), clients=0, seed=0)
    load.burst(20)
    await load.stop(30)
    assert load.problems == [] and load.finished == 20
    assert all(load.is_ours(name) for name in load.ended) and not load.is_ours("another")


def test_the_longest_pause_is_that_of_a_stream_across_the_moment() -> None:
    assert longest(STREAMS, 1.1, 1.15) == (1.05, 1.5)
    assert longest(STREAMS, 1.6, 1.7) == (1.2, 2.0)
    assert longest(STREAMS, 3.0, 4.0) == (3.0, 3.0)


def test_the_median_gap_is_of_arrivals_in_the_time() -> None:
    assert median_gap(STREAMS, 1.0, 1.3) == pytest.approx(0.1)
