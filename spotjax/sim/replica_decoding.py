"""Sequences that decode side by side on one simulated replica: who is how far, who ends next, who waited how long.

They advance together, so one counter of steps stands for all of them: a sequence with ``n`` tokens to go ends when the
counter has grown by ``n``. Knows nothing of what else the replica does, nor of when.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from heapq import heapify, heappop, heappush
from math import ceil, floor
from typing import NamedTuple

from spotjax.sim.requests import RequestBook

ROUNDING = 1e-6
"""Counters that differ by less are the same: with P > 1 stages they are sums of parts of a step."""


class Decoding(NamedTuple):
    """A sequence; the first to end is the least.

    Attributes:
      end: the counter at its last token.
      request: its number.
      since: when it had its first token here, or began to decode, in seconds.
    """

    end: float
    request: int
    since: float


class DecodingSequences:
    """Sequences of one replica.

    Args:
      book: gets tokens and waits.

    Attributes:
      heap: all of them, see ``heapq``.
      steps: the counter.
    """

    __slots__ = (
        "_book", "_first_tokens", "_gap_starts", "_gaps", "_joined", "_offset", "_round", "_round_at", "_step",
        "heap", "steps",
    )  # fmt: skip

    def __init__(self, book: RequestBook) -> None:
        self._book = book
        self.clear()

    def clear(self) -> None:
        """Forgets all of them."""
        self.heap: list[Decoding] = []
        self.steps = 0.0
        self._step = 0.0  # seconds of the latest step
        self._offset = 0.0  # sum of prompt + output - end: of their lengths where the counter is 0
        self._first_tokens: deque[tuple[float, int]] = deque()  # to come: (counter, request)
        self._round, self._round_at = 0.0, 0.0  # where the counter was, and when, at the latest token of all
        self._joined: list[float] = []  # when others had a first token after that
        self._gap_starts: list[float] = []  # waits between tokens, without those that a later one exceeds
        self._gaps: list[float] = []

    def add(self, request: int, left: int, since: float) -> None:
        """A sequence that just had a token from its prompt decodes from now on, with ``left`` tokens to come."""
        if not self._joined or self._joined[-1] < since:
            self._joined.append(since)
        self._add(request, left, since)

    def resume(self, request: int, at: float) -> None:
        """A sequence of which only the last position is missing decodes from now on."""
        self._add(request, self._book.output[request] - self._book.generated[request], at)
        self._first_tokens.append((self.steps + 1, request))

    def first_token(self, request: int, token_at: float) -> None:
        """A request has its first token here."""
        book = self._book
        if book.first_token[request] != book.first_token[request]:  # nan
            book.first_token[request] = token_at
        else:
            book.wait(request, token_at)

    def left(self, end: float, steps: float) -> int:
        """Tokens to come of a sequence, so many steps from now."""
        return ceil(end - self.steps - steps - ROUNDING)

    def context(self, steps: float) -> int:
        """Positions of the average sequence, so many steps from now."""
        return int(self._offset / len(self.heap) + self.steps + steps)

    def pages(self, page_size: int, steps: float) -> int:
        """Pages of all positions that are computed so many steps from now."""
        book, done, taken = self._book, self.steps + steps - ROUNDING, 0
        for end, request, _ in self.heap:
            taken -= -(ceil(book.prompt[request] + book.output[request] - end + done) - 1) // page_size
        return taken

    def advance(self, at: float, steps: float, step: float) -> None:
        """From ``at`` on there were so many steps of so many seconds."""
        done = self.steps
        firsts = self._first_tokens
        while firsts and firsts[0][0] <= done + steps + ROUNDING:
            first, request = firsts.popleft()
            self.first_token(request, at + min(first - done, steps) * step)
        self.steps, self._step = done + steps, step
        rest = self._round + 1 - done  # of the round that is under way
        if steps < rest - ROUNDING:
            return
        token_at = at + rest * step
        self._wait(self._round_at, token_at - self._round_at)
        for joined in self._joined:
            if joined > self._round_at:
                self._wait(joined, token_at - joined)
        rounds = rest + floor(steps - rest + ROUNDING)
        self._round, self._round_at = done + rounds, at + rounds * step
        if self._joined:
            self._joined = [joined for joined in self._joined if joined > self._round_at]

    def end(self, at: float) -> list[int]:
        """Sequences that have all their tokens leave; returns their requests."""
        book, heap, gaps = self._book, self.heap, self._gaps
        latest, ended = self.steps + ROUNDING, list[int]()
        while heap and heap[0][0] <= latest:
            end, request, since = heappop(heap)
            output = book.output[request]
            self._offset -= book.prompt[request] + output - end
            first = book.first_token[request]
            if first > since:
                since = first  # it began to decode without a token before
            place = bisect_left(self._gap_starts, since)
            gap = gaps[place] if place < len(gaps) else min(self._step, at - since)
            if gap > book.largest_gap[request]:
                book.largest_gap[request] = gap
            book.finish[request] = book.last_token[request] = at
            book.generated[request] = output
            ended.append(request)
        return ended

    def remove(self, request: int) -> None:
        """One leaves before its end; its tokens are committed."""
        entry = next(entry for entry in self.heap if entry.request == request)
        self.heap.remove(entry)
        heapify(self.heap)
        self._offset -= self._book.prompt[request] + self._book.output[request] - entry.end
        self._first_tokens = deque(first for first in self._first_tokens if first[1] != request)
        self.commit(entry)

    def commit(self, sequence: Decoding) -> None:
        """Writes down what a sequence has by now."""
        book, (end, request, since) = self._book, sequence
        left = self.left(end, 0.0)
        if book.output[request] - left > book.generated[request]:
            book.generated[request] = book.output[request] - left
            book.last_token[request] = max(since, self._round_at + (end - left - self._round) * self._step)
            place = bisect_left(self._gap_starts, max(since, book.first_token[request]))
            if place < len(self._gaps):
                book.largest_gap[request] = max(book.largest_gap[request], self._gaps[place])

    def _add(self, request: int, left: int, since: float) -> None:
        end = self.steps + left
        heappush(self.heap, Decoding(end, request, since))
        self._offset += self._book.prompt[request] + self._book.output[request] - end

    def _wait(self, since: float, gap: float) -> None:
        """All waited for a token since then. Keeps a stack of falling gaps: the largest since any time."""
        starts, gaps = self._gap_starts, self._gaps
        while gaps and gaps[-1] <= gap:
            gaps.pop()
            starts.pop()
        gaps.append(gap)
        starts.append(since)
