"""One run after another: the points of a sweep over rates or concurrencies, each after warm-up requests of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from spotjax.bench.exchange import Exchange
from spotjax.bench.load import Clock, Endpoint, Run, apply_load
from spotjax.bench.machine import load_average
from spotjax.bench.statistics import Summary
from spotjax.bench.workload import Workload
from spotjax.errors import EndpointFailed


@dataclass(frozen=True)
class Point:
    """One run of a sweep.

    Attributes:
      concurrency: most requests in flight; None for any number.
    """

    workload: Workload
    concurrency: int | None

    @property
    def name(self) -> str:
        """What tells it from the others, for people."""
        arrivals = self.workload.arrivals
        rate = "" if arrivals.rate is None else f" {arrivals.rate:g}/s"
        burstiness = "" if arrivals.burstiness is None else f" burstiness {arrivals.burstiness:g}"
        limit = "" if self.concurrency is None else f", {self.concurrency} at a time"
        return f"{arrivals.kind}{rate}{burstiness}{limit}"


@dataclass(frozen=True)
class Result:
    """What came of a point.

    Attributes:
      load_before: load average when it began; None where the system has none.
    """

    point: Point
    run: Run
    summary: Summary
    load_before: float | None


Told = Callable[[Exchange], None]


async def measure(
    endpoint: Endpoint,
    points: Sequence[Point],
    summarise: Callable[[Run], Summary],
    *,
    warm_up: int,
    timeout: float | None,
    clock: Clock = time.perf_counter,
    told: Callable[[Point], Told] = lambda point: lambda exchange: None,
    finished: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """Runs the points in turn; an interrupted run is the last one.

    Args:
      endpoint: the server.
      points: at least one.
      summarise: figures of a run.
      warm_up: requests before each point, not part of it.
      timeout: see ``apply_load``.
      clock: monotonic seconds.
      told: what is called with the requests of a point that end.
      finished: called with each result.

    Raises:
      EndpointFailed: a warm-up request failed.
    """
    results: list[Result] = []
    for number, point in enumerate(points):
        if warm_up:
            requests = point.workload.warm_up(warm_up)
            run = await apply_load(endpoint, requests, concurrency=point.concurrency, timeout=timeout, clock=clock)
            if run.interrupted:
                return results
            if failures := [exchange.failure for exchange in run.exchanges if exchange.failure is not None]:
                raise EndpointFailed(f"a warm-up request failed, {failures[0].kind}", failures[0].message)
        before = load_average()
        run = await apply_load(
            endpoint, point.workload.plan(number), concurrency=point.concurrency, timeout=timeout, clock=clock,
            told=told(point),
        )  # fmt: skip
        results.append(Result(point, run, summarise(run), before))
        finished(results[-1])
        if run.interrupted:
            break
    return results
