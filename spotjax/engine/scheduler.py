"""Decides what the next step of one replica runs: continuous batching with chunked prefill over paged KV.

Every sequence wants the same thing: KV of all its positions, then a token. A step gives it a span of positions. A fresh
prompt, a decode step, and a sequence resumed after a preemption differ only in how many positions are missing, so there
is one code path for all. Plain Python; knows no devices, no clock and no clients.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from spotjax.engine.batch import Batch, Span
from spotjax.engine.pages import PageAllocator
from spotjax.engine.request import FinishReason, RequestState


@dataclass(slots=True, eq=False)
class Sequence:
    """A request's sequence on its way through a replica.

    Attributes:
      key: unique in the process, in order of acceptance.
      state: what is committed.
      pages: KV pages it owns, in position order; empty while it waits.
      computed: the watermark: positions whose KV is complete.
      in_flight: part of a step that has not come back.
      cancelled: why it is to end at the next token boundary, if it is.
    """

    key: int
    state: RequestState
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    in_flight: bool = False
    cancelled: FinishReason | None = None

    @property
    def missing(self) -> int:
        """Positions whose KV is still to be computed; the last one's logits give the next token."""
        return self.state.length - self.computed


@dataclass(frozen=True, slots=True)
class Limits:
    """What one replica can do at once.

    Attributes:
      max_batch: sequences that run, and sequences of one step at most; more may run where others' were adopted.
      prefill_tokens: positions of one prefill span.
      depth: steps in flight, the number of pipeline stages.
      prefill_fits: whether prefill spans of these lengths can share a step.
    """

    max_batch: int
    prefill_tokens: int
    depth: int
    prefill_fits: Callable[[list[int]], bool]


class Scheduler:
    """The waiting and the running sequences of one replica."""

    def __init__(self, limits: Limits, pages: PageAllocator) -> None:
        self.limits, self.pages = limits, pages
        self.waiting: deque[Sequence] = deque()
        self.running: dict[int, Sequence] = {}
        """By key, in the order in which they were last scheduled."""
        self.reserved: dict[int, list[int]] = {}
        """Pages taken for sequences that are on their way here with their KV, by key."""
        self.preempted = 0
        """Times that a sequence lost its KV to another for lack of pages."""
        self._step = 0
        self._prefilled_last = False

    @property
    def load(self) -> int:
        """Sequences that wait or run."""
        return len(self.waiting) + len(self.running)

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence that owns no pages."""
        self.waiting.append(sequence)

    def adopt(self, sequence: Sequence) -> None:
        """Takes over a running sequence whose pages are already claimed and filled up to its watermark."""
        self.reserved.pop(sequence.key, None)
        self.running[sequence.key] = sequence

    def schedule(self) -> Batch | None:
        """The next step, or None while there is nothing to run or all of it is in flight.

        Prefill and decode steps alternate when both have work, so that a long prompt delays running sequences by one
        prefill step at a time and new sequences still start soon.
        """
        self._admit()
        kinds = (self._decode, self._prefill) if self._prefilled_last else (self._prefill, self._decode)
        for kind in kinds:
            if spans := kind():
                self._prefilled_last = kind == self._prefill
                self._step += 1
                return Batch(self._step, tuple(spans))
        return None

    def commit(self, batch: Batch, states: Mapping[int, RequestState]) -> list[Sequence]:
        """Takes a step's outcome: new states of the sequences that sampled, after these were committed.

        Returns: the sequences that ended, their pages released.
        """
        ended = []
        for span in batch.spans:
            sequence = self.running[span.sequence]
            sequence.in_flight = False
            sequence.computed = span.start + len(span.tokens)
            sequence.state = states.get(sequence.key, sequence.state)
            if sequence.cancelled is not None and sequence.state.finish is None:
                sequence.state = sequence.state.finished(sequence.cancelled)
            if sequence.state.finish is not None:
                self._release(sequence)
                del self.running[sequence.key]
                ended.append(sequence)
        return ended

    def cancel(self, sequence: Sequence, reason: FinishReason) -> bool:
        """Ends a sequence; True if it ended now, False if it will when its step comes back."""
        sequence.cancelled = reason
        if sequence.in_flight:
            return False
        if self.running.pop(sequence.key, None) is None:
            self.waiting.remove(sequence)
        self._release(sequence)
        sequence.state = sequence.state.finished(reason)
        return True

    def release_reserved(self, key: int) -> None:
        """Gives back the pages of a sequence that does not come after all."""
        self.pages.release(self.reserved.pop(key))

    def sequences(self) -> Iterator[Sequence]:
        """All of them, running first."""
        yield from self.running.values()
        yield from self.waiting

    def check(self) -> None:
        """Verifies that page accounting balances.

        Raises:
          AssertionError: a page is lost or shared, or a waiting sequence owns one.
        """
        self.pages.check([*(sequence.pages for sequence in self.sequences()), *self.reserved.values()])
        assert not any(sequence.pages for sequence in self.waiting), "a waiting sequence owns pages"

    def _admit(self) -> None:
        """Lets waiting sequences in, in order, while there is room for all that they have to compute now."""
        while self.waiting and len(self.running) < self.limits.max_batch:
            needed = self.pages.needed(self.waiting[0].state.length)
            if needed > self.pages.free:
                return
            sequence = self.waiting.popleft()
            sequence.pages = self.pages.allocate(needed)
            self.running[sequence.key] = sequence

    def _prefill(self) -> list[Span]:
        """Spans of sequences that miss more than one position, as many as fit one step."""
        chosen: list[tuple[Sequence, int]] = []
        for sequence in self._idle():
            if sequence.missing > 1:
                length = min(sequence.missing, self.limits.prefill_tokens)
                if chosen and not self.limits.prefill_fits([*(n for _, n in chosen), length]):
                    break
                chosen.append((sequence, length))
        return [self._span(sequence, length) for sequence, length in chosen]

    def _decode(self) -> list[Span]:
        """One position each of the sequences that miss one, a fair share of them when several steps are in flight."""
        share = min(self.limits.max_batch, -(-len(self.running) // self.limits.depth))
        spans: list[Span] = []
        for sequence in list(self._idle()):
            if len(spans) == share:
                break
            if sequence.missing == 1 and self._make_room(sequence):
                spans.append(self._span(sequence, 1))
        return spans

    def _make_room(self, sequence: Sequence) -> bool:
        """Gives a sequence the page its next position needs, at the cost of the youngest; False if it must wait."""
        while sequence.key in self.running and len(sequence.pages) < self.pages.needed(sequence.state.length):
            if self.pages.free:
                sequence.pages += self.pages.allocate(1)
            else:
                youngest = max(self._idle(), key=lambda other: other.key)
                if youngest.key < sequence.key or any(s.key > youngest.key for s in self.running.values()):
                    return False  # a younger one is in flight; its pages come free when it is back
                self._preempt(youngest)
        return sequence.key in self.running

    def _preempt(self, sequence: Sequence) -> None:
        """Sends a running sequence back to its place in the queue; its KV will be computed again, its tokens stay."""
        del self.running[sequence.key]
        self._release(sequence)
        insort(self.waiting, sequence, key=lambda waiting: waiting.key)
        self.preempted += 1

    def _idle(self) -> Iterable[Sequence]:
        return (sequence for sequence in self.running.values() if not sequence.in_flight)

    def _span(self, sequence: Sequence, length: int) -> Span:
        state, start = sequence.state, sequence.computed
        sequence.in_flight = True
        self.running[sequence.key] = self.running.pop(sequence.key)  # now the most recently scheduled
        stop = start + length
        tokens = (state.prompt + state.tokens)[start:stop] if length > 1 else (_token_at(state, start),)
        pages = tuple(sequence.pages[: self.pages.needed(stop)])
        return Span(sequence.key, tokens, start, pages, state, samples=stop == state.length)

    def _release(self, sequence: Sequence) -> None:
        self.pages.release(sequence.pages)
        sequence.pages, sequence.computed = [], 0


def _token_at(state: RequestState, position: int) -> int:
    output = position - len(state.prompt)
    return state.tokens[output] if output >= 0 else state.prompt[position]
