"""Prompts of one simulated replica: chunks of them become prefill steps that go through the pipeline, in order.

Knows how long that takes, not when there is room for it.
"""

from __future__ import annotations

from collections import deque
from math import inf
from typing import NamedTuple

from spotjax.sim.requests import RequestBook
from spotjax.sim.times import ReplicaTimes


class Chunk(NamedTuple):
    """Part of a prompt in the pipeline.

    Attributes:
      back: when it comes out, in seconds.
      request: its number.
      before: positions that are computed without it.
      computed: positions that are computed with it.
      wanted: positions that are to be.
    """

    back: float
    request: int
    before: int
    computed: int
    wanted: int


class Prompts:
    """Sequences that miss positions.

    Args:
      times: how long a prompt takes.
      prefill_tokens: positions of one prefill step.
      book: counts positions that are computed again.

    Attributes:
      queued: (request, positions computed, positions wanted) of those that are not in the pipeline.
      in_flight: chunks in the pipeline.
      steps: prefill steps in the pipeline; each is one chunk or more.
      entrance_free: when the first stage can take the next one, in seconds.
    """

    __slots__ = ("_book", "_prefill_tokens", "_times", "entrance_free", "in_flight", "queued", "steps")

    def __init__(self, times: ReplicaTimes, prefill_tokens: int, book: RequestBook) -> None:
        self._times, self._prefill_tokens, self._book = times, prefill_tokens, book
        self.clear()

    def clear(self) -> None:
        """Forgets all of them."""
        self.queued: deque[tuple[int, int, int]] = deque()
        self.in_flight: deque[Chunk] = deque()
        self.steps = 0
        self.entrance_free = 0.0

    @property
    def next_back(self) -> float:
        """When the next chunk comes out, infinite if there is none."""
        return self.in_flight[0].back if self.in_flight else inf

    @property
    def near(self) -> int:
        """Those not in the pipeline that one step would bring to their next token."""
        return sum(wanted - computed <= self._prefill_tokens for _, computed, wanted in self.queued)

    def computed(self) -> list[tuple[int, int]]:
        """(Request, positions computed) of all."""
        queued = [(request, computed) for request, computed, _ in self.queued]
        return queued + [(chunk.request, chunk.before) for chunk in self.in_flight]

    def pages(self, page_size: int) -> int:
        """Pages that all of them have: those for all positions that are wanted."""
        wanted = [wanted for _, _, wanted in self.queued] + [chunk.wanted for chunk in self.in_flight]
        return sum(-(-positions // page_size) for positions in wanted)

    def delay(self, seconds: float, until: float) -> None:
        """What is in the pipeline comes out so much later; nothing enters it before ``until``."""
        self.in_flight = deque(chunk._replace(back=chunk.back + seconds) for chunk in self.in_flight)
        self.entrance_free = until

    def begin(self, at: float) -> None:
        """One prefill step enters the pipeline: the first chunk, and those after it that fit into the step."""
        queued, prefill, book = self.queued, self._times.prefill, self._book
        most, tokens = self._prefill_tokens, 0
        chunks: list[tuple[int, int, int, int]] = []
        more = more_slowest = 0.0  # for attention to positions of earlier chunks
        while queued:
            request, before, wanted = queued[0]
            length = min(wanted - before, most)
            if chunks and tokens + length > most:
                break
            queued.popleft()
            tokens += length
            chunks.append((request, before, before + length, wanted))
            if before:
                both, earlier, alone = prefill(before + length), prefill(before), prefill(length)
                more += max(0.0, both[0] - earlier[0] - alone[0])
                more_slowest += max(0.0, both[1] - earlier[1] - alone[1])
            if book.generated[request]:
                known = book.prompt[request] + book.generated[request] - 1
                book.recomputed[request] += max(0, min(before + length, known) - before)
        whole, slowest = prefill(tokens)
        slowest += more_slowest
        back = at + whole + more
        if self.in_flight:
            back = max(back, self.in_flight[-1].back + slowest)  # nobody overtakes in the pipeline
        for chunk in chunks:
            self.in_flight.append(Chunk(back, *chunk))
        self.steps += 1
        self.entrance_free = at + slowest

    def take_back(self, at: float) -> list[Chunk]:
        """Chunks that are out of the pipeline by now."""
        in_flight, back = self.in_flight, list[Chunk]()
        while in_flight and in_flight[0].back <= at:
            if not back or back[-1].back < in_flight[0].back:
                self.steps -= 1
            back.append(in_flight.popleft())
        return back

    def remove_youngest(self, older: int) -> int:
        """Takes out the youngest that is not in the pipeline; -1 if none is younger than ``older``."""
        youngest = max(self.queued, default=(-1, 0, 0))
        request, computed, _ = youngest
        if request < older:
            return -1
        self.queued.remove(youngest)
        if not self._book.generated[request]:  # else they are counted when they are computed again
            self._book.recomputed[request] += computed
        return request
