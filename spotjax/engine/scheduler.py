"""Decides what the next step of one replica runs: continuous batching with chunked prefill over paged KV.

Every sequence wants the same thing: KV of all its positions, then a token. A step gives it a span of positions. A fresh
prompt, one whose beginning is cached, a decode step, and a sequence resumed after a preemption differ only in how many
positions are missing, so there is one code path for all. Plain Python; knows no devices, no clock and no clients.

A sequence may take part in a step while its step before is in flight: positions are known ahead, and the token, where
it is not, is drawn on the device that needs it. If the sequence turns out to have ended, what the later step does for
it is dropped; its pages are kept until that step is back.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass

from spotjax.engine.batch import Batch, Span
from spotjax.engine.observer import Work
from spotjax.engine.pages import PageAllocator
from spotjax.engine.prefix_reuse import PrefixReuse
from spotjax.engine.request import FinishReason, RequestState
from spotjax.engine.sequence import Flight, Sequence

MOST_PREFILLS = 4
"""Prefill steps in a row while others could decode: longer than these take, no running sequence waits for new ones."""


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
        self.leaving: dict[int, Sequence] = {}
        """By key, those that have ended while later steps may still write to their pages."""
        self.reserved: dict[int, list[int]] = {}
        """Pages taken for sequences that are on their way here with their KV, by key."""
        self.preempted = 0
        """Times that a sequence lost its KV to another for lack of pages."""
        self.reuse = PrefixReuse(pages, limits.prefill_tokens)
        self.prefilled = 0
        """Positions of prefill spans whose KV was computed."""
        self.recomputed = 0
        """Positions whose KV was computed although it had been there before."""
        self.entered: list[Sequence] = []
        """Sequences that the last call of ``schedule`` let in."""
        self._blocked: tuple[int, int] | None = None
        """The first in the queue that did not fit, and what the pages had gained when it did not."""
        self._step = 0
        self._prefills = 0
        """Prefill steps since the last decode step."""

    @property
    def load(self) -> int:
        """Sequences that wait or run."""
        return len(self.waiting) + len(self.running)

    @property
    def work(self) -> Work:
        """What it has done."""
        return Work(self.prefilled, self.reuse.queried, self.reuse.positions, self.recomputed, self.preempted)

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence that owns no pages."""
        self.waiting.append(sequence)

    def adopt(self, sequence: Sequence) -> None:
        """Takes over a running sequence whose pages are already claimed and filled up to its watermark."""
        self.reserved.pop(sequence.key, None)
        self.running[sequence.key] = sequence
        sequence.cached = 0
        self.reuse.remember(sequence)

    def schedule(self, *, ahead: bool = False) -> Batch | None:
        """The next step, or None while there is nothing to run or all of it is in flight.

        Args:
          ahead: whether sequences with steps in flight take part, those that need to know which token they drew apart.

        Prefill and decode steps alternate when both have work, so that a long prompt delays running sequences by one
        prefill step at a time and new sequences still start soon. Where many prompts come at once, see ``_starting``.
        """
        self._admit()
        self.reuse.exchange(self._ready(ahead=False))
        decode_first = self._prefills and not (self._prefills < MOST_PREFILLS and self._starting())
        kinds = (self._decode, self._prefill) if decode_first else (self._prefill, self._decode)
        for kind in kinds:
            if spans := kind(ahead):
                self._prefills = self._prefills + 1 if kind == self._prefill else 0
                self._step += 1
                return self._take_off(spans)
        return None

    def commit(self, batch: Batch, states: Mapping[int, RequestState]) -> list[Sequence]:
        """Takes a step's outcome: new states of the sequences that sampled, after these were committed.

        Steps come back in the order in which they were scheduled, as far as they have sequences in common.

        Returns: the sequences that ended, their pages released or about to be.
        """
        ended = []
        for span in batch.spans:
            if (sequence := self.running.get(span.sequence)) is None:
                self._land(self.leaving[span.sequence])
                continue
            sequence.land()
            sequence.computed = span.stop
            sequence.state = states.get(sequence.key, sequence.state)
            self.reuse.remember(sequence)
            if sequence.cancelled is not None and sequence.state.finish is None:
                sequence.state = sequence.state.finished(sequence.cancelled)
            if sequence.state.finish is not None:
                del self.running[sequence.key]
                if sequence.in_flight:
                    self.leaving[sequence.key] = sequence
                else:
                    self._release(sequence)
                ended.append(sequence)
        return ended

    def _land(self, sequence: Sequence) -> None:
        """A step is back with a sequence that had ended before."""
        sequence.land()
        if not sequence.in_flight:
            self._release(self.leaving.pop(sequence.key))

    def ground(self) -> None:
        """Nothing that is in flight ever comes back."""
        for sequence in self.running.values():
            sequence.ground()
        for sequence in self.leaving.values():
            sequence.ground()
            self._release(sequence)
        self.leaving.clear()

    def forget(self, keys: Collection[int]) -> None:
        """Pages that only these sequences have, given by key, or nobody, may have been written to by others.

        The sequences are computed again, and nothing of the past is found any more. Nothing may be in flight.
        """
        for sequence in list(self.running.values()):
            sequence.cached = 0
            if sequence.key in keys:
                self._set_back(sequence)
        self.pages.forget()

    def cancel(self, sequence: Sequence, reason: FinishReason) -> bool:
        """Ends a sequence; True if it ended now, False if it will when its next step comes back."""
        sequence.cancelled = reason
        if sequence.in_flight:
            return False
        if self.running.pop(sequence.key, None) is None:
            self.waiting.remove(sequence)
        self._release(sequence)
        sequence.state, sequence.matcher = sequence.state.finished(reason), None
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
          AssertionError: a page is lost, or shared and still to be written, or a waiting sequence owns one.
        """
        owners = (*self.sequences(), *self.leaving.values())
        self.pages.check([*(sequence.pages for sequence in owners), *self.reserved.values()])
        assert not any(sequence.pages for sequence in self.waiting), "a waiting sequence owns pages"
        for sequence in owners:
            for page in sequence.pages[sequence.computed // self.pages.page_size :]:
                assert self.pages.references(page) == 1, "a page that is still written is shared"
                assert page not in self.pages.cache, "a page that is still written is cached"

    def _admit(self) -> None:
        """Lets waiting sequences in, in order, while there is room for all that they have to compute now."""
        if self.entered:
            self.entered = []
        while self.waiting and len(self.running) < self.limits.max_batch:
            first = self.waiting[0]
            if self._blocked == (first.key, self.pages.gains):
                return
            found = self.reuse.find(first.state)
            self.pages.share(found)
            needed = self.pages.needed(first.state.length) - len(found)
            if needed > self.pages.free:
                self.pages.release(found)
                self._blocked = first.key, self.pages.gains
                return
            sequence = self.waiting.popleft()
            sequence.pages = found + self.pages.allocate(needed)
            self.reuse.take(sequence, len(found))
            self.reuse.asked(sequence)
            self.running[sequence.key] = sequence
            self.entered.append(sequence)

    def _starting(self) -> bool:
        """Whether more sequences are one prefill step from their next token than decode.

        A decode step takes nearly as long for a few rows as for many, so it is better run when these have joined.
        """
        near = sum(1 < sequence.missing <= self.limits.prefill_tokens for sequence in self.running.values())
        return near > sum(sequence.missing <= 1 for sequence in self.running.values())

    def _prefill(self, ahead: bool) -> list[Span]:
        """Spans of sequences that miss more than one position, as many as fit one step.

        Who would compute the very page that another does just now waits for it.
        """
        chosen: list[tuple[Sequence, int]] = []
        underway = {
            self.reuse.next_page(s) for s in self.running.values() if s.in_flight and s.computed < s.state.length - 1
        }
        for sequence in self._ready(ahead):
            if sequence.missing > 1:
                node = None if sequence.in_flight else self.reuse.next_page(sequence)
                if node is not None and node in underway and self.reuse.can_use(sequence):
                    continue
                underway.add(node)
                length = min(sequence.missing, self.limits.prefill_tokens)
                if chosen and not self.limits.prefill_fits([*(n for _, n in chosen), length]):
                    break
                chosen.append((sequence, length))
        self.prefilled += sum(length for _, length in chosen)
        return [sequence.span(length, self.pages.needed(sequence.begun + length)) for sequence, length in chosen]

    def _decode(self, ahead: bool) -> list[Span]:
        """One position each of the sequences that miss one, a fair share of them when several steps are in flight.

        Those that run ahead all follow the same step. None does while a sequence waits for a page: it may get it from a
        younger one, but only from one at rest.
        """
        share = min(self.limits.max_batch, -(-len(self.running) // self.limits.depth))
        chosen: dict[int, Span] = {}
        follows: int | None = None
        for sequence in list(self._ready(ahead)):
            if len(chosen) == share:
                break
            if sequence.missing != 1 or (sequence.in_flight and not ahead):
                continue
            unknown = sequence.flights[-1].step if sequence.drawing else None
            if None not in (unknown, follows) and unknown != follows:
                continue
            if self._make_room(sequence, chosen):
                follows = unknown if follows is None else follows
                chosen[sequence.key] = sequence.span(1, self.pages.needed(sequence.begun + 1))
            else:
                ahead = False
        return list(chosen.values())

    def _make_room(self, sequence: Sequence, chosen: Container[int]) -> bool:
        """Gives a sequence the page its next position needs, at the cost of the youngest; False if it must wait."""
        while sequence.key in self.running and len(sequence.pages) < self.pages.needed(sequence.begun + 1):
            if self.pages.free:
                sequence.pages += self.pages.allocate(1)
            elif sequence.in_flight or self.leaving:
                return False  # pages come free when the step in flight is back
            else:
                resting = [s for s in self.running.values() if not s.in_flight and s.key not in chosen]
                youngest = max(resting, key=lambda other: other.key)
                if youngest.key < sequence.key or any(s.key > youngest.key for s in self.running.values()):
                    return False  # a younger one is in flight; its pages come free when it is back
                self._preempt(youngest)
        return sequence.key in self.running

    def _preempt(self, sequence: Sequence) -> None:
        self._set_back(sequence)
        self.preempted += 1

    def _set_back(self, sequence: Sequence) -> None:
        """Sends a running sequence back to its place in the queue; its KV will be computed again, its tokens stay."""
        del self.running[sequence.key]
        self._release(sequence)
        insort(self.waiting, sequence, key=lambda waiting: waiting.key)

    def _ready(self, ahead: bool) -> Iterable[Sequence]:
        """The running sequences that can take part in another step."""
        return (s for s in self.running.values() if not s.in_flight or (ahead and s.may_run_ahead()))

    def _take_off(self, spans: list[Span]) -> Batch:
        """The spans as a step that is in flight from now on."""
        follows = None
        for row, span in enumerate(spans):
            sequence = self.running[span.sequence] = self.running.pop(span.sequence)  # now the most recently scheduled
            if span.tokens[0] < 0:
                follows = sequence.flights[-1].step
            if span.start < sequence.reached:
                self.recomputed += min(span.stop, sequence.reached) - span.start
            sequence.take_off(Flight(self._step, row, span.stop, span.samples))
        return Batch(self._step, tuple(spans), follows)

    def _release(self, sequence: Sequence) -> None:
        self.pages.release(sequence.pages)
        sequence.fall_back()
        sequence.pages, sequence.cached = [], 0
