"""Continuous load on a server, checked token by token, and how long the tokens were apart.

Outputs are compared with those of an undisturbed run. Of the times, only the arrivals at the client are recorded.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from spotjax.async_client import AsyncSpotjaxClient
from spotjax.errors import LogUnavailable, SpotjaxError
from spotjax.tools.request_mix import Output, Request, difference

REFUSED_SECONDS = 0.2


@dataclass(frozen=True)
class Stream:
    """Arrivals of one choice of one request.

    Attributes:
      name: request and choice.
      begin: monotonic seconds at which it was asked for.
      times: monotonic seconds at which each piece of output arrived.
    """

    name: str
    begin: float
    times: list[float] = field(default_factory=list)


class Load:
    """Clients that ask for one request after another, until ``stop``.

    Args:
      client: of the server.
      requests: what is asked for, in random order.
      expected: their undisturbed outputs, by name.
      clients: how many requests run at once.
      seed: of the order.

    Attributes:
      problems: everything that was not as it should be, for people.
      streams: arrivals of every choice so far.
      tokens: number of tokens that arrived.
      asked: number of requests so far.
      refused: how often one could not be recorded.
      finished: number of requests that ended as expected.
    """

    def __init__(
        self,
        client: AsyncSpotjaxClient,
        requests: Sequence[Request],
        expected: Mapping[str, Output],
        clients: int,
        seed: int,
    ) -> None:
        self.problems: list[str] = []
        self.streams: list[Stream] = []
        self.tokens = self.asked = self.refused = self.finished = 0
        self.running: dict[str, int] = {}
        """Ids of requests that have not ended, and the tokens that were seen of them."""
        self.ended: dict[str, tuple[float, tuple[int, ...]]] = {}
        """Ids of requests that have: monotonic seconds of that, and tokens of each choice."""
        self._client, self._requests, self._expected = client, requests, expected
        self._draw = random.Random(seed)
        self._changed = asyncio.Event()
        self._stopping = False
        self._ids = itertools.count()
        self._prefix = f"load-{seed}-{time.monotonic_ns():x}"
        self._clients = [asyncio.create_task(self._ask_on()) for _ in range(clients)]

    def burst(self, count: int) -> None:
        """So many requests more at once."""
        self._clients += [asyncio.create_task(self._ask()) for _ in range(count)]

    def is_ours(self, request_id: str) -> bool:
        """Whether a request is one of this load."""
        return request_id.startswith(self._prefix)

    async def stop(self, seconds: float) -> None:
        """Lets the running requests end and asks for no more. Those that have not ended after ``seconds`` are lost."""
        self._stopping = True
        _, late = await asyncio.wait(self._clients, timeout=seconds)
        if late:
            unfinished = ", ".join(f"{name} at token {count}" for name, count in self.running.items())
            self.problems.append(f"not complete after {seconds:g} s: {unfinished}")
            for task in late:
                task.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)

    async def until(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Returns True when the condition holds, which is looked at whenever a token arrives; False after ``seconds``.

        Returns at once when there is a problem: the run has failed.
        """
        deadline = time.monotonic() + seconds
        while not condition() and not self.problems:
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), deadline - time.monotonic())
            except TimeoutError:
                return condition()
        return True

    async def _ask_on(self) -> None:
        while not self._stopping and not self.problems:
            await self._ask()

    async def _ask(self) -> None:
        request = self._draw.choice(self._requests)
        request_id = f"{self._prefix}-{next(self._ids)}-{request.name}"
        begin = time.monotonic()
        streams = [Stream(f"{request_id}/{choice}", begin) for choice in range(request.n)]
        self.streams += streams
        self.running[request_id] = 0
        self.asked += 1
        try:
            await self._insist(request, request_id, streams)
        except SpotjaxError as error:
            self.problems.append(f"{request_id}: {type(error).__name__}: {error}")
        del self.running[request_id]
        self._changed.set()

    async def _insist(self, request: Request, request_id: str, streams: Sequence[Stream]) -> None:
        """Asks again, under the same id, when a server could not record it."""
        while True:
            try:
                return await self._read(request, request_id, streams)
            except LogUnavailable:
                self.refused += 1
                await asyncio.sleep(REFUSED_SECONDS)

    async def _read(self, request: Request, request_id: str, streams: Sequence[Stream]) -> None:
        output = Output.empty(request.n)
        async for delta in self._client.generate(
            request.prompt, n=request.n, request_id=request_id, **request.sampling
        ):
            if delta.tokens:
                streams[delta.choice].times.append(time.monotonic())
            if problem := output.add(delta):
                self.problems.append(f"{request_id}: {problem}")
            self.tokens += len(delta.tokens)
            self.running[request_id] += len(delta.tokens)
            self._changed.set()
        if problem := difference(output, self._expected[request.name]):
            self.problems.append(f"{request_id}: {problem}")
        self.finished += 1
        self.ended[request_id] = time.monotonic(), tuple(map(len, output.tokens))


async def answers(client: AsyncSpotjaxClient, requests: Sequence[Request]) -> dict[str, Output]:
    """What a server says to every request, all asked at once."""

    async def answer(request: Request) -> Output:
        output = Output.empty(request.n)
        async for delta in client.generate(request.prompt, n=request.n, **request.sampling):
            if problem := output.add(delta):
                raise SpotjaxError(f"{request.name}: {problem}")
        return output

    outputs = await asyncio.gather(*(answer(request) for request in requests))
    return dict(zip((request.name for request in requests), outputs, strict=True))


def longest(streams: Sequence[Stream], start: float, stop: float) -> tuple[float, float]:
    """The longest time from one arrival of a stream to its next that overlaps [start, stop]; (start, start) if none."""
    pauses = (
        (earlier, later)
        for stream in streams
        for earlier, later in itertools.pairwise(stream.times)
        if earlier < stop and later > start
    )
    return max(pauses, key=lambda pause: pause[1] - pause[0], default=(start, start))


def median_gap(streams: Sequence[Stream], start: float, stop: float) -> float:
    """Median time between two arrivals of one stream, both in [start, stop].

    Raises:
      statistics.StatisticsError: there are none.
    """
    return statistics.median(
        later - earlier
        for stream in streams
        for earlier, later in itertools.pairwise(stream.times)
        if start <= earlier and later <= stop
    )
