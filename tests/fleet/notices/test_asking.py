"""Metadata servers are asked without end, patiently enough, and never in a hurry."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable, Coroutine
from email.utils import formatdate
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from virtual_time import run

from spotjax.errors import MetadataUnavailable
from spotjax.fleet.notices.asking import FIRST_PATIENCE, LARGEST_ANSWER, LONGEST_PATIENCE, Answer, Asking, true_time
from spotjax.fleet.notices.patience import ANSWERS_TO_TRUST, LONGEST_SECONDS

URL = "http://metadata/thing"


def now() -> float:
    return asyncio.get_running_loop().time()


def ask(scenario: Callable[[Asking], Coroutine[Any, Any, Any]], handler: Callable[..., Any]) -> Any:
    """Runs a scenario in virtual time against a server."""

    async def main() -> Any:
        async with httpx.AsyncClient(transport=httpx.MockTransport(handler)) as client:
            return await scenario(Asking("test", client, now, wall=now))

    return run(main())


async def once(asking: Asking) -> Answer:
    return await asking.ask("GET", URL)


def persistently(asking: Asking) -> Awaitable[Answer]:
    return asking.until_answered(lambda: once(asking))


@pytest.mark.parametrize(
    ("response", "trouble"),
    [
        (httpx.Response(302, headers={"Location": "http://portal"}), "status 302"),
        (httpx.Response(503), "status 503"),
        (httpx.Response(200, content=b"x" * (LARGEST_ANSWER + 1)), "an answer without end"),
        (
            httpx.Response(200, headers={"Content-Encoding": "gzip"}, stream=httpx.ByteStream(b"no gzip")),
            "DecodingError",
        ),
    ],
)
def test_what_is_not_an_answer_is_trouble(response: httpx.Response, trouble: str) -> None:
    with pytest.raises(MetadataUnavailable) as caught:
        ask(once, lambda request: response)
    assert caught.value.trouble == trouble


def test_bodies_that_cannot_be_read_are_trouble() -> None:
    answer = ask(once, lambda request: httpx.Response(200, content=b"<html>"))
    with pytest.raises(MetadataUnavailable, match="not JSON"):
        answer.json()
    answer = ask(once, lambda request: httpx.Response(200, content=b"\xff"))
    with pytest.raises(MetadataUnavailable, match="not text"):
        answer.text()


def test_patience_grows_until_a_slow_server_answers_and_shrinks_as_it_becomes_fast() -> None:
    waited: list[float] = []

    async def slow(request: httpx.Request) -> httpx.Response:
        begun = now()
        try:
            await asyncio.sleep(takes.pop(0))
        finally:
            waited.append(now() - begun)
        return httpx.Response(200)

    async def all_of_them(asking: Asking) -> None:
        while takes:
            await persistently(asking)

    takes = [5.0, 5.0, 5.0, 5.0, 0.1, 3.0, 3.0]
    ask(all_of_them, slow)
    assert waited == pytest.approx([2, 4, 5, 5, 0.1, 2, 3])


def test_no_answer_holds_the_next_ask_up_for_longer_than_the_longest_patience_and_rest() -> None:
    asked: list[float] = []

    async def hangs(request: httpx.Request) -> httpx.Response:
        asked.append(now())
        if len(asked) < 20:
            await asyncio.Event().wait()
        return httpx.Response(200)

    ask(persistently, hangs)
    waits = [later - earlier for earlier, later in itertools.pairwise(asked)]
    assert max(waits) <= LONGEST_PATIENCE + LONGEST_SECONDS
    assert min(waits) > FIRST_PATIENCE


def test_a_server_that_wants_to_be_left_alone_is_within_bounds() -> None:
    asked: list[float] = []
    demands = ["1", "3600", "Fri, 31 Dec 1999 23:59:59 GMT", None]

    def busy(request: httpx.Request) -> httpx.Response:
        asked.append(now())
        if len(asked) > len(demands):
            return httpx.Response(200)
        after = demands[len(asked) - 1]
        return httpx.Response(429, headers={"Retry-After": after} if after else None)

    ask(persistently, busy)
    waits = [later - earlier for earlier, later in itertools.pairwise(asked)]
    assert waits[0] >= 1.0
    assert waits[1] >= LONGEST_SECONDS
    assert max(waits) <= LONGEST_SECONDS


def test_each_kind_of_trouble_is_logged_once_until_the_server_is_well(caplog: pytest.LogCaptureFixture) -> None:
    statuses = [*[503, 500, 200] * 40, *[200] * ANSWERS_TO_TRUST, 503, 200]

    async def all_of_them(asking: Asking) -> None:
        while statuses:
            await persistently(asking)

    with caplog.at_level(logging.INFO, "spotjax.notices"):
        ask(all_of_them, lambda request: httpx.Response(statuses.pop(0)))
    said = [record.getMessage() for record in caplog.records if record.name == "spotjax.notices"]
    assert ["503" in said[0], "500" in said[1], "again" in said[2], "503" in said[3]] == [True] * 4
    assert len(said) == 4


@given(
    true=st.floats(1.7e9, 1.8e9), skew=st.sampled_from([0.0, 0.4, -0.4, 90.0, -90.0, 1e6, -1e6]),
    took=st.floats(0, 8), written=st.floats(0, 1),
)  # fmt: skip
def test_true_time_is_never_early_by_more_than_clocks_can_tell_and_never_late_by_more_than_the_answer_took(
    true: float, skew: float, took: float, written: float
) -> None:
    date = formatdate(int(true - took * (1 - written)), usegmt=True)
    found = true_time(date, true + skew, took)
    assert -0.4 - 1e-3 <= found - true <= 1.0 + took + 1e-3


def test_without_a_date_this_machine_s_clock_counts() -> None:
    assert true_time(None, 1.7e9, 1.0) == 1.7e9
    assert true_time("yesterday", 1.7e9, 1.0) == 1.7e9
