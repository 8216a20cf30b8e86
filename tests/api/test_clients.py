"""Both clients against a live server that comes and goes: every token exactly once, every error by its name."""

import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from both_clients import CLIENTS
from scripted_server import MODEL, Running, until

from spotjax.api import patience
from spotjax.api.errors import Unavailable
from spotjax.api.server import ApiServer
from spotjax.engine.generation import Delta
from spotjax.engine.request import FinishReason
from spotjax.errors import (
    CheckpointError,
    Draining,
    InvalidRequest,
    NoFeasibleShape,
    NoSpareDevices,
    Overloaded,
    RequestExists,
    UnknownInstance,
    UnknownRequest,
)
from spotjax.testing.scripted_generation import scripted_token
from spotjax.testing.scripted_service import ByteTokenizer

PROMPT = ByteTokenizer().encode("hello", add_special_tokens=True)


@pytest.fixture(params=CLIENTS)
async def client(request: pytest.FixtureRequest, running: Running) -> AsyncIterator[Any]:
    client = request.param(running.address, patience=10)
    yield client
    await client.close()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "FIRST_WAIT", 0.02)


def expected(count: int, choice: int = 0, seed: int = 7) -> list[int]:
    return [scripted_token(PROMPT, seed, choice, position) for position in range(count)]


def tokens_of(deltas: list[Delta], choice: int = 0) -> list[int]:
    return [token for delta in deltas if delta.choice == choice for token in delta.tokens]


async def restart(running: Running, between: Callable[[], object] = lambda: None) -> None:
    """Kills the server's connections and starts another on the same port before the same service."""
    await running.server.stop()
    between()
    running.server = ApiServer()
    await running.server.start(running.address)
    await running.server.attach(running.service, MODEL)


async def test_generate_yields_all_deltas(running: Running, client: Any) -> None:
    running.steps.let_all()
    deltas = [delta async for delta in client.generate("hello", n=2, seed=7, max_tokens=9, logprobs=1)]
    for choice in range(2):
        assert tokens_of(deltas, choice) == expected(9, choice)
    assert deltas[-1].finish is FinishReason.LENGTH and deltas[-1].usage is not None
    assert all(len(delta.logprobs) == len(delta.tokens) for delta in deltas)


@pytest.mark.parametrize("prompt", [[1, 2, 3], [{"role": "user", "content": "hi"}]])
async def test_generate_takes_tokens_and_conversations(running: Running, client: Any, prompt: Any) -> None:
    running.steps.let_all()
    deltas = [delta async for delta in client.generate(prompt, max_tokens=2)]
    assert len(tokens_of(deltas)) == 2


async def test_every_token_arrives_once_although_the_server_goes_away_twice(running: Running, client: Any) -> None:
    deltas: list[Delta] = []
    restarts_at = [2, 9]  # of 20 tokens; a step commits one token of each choice
    running.steps.let(2)
    async for delta in client.generate("hello", n=2, seed=7, max_tokens=10):
        deltas.append(delta)
        if restarts_at and sum(len(delta.tokens) for delta in deltas) >= restarts_at[0]:
            del restarts_at[0]
            await restart(running, between=lambda: running.steps.let(2))
            running.steps.let(3)
    assert not restarts_at
    for choice in range(2):
        assert tokens_of(deltas, choice) == expected(10, choice)
        assert "".join(delta.text for delta in deltas if delta.choice == choice) == bytes(expected(10, choice)).decode()
        assert [delta.finish for delta in deltas if delta.choice == choice and delta.finish] == [FinishReason.LENGTH]


async def test_a_request_that_is_not_resumable_breaks_with_its_connection(running: Running, client: Any) -> None:
    running.steps.let(1)
    with pytest.raises(Unavailable):
        async for _ in client.generate("hello", resumable=False, request_id="r"):
            await running.server.stop()
    await until(lambda: running.service.requests["r"].ended)


async def test_closing_a_stream_early_ends_its_request(running: Running, client: Any) -> None:
    running.steps.let(1)
    async with contextlib.aclosing(client.generate("hello", request_id="r")) as stream:
        async for _ in stream:
            break
    await until(lambda: running.service.requests["r"].ended is FinishReason.CANCELLED)


async def test_a_timeout_is_a_timeout_error_and_ends_the_request(running: Running, client: Any) -> None:
    with pytest.raises(TimeoutError):
        async for _ in client.generate("hello", request_id="r", timeout=0.2):
            pass
    await until(lambda: running.service.requests["r"].ended)


async def test_a_request_id_that_is_taken_does_not_end_the_other_request(running: Running, client: Any) -> None:
    running.steps.let(1)
    async with contextlib.aclosing(client.generate("hello", request_id="r")) as first:
        async for _ in first:
            with pytest.raises(RequestExists, match=r"^request_id: 'r' is taken; choose") as refused:
                async for _ in client.generate("hello", request_id="r"):
                    pass
            assert refused.value.field == "request_id"
            assert running.service.requests["r"].ended is None
            break


async def test_resume_takes_up_a_stream_by_its_offsets(running: Running, client: Any) -> None:
    running.steps.let_all()
    async for _ in client.generate("hello", n=2, seed=7, max_tokens=6, request_id="r"):
        pass
    rest = [delta async for delta in client.resume("r", [4, 6])]
    assert tokens_of(rest, 0) == expected(6)[4:] and tokens_of(rest, 1) == []
    with pytest.raises(UnknownRequest):
        async for _ in client.resume("nobody"):
            pass


async def test_errors_arrive_as_what_the_server_raised(running: Running, client: Any) -> None:
    async def generate(**fields: Any) -> None:
        async for _ in client.generate("hello", **fields):
            pass

    with pytest.raises(InvalidRequest, match=r"^sampling.top_p: must be in \(0, 1\], got 2") as invalid:
        await generate(top_p=2)
    assert invalid.value.field == "sampling.top_p"
    with pytest.raises(InvalidRequest, match=r"sampling\.top_k"):
        await generate(top_k=-1)
    with pytest.raises(InvalidRequest, match=r"sampling\.top_q: no such field"):
        await generate(top_q=1)
    running.service.overloaded = True
    with pytest.raises(Overloaded) as overloaded:
        await generate()
    assert overloaded.value.retry_after == 1.5
    await running.service.drain(0)
    with pytest.raises(Draining):
        await generate()
    with pytest.raises(UnknownInstance, match="i-0, i-1"):
        await client.preempt("nobody")
    with pytest.raises(NoSpareDevices):
        await client.add(5)
    with pytest.raises(UnknownRequest):
        await client.cancel("nobody")


async def test_the_fleet_is_seen_as_the_service_sees_it(running: Running, client: Any) -> None:
    assert await client.status() == running.service.status()
    assert await client.ready()
    report = await client.preempt("i-1", 0.0)
    assert report.before.shape.data == 2 and report.after.shape.data == 1
    assert await client.status() == running.service.status()
    assert (await client.add()).after.shape.data == 2
    assert (await client.drain("i-2")).after.shape.data == 1
    with pytest.raises(NoFeasibleShape):
        await client.drain("i-0")
    assert [model.name for model in await client.models()] == ["scripted"]


async def test_a_checkpoint_is_saved_with_the_parameters_unless_told_otherwise(running: Running, client: Any) -> None:
    saved = await client.save("/here")
    assert (saved.parameter_bytes, saved.kv_bytes) == (1 << 22, 0)
    saved = await client.save("/here", parameters=False, state=True)
    assert (saved.parameter_bytes, saved.kv_bytes, saved.left_out) == (0, 1 << 20, ("i-1",))
    with pytest.raises(CheckpointError, match="complete checkpoint"):
        await client.save("/here")
    with pytest.raises(InvalidRequest, match="directory"):
        await client.save("")


async def test_watch_gives_recent_events_and_ends_with_the_server(running: Running, client: Any) -> None:
    kinds = []
    async for event in client.watch():
        kinds.append(event.kind)
        if event.kind == "ready":
            await running.service.preempt("i-0", 0.0)
        if event.kind == "switch":
            await running.service.stop()
    assert kinds == ["ready", "lost", "switch"]


async def test_recent_events_can_be_had_without_following(running: Running, client: Any) -> None:
    await running.service.preempt("i-0", 0.0)
    assert [event.kind async for event in client.watch(follow=False)] == ["ready", "lost", "switch"]
