"""Requests are sent when their time has come, no more than allowed at once, and nothing that happens is lost.

In virtual time: what is measured is what the scripted endpoint waits, to the last digit that floats have.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import pytest
import virtual_time
from openai_server import planned

from spotjax.bench.exchange import INTERRUPTED, Exchange, PlannedRequest
from spotjax.bench.goodput import Objectives
from spotjax.bench.load import Clock, Run, apply_load
from spotjax.bench.statistics import summarise
from spotjax.errors import EndpointFailed


class Scripted:
    """Takes ``first`` seconds for the first piece of an answer and ``step`` for each other one."""

    def __init__(self, first: float = 1.0, step: float = 0.5, fails: Callable[[int], object] = lambda number: None):
        self.first, self.step, self.fails = first, step, fails
        self.begun: list[float] = []

    async def send(self, request: PlannedRequest, exchange: Exchange, clock: Clock) -> None:
        number = len(self.begun)
        self.begun.append(clock())
        await asyncio.sleep(self.first)
        if (said := self.fails(number)) is not None:
            raise EndpointFailed("http 429", said)
        exchange.piece(clock(), "a")
        for _ in range(request.output_tokens - 1):
            await asyncio.sleep(self.step)
            exchange.piece(clock(), "b")
        exchange.output_tokens, exchange.finish = request.output_tokens, "length"


def run(endpoint: Scripted, requests: Sequence[PlannedRequest], **options: float | None) -> Run:
    async def main() -> Run:
        clock = asyncio.get_running_loop().time
        return await apply_load(endpoint, requests, clock=clock, **options)  # type: ignore[arg-type]

    return virtual_time.run(main())


def test_requests_are_sent_when_they_arrive_and_times_are_those_of_the_answer() -> None:
    endpoint = Scripted(first=1.0, step=0.5)
    measured = run(endpoint, [planned(0.0), planned(0.25), planned(7.0)])
    assert endpoint.begun == pytest.approx([0, 0.25, 7])
    assert measured.exchanges[1].times == pytest.approx([1.25, 1.75, 2.25, 2.75])
    assert measured.duration == pytest.approx(7 + 1 + 3 * 0.5)
    summary = summarise(measured.exchanges, measured.duration, Objectives())
    assert summary.ttft is not None and summary.tpot is not None and summary.e2el is not None
    assert summary.ttft.median == pytest.approx(1) and summary.tpot.mean == pytest.approx(0.5)
    assert summary.e2el.most == pytest.approx(2.5) and summary.most_in_flight == 2


def test_no_more_requests_are_in_flight_than_allowed_and_their_times_begin_when_they_are_sent() -> None:
    endpoint = Scripted(first=1.0, step=0.0)
    measured = run(endpoint, [planned()] * 5, concurrency=2)
    assert endpoint.begun == pytest.approx([0, 0, 1, 1, 2])
    summary = summarise(measured.exchanges, measured.duration, Objectives())
    assert summary.e2el is not None and summary.e2el.most == pytest.approx(1) and summary.most_in_flight == 2
    assert summary.queued is not None and summary.queued.most == pytest.approx(2)


def test_failures_are_counted_by_kind_and_leave_the_others_alone() -> None:
    measured = run(Scripted(fails=lambda number: "slow down" if number in (1, 3) else None), [planned()] * 5)
    summary = summarise(measured.exchanges, measured.duration, Objectives())
    assert (summary.completed, summary.failed, summary.failures) == (3, 2, {"http 429": 2})
    assert [e.failure is None for e in measured.exchanges] == [True, False, True, False, True]


def test_a_request_that_takes_too_long_has_failed_and_its_place_is_free() -> None:
    endpoint = Scripted(first=3.0)
    measured = run(endpoint, [planned()] * 2, concurrency=1, timeout=2.0)
    assert endpoint.begun == pytest.approx([0, 2])
    assert [e.failure.kind for e in measured.exchanges if e.failure] == ["timeout", "timeout"]


def test_an_interrupted_run_gives_what_there_is() -> None:
    async def main() -> Run:
        clock = asyncio.get_running_loop().time
        requests = [planned(number) for number in range(10)]
        running = asyncio.create_task(apply_load(Scripted(1.0, 0.25), requests, clock=clock))
        await asyncio.sleep(3.5)
        running.cancel()
        return await running

    measured = virtual_time.run(main())
    assert measured.interrupted and measured.duration == pytest.approx(3.5)
    assert [e.failure for e in measured.exchanges] == [None, None, INTERRUPTED, INTERRUPTED]
    summary = summarise(measured.exchanges, measured.duration, Objectives())
    assert (summary.completed, summary.failed, summary.interrupted) == (2, 0, 2)
    assert summary.request_throughput == pytest.approx(2 / 3.5)


def test_a_mistake_in_an_endpoint_is_no_failed_request() -> None:
    def mistake(number: int) -> object:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(Scripted(fails=mistake), [planned()] * 3)
