"""Both clients before a server that is not there, not there any more, or not ready yet."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from both_clients import CLIENTS
from scripted_server import MODEL, Running, until

from spotjax.api import patience
from spotjax.api.errors import Unavailable
from spotjax.api.server import ApiServer
from spotjax.errors import ConfigError, LogUnavailable

PATIENCE = 20.0


@pytest.fixture(params=CLIENTS)
async def client(request: pytest.FixtureRequest, running: Running) -> AsyncIterator[Any]:
    client = request.param(running.address, patience=PATIENCE)
    yield client
    await client.close()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "FIRST_WAIT", 0.02)


async def tokens(client: Any, **options: Any) -> int:
    """How many are generated."""
    return sum([len(delta.tokens) async for delta in client.generate("hello", max_tokens=4, **options)])


async def start(running: Running) -> None:
    """Starts a server that has nothing to serve yet."""
    running.server = ApiServer()
    await running.server.start(running.address)


async def test_an_address_where_nobody_ever_answered_is_said_at_once(client: Any, running: Running) -> None:
    await running.server.stop()
    began = time.monotonic()
    for call in (client.status(), client.models(), tokens(client), tokens(client, resumable=False)):
        with pytest.raises(Unavailable, match=f"{running.address}.*spotjax serve"):
            await call
    assert time.monotonic() - began < PATIENCE


@pytest.mark.parametrize("kind", CLIENTS)
async def test_a_server_that_was_met_and_stays_away_is_given_up_when_patience_is_over(
    kind: Any, running: Running
) -> None:
    client = kind(running.address, patience=0.5)
    running.steps.let(1)
    with pytest.raises(Unavailable, match=f"{running.address}.*spotjax serve"):
        async for _ in client.generate("hello"):
            await running.server.stop()
            stopped = time.monotonic()
    assert 0.5 <= time.monotonic() - stopped < PATIENCE
    await client.close()


@pytest.mark.parametrize("kind", CLIENTS)
async def test_a_client_without_patience_never_tries_again(kind: Any, running: Running) -> None:
    client = kind(running.address, patience=0)
    running.steps.let(1)
    with pytest.raises(Unavailable):
        async for _ in client.generate("hello"):
            await running.server.stop()
            await start(running)
            await running.server.attach(running.service, MODEL)
    await client.close()
    with pytest.raises(ConfigError, match="patience"):
        kind(running.address, patience=-1)


async def test_a_request_is_kept_until_the_server_is_back_and_has_loaded(client: Any, running: Running) -> None:
    running.steps.let_all()
    assert await tokens(client) == 4
    await running.server.stop()
    waiting = asyncio.create_task(tokens(client, request_id="r"))
    listing = asyncio.create_task(client.models())
    await start(running)
    assert not await client.ready() and "r" not in running.service.requests
    await running.server.attach(running.service, MODEL)
    assert await waiting == 4
    assert [model.name for model in await listing] == ["scripted"]


async def test_a_timeout_ends_the_wait_for_a_server(client: Any, running: Running) -> None:
    await client.ready()
    running.steps.let(1)
    with pytest.raises(TimeoutError):
        async for _ in client.generate("hello", timeout=0.5):
            await running.server.stop()


async def test_a_request_that_is_not_resumable_is_sent_once(client: Any, running: Running) -> None:
    assert await client.ready()
    await running.server.stop()
    await start(running)
    with pytest.raises(Unavailable, match="is starting"):
        await tokens(client, resumable=False)


async def test_what_cannot_be_recorded_is_refused_not_waited_for(client: Any, running: Running) -> None:
    async def full() -> None:
        raise LogUnavailable("the commit log cannot be written: disk full")

    running.service._record = full
    with pytest.raises(LogUnavailable, match="disk full"):
        await tokens(client)
    assert not running.service.requests


async def test_a_request_whose_acceptance_was_never_told_is_cancelled_too(client: Any, running: Running) -> None:
    recording = asyncio.Semaphore(0)
    running.service._record = recording.acquire
    with pytest.raises(TimeoutError):
        await tokens(client, request_id="r", timeout=0.2)
    assert running.service.requests["r"].ended


async def test_closing_a_stream_whose_server_is_gone_is_quick(client: Any, running: Running) -> None:
    running.steps.let(1)
    async with contextlib.aclosing(client.generate("hello", request_id="r")) as stream:
        async for _ in stream:
            await running.server.stop()
            break
        closing = time.monotonic()
    assert time.monotonic() - closing < 2
    assert running.service.requests["r"].ended is None


async def test_the_other_requests_of_a_client_go_on_too(client: Any, running: Running) -> None:
    streams = [asyncio.create_task(tokens(client, request_id=f"r{number}")) for number in range(4)]
    await until(lambda: len(running.service.requests) == 4)
    await running.server.stop()
    await start(running)
    await running.server.attach(running.service, MODEL)
    running.steps.let_all()
    assert await asyncio.gather(*streams) == [4] * 4
