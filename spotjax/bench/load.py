"""Puts load on a server: sends each request when its time has come, and notes what becomes of it.

The clock is passed in; what a request is and how it is sent is the endpoint's business.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from spotjax.bench.exchange import INTERRUPTED, Exchange, Failure, PlannedRequest
from spotjax.errors import EndpointFailed

Clock = Callable[[], float]
EARLY = 1e-6
"""Seconds by which a request may be sent before its time."""


class Endpoint(Protocol):
    """A server, as the load sees it."""

    async def send(self, request: PlannedRequest, exchange: Exchange, clock: Clock) -> None:
        """Sends a request, and notes every piece of the answer in ``exchange`` at the time that ``clock`` gives.

        Raises:
          EndpointFailed: there is no complete answer.
        """
        ...


@dataclass
class Run:
    """What became of the requests of one run.

    Attributes:
      exchanges: of the requests that were begun, in order of arrival.
      duration: seconds from the start to the end of the last one.
      cpu_seconds: that this process computed meanwhile.
      interrupted: the run was ended early.
    """

    exchanges: list[Exchange] = field(default_factory=list)
    duration: float = 0.0
    cpu_seconds: float = 0.0
    interrupted: bool = False


async def apply_load(
    endpoint: Endpoint,
    requests: Sequence[PlannedRequest],
    *,
    concurrency: int | None = None,
    timeout: float | None = None,
    clock: Clock = time.perf_counter,
    told: Callable[[Exchange], None] = lambda exchange: None,
) -> Run:
    """Sends all requests and waits for their ends. Being cancelled ends the run early; what there is, is returned.

    Args:
      endpoint: the server.
      requests: in order of arrival.
      concurrency: most requests in flight; others wait for one to end, and their times begin when they are sent.
      timeout: seconds after which an answer that is not complete has failed.
      clock: monotonic seconds.
      told: called with each request that ended.
    """
    run, start, cpu = Run(), clock(), time.process_time()
    slots = asyncio.Semaphore(concurrency) if concurrency is not None else contextlib.nullcontext()
    tasks: list[asyncio.Task[None]] = []

    def now() -> float:
        return clock() - start

    async def one(exchange: Exchange) -> None:
        async with slots:
            exchange.sent = now()
            exchange.failure = await outcome(endpoint, exchange, now, timeout)
        told(exchange)

    try:
        async for request in arriving(requests, now):
            exchange = Exchange(request, sent=now(), failure=INTERRUPTED)  # until it is known better
            run.exchanges.append(exchange)
            tasks.append(asyncio.create_task(one(exchange)))
        await asyncio.gather(*tasks)
    except asyncio.CancelledError:
        run.interrupted = True
        if (task := asyncio.current_task()) is not None:
            task.uncancel()  # it has been heard: what comes next is not to be cancelled
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    run.duration, run.cpu_seconds = now(), time.process_time() - cpu
    return run


async def arriving(requests: Sequence[PlannedRequest], now: Clock) -> AsyncIterator[PlannedRequest]:
    """Each request when its time has come; one that is late comes at once."""
    for request in requests:
        while (wait := request.arrival - now()) > EARLY:  # a loop whose timers count milliseconds wakes up too soon
            await asyncio.sleep(wait)
        yield request


async def outcome(endpoint: Endpoint, exchange: Exchange, now: Clock, timeout: float | None) -> Failure | None:
    """Sends one request; why it has no complete answer, or None if it has one."""
    try:
        async with asyncio.timeout(timeout):
            await endpoint.send(exchange.request, exchange, now)
    except EndpointFailed as failed:
        return Failure(failed.kind, failed.said)
    except TimeoutError:
        return Failure("timeout", f"no complete answer within {timeout:g} s")
    return None
