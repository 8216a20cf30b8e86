"""The server dies between any two messages and comes back: clients see what they would have seen, each token once."""

import asyncio
from collections.abc import Collection
from typing import Any

import pytest
from both_clients import CLIENTS
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mortal_server import MortalServer

from spotjax import async_client, client
from spotjax.api import calls, patience
from spotjax.engine.generation import Delta
from spotjax.errors import UnknownRequest

TOKENS = 3
CHOICES = 2
POINTS = ["taken", "recorded", "opened", *["sent"] * (TOKENS * CHOICES)]
"""What a life without death passes."""


@pytest.fixture(autouse=True, scope="module")
def impatient() -> Any:
    quick = {"grpc.initial_reconnect_backoff_ms": 10, "grpc.min_reconnect_backoff_ms": 10}
    options = tuple((name, quick.get(name, value)) for name, value in calls.OPTIONS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patience, "FIRST_WAIT", 0.01)
        for module in (client, async_client):
            patch.setattr(module, "OPTIONS", options)
        yield


async def generate(kind: Any, server: MortalServer) -> list[Delta]:
    one = kind(server.address, patience=20)
    try:
        sampling = {"seed": 7, "max_tokens": TOKENS, "logprobs": 1}
        return [delta async for delta in one.generate("hello", n=CHOICES, request_id="r", **sampling)]
    finally:
        await one.close()


async def outlive(kind: Any, deaths: Collection[int]) -> tuple[list[Any], list[str]]:
    """What a client sees of a server that dies, and what the server passed."""
    async with MortalServer(deaths) as server:
        deltas = await generate(kind, server)
    return [outcome(deltas, choice) for choice in range(CHOICES)], server.points


def outcome(deltas: list[Delta], choice: int) -> tuple[Any, ...]:
    """What a choice comes to, however it was cut into deltas; every finish and usage that was told."""
    mine = [delta for delta in deltas if delta.choice == choice]
    return (
        [token for delta in mine for token in delta.tokens],
        "".join(delta.text for delta in mine),
        [entry for delta in mine for entry in delta.logprobs],
        [(delta.finish, delta.usage) for delta in mine if delta.finish or delta.usage],
    )


@pytest.fixture(scope="module")
def undisturbed() -> list[Any]:
    seen, points = asyncio.run(outlive(CLIENTS[0], ()))
    assert points == POINTS
    assert [len(tokens) for tokens, *_ in seen] == [TOKENS] * CHOICES
    return seen


@pytest.mark.parametrize("death", range(len(POINTS)), ids=lambda death: f"{death}-{POINTS[death]}")
@pytest.mark.parametrize("kind", CLIENTS)
def test_one_death_anywhere_changes_nothing(kind: Any, death: int, undisturbed: list[Any]) -> None:
    seen, points = asyncio.run(outlive(kind, [death]))
    assert seen == undisturbed
    assert points[: death + 1] == POINTS[: death + 1]
    submissions = 2 if POINTS[death] == "taken" else 1  # what is on record is taken up, not repeated
    assert points.count("taken") == submissions


@pytest.mark.parametrize("kind", CLIENTS)
@settings(max_examples=12, deadline=None)
@given(deaths=st.sets(st.integers(0, 15), min_size=2, max_size=5))
@example(deaths={0, 1, 2, 3, 4})
@example(deaths={8, 9, 10})
def test_many_deaths_change_nothing(kind: Any, undisturbed: list[Any], deaths: set[int]) -> None:
    assert asyncio.run(outlive(kind, deaths))[0] == undisturbed


@pytest.mark.parametrize("kind", CLIENTS)
async def test_a_request_that_a_server_came_back_without_is_said_to_be_lost(kind: Any) -> None:
    async with MortalServer([POINTS.index("sent")], loses_log=True) as server:
        with pytest.raises(UnknownRequest, match=r"request 'r' any more.*tokens were seen.*commit log"):
            await generate(kind, server)
        assert not server.service.requests
