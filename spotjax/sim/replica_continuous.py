"""A replica with continuous batching, as ``engine.scheduler`` decides it, in simulated time. No event per token.

Between two events (a sequence ends, a prompt begins or comes back) sequences decode step after step and nothing is
decided, so that only these events are simulated (fast-forward). ``tests/sim`` compares the outcome to the real
scheduler, step by step.

What is approximated:
  - A step takes what sequences of the mean context take, in the middle of what is fast-forwarded.
  - Prompts that share a step take the time of one prompt of all their tokens, whatever shapes steps are padded to.
  - With P > 1 stages, micro-batches are not told apart: sequences are anywhere in the round of the micro-batches, and
    those behind a prompt in the pipeline wait until it is out (see ``_pipeline``). Waits between tokens are estimates.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Callable
from math import ceil, floor, inf

from spotjax.engine.scheduler import MOST_PREFILLS
from spotjax.sim.events import EventQueue
from spotjax.sim.replica import Progress
from spotjax.sim.replica_decoding import ROUNDING, DecodingSequences
from spotjax.sim.replica_prompts import Chunk, Prompts
from spotjax.sim.requests import RequestBook
from spotjax.sim.times import ReplicaTimes

LONGEST_SEGMENT = 256
"""Steps after which the mean context is looked at again."""


class ContinuousReplica:
    """One replica. A ``SimulatedReplica``.

    Args:
      times: how long prompts and steps take.
      max_batch: sequences that run at once at most; more where others' were taken over with their KV.
      pages: KV pages, page 0 included, which nobody gets.
      page_size: positions of a page.
      book: where outcomes go.
      queue: the clock.
      finished: told the number of every request that ended; may add and stop.
      prefill_tokens: positions of one prefill step.

    Attributes:
      load: sequences that wait or run; to be read only.
    """

    __slots__ = (
        "_adopted", "_allowance", "_at", "_book", "_decoding", "_event", "_finished", "_holding", "_max_batch",
        "_most_pages", "_page_size", "_pages", "_prefills", "_prompts", "_queue", "_stages", "_step", "_steps",
        "_times", "_until", "_waiting", "load",
    )  # fmt: skip

    def __init__(
        self,
        times: ReplicaTimes,
        max_batch: int,
        pages: int,
        page_size: int,
        book: RequestBook,
        queue: EventQueue,
        finished: Callable[[int], None] | None = None,
        prefill_tokens: int = 512,
    ) -> None:
        self._times, self._max_batch, self._pages, self._page_size = times, max_batch, pages - 1, page_size
        self._book, self._queue, self._finished = book, queue, finished
        self._stages = times.shape.stage
        self.load = 0
        self._event = 0  # number of the only event that is not out of date
        self._waiting: deque[int] = deque()
        self._prompts, self._decoding = Prompts(times, prefill_tokens, book), DecodingSequences(book)
        self._reset()

    def _reset(self) -> None:
        """Nothing runs."""
        self._prompts.clear()
        self._decoding.clear()
        self._adopted: list[int] = []  # decode from the next boundary on
        self._most_pages = 0  # of those that run, if all generate all their tokens
        self._prefills = 0  # prefill steps since the last decode step
        self._allowance = 0.0  # steps that others decode while a prefill step is in flight
        self._holding = False  # nobody decodes after ``_steps`` until ``_until``
        self._until = inf  # when the segment ends that began at ``_at``
        self._at = 0.0
        self._steps = 0.0  # of the segment
        self._step = 0.0  # seconds of each

    def add(self, request: int, computed: int = 0) -> None:
        """Queues a request, or takes it over at the next boundary if KV of its first positions is here and fits.

        Raises:
          ValueError: it needs more pages than there are.
        """
        most, pages = self._most(request), self._pages
        if most > pages:
            raise ValueError(
                f"request {request} needs {most} KV pages, the replica has {pages}: give it more or leave it out"
            )
        self.load += 1
        length = self._length(request)
        if computed and (self._most_pages + most <= pages or self._used() + self._needed(length) <= pages):
            self._most_pages += most
            self._compute(request, computed, length)
        else:
            self._waiting.append(request)
            if len(self._waiting) > 1 or self._running >= self._max_batch:
                return  # it has to wait for an event that comes anyway
        self._wake()

    def stop(self) -> list[Progress]:
        """Stops at the boundary that was passed last and gives up everything, oldest first; see ``Progress``.

        Positions of an unfinished prompt count as far as whole chunks of it, or what was here before, were computed.
        """
        self._catch_up()
        self._advance(self._whole_steps())
        given_up = [Progress(request, 0) for request in self._waiting]
        for sequence in self._decoding.heap:
            self._decoding.commit(sequence)
            given_up.append(Progress(sequence.request, self._length(sequence.request) - 1))
        given_up += [Progress(request, computed) for request, computed in self._prompts.computed()]
        given_up += [Progress(request, self._length(request) - 1) for request in self._adopted]
        self._event += 1
        self._waiting.clear()
        self.load = 0
        self._reset()
        return sorted(given_up)

    def remaining(self) -> list[tuple[int, int, int]]:
        """(Request, tokens to come, positions computed) of every sequence that runs, at this moment."""
        self._catch_up()
        steps, book = self._whole_steps(), self._book
        rows = list[tuple[int, int, int]]()
        for end, request, _ in self._decoding.heap:
            left = self._decoding.left(end, steps)
            rows.append((request, left, book.prompt[request] + book.output[request] - left - 1))
        others = self._prompts.computed()
        others += [(request, self._length(request) - 1) for request in self._adopted]
        return rows + [(request, book.output[request] - book.generated[request], there) for request, there in others]

    def boundary_seconds(self) -> float:
        """Until a step or a chunk of a prompt ends, 0 when nothing runs."""
        self._catch_up()
        if self._until == inf:
            return 0.0
        if self._holding:
            return self._until - self._queue.now
        return self._next_boundary(min(self._stages, len(self._decoding.heap)))[0] - self._queue.now

    def pause(self, seconds: float) -> None:
        """Nothing advances for so long."""
        self._catch_up()
        now = until = self._queue.now
        self._advance(self._whole_steps())
        if self._holding:
            until = self._until
            self._allowance += self._steps
        elif self._until < inf:
            until = self._at  # what is done of the step under way counts,
            self._prefills = MOST_PREFILLS  # and it comes before any prompt
        until = max(now, until + seconds)
        self._prompts.delay(seconds, until)
        self._hold(now, until)

    # What happens at boundaries

    def _boundary(self, event: int) -> None:
        """A segment ends: sequences end, come and go, and the next segment begins."""
        if event != self._event:
            return
        at, heap = self._until, self._decoding.heap
        if self._steps:
            self._advance(self._steps)
        back = self._prompts.take_back(at) if self._prompts.in_flight else ()
        ended = self._decoding.end(at) if heap and heap[0][0] <= self._decoding.steps + ROUNDING else []
        if back:
            self._take_back(back, ended)
        for request in ended:
            self._most_pages -= self._most(request)
        if self._waiting:
            self._admit()
        if self._adopted:
            for request in self._adopted:
                self._decoding.resume(request, at)
            self._adopted.clear()
        self._begin(at)
        if ended:
            self.load -= len(ended)
            if self._finished is not None:
                for request in ended:
                    self._finished(request)

    def _take_back(self, back: list[Chunk], ended: list[int]) -> None:
        """Chunks of prompts came out of the pipeline; the last one of a prompt gives a token."""
        book = self._book
        if self._prompts.steps and self._decoding.heap:
            self._allowance = 1 / min(self._stages, len(self._decoding.heap))
        for token_at, request, _, computed, wanted in back:
            if computed < wanted:
                self._compute(request, computed, wanted)
                continue
            self._decoding.first_token(request, token_at)
            left = book.output[request] - book.generated[request] - 1
            if left:
                self._decoding.add(request, left, token_at)
            else:
                book.finish[request] = book.last_token[request] = token_at
                book.generated[request] = book.output[request]
                ended.append(request)

    def _admit(self) -> None:
        """Lets waiting sequences in, in order, while there is room for all that they have to compute now."""
        waiting, pages = self._waiting, self._pages
        used = -1
        while waiting and self._running < self._max_batch:
            request = waiting[0]
            length = self._length(request)
            most = self._most(request)
            if self._most_pages + most > pages:
                used = self._used() if used < 0 else used
                if used + self._needed(length) > pages:
                    return
                used += self._needed(length)
            waiting.popleft()
            self._most_pages += most
            self._compute(request, 0, length)

    def _begin(self, at: float) -> None:
        """The next segment: a prefill step, or decode steps, in the order of ``engine.scheduler``."""
        decoding, prompts = self._decoding, self._prompts
        heap = decoding.heap
        if self._stages == 1:
            decode_first = heap and self._prefills and not (self._prefills < MOST_PREFILLS and self._starting())
            if prompts.queued and not decode_first:
                self._prefill(at)
                return
        elif prompts.queued or prompts.in_flight:
            self._pipeline(at)
            return
        if heap and self._most_pages > self._pages:
            self._make_room()
        if not heap:
            if prompts.queued:
                self._prefill(at)
            else:
                self._reset()
            return
        steps = heap[0][0] - decoding.steps
        if prompts.queued:
            steps = 1.0
        elif steps > LONGEST_SEGMENT:
            steps = LONGEST_SEGMENT
        if self._most_pages > self._pages:
            steps = self._steps_with_room(steps)
        self._step = step = self._times.step(len(heap), decoding.context(steps / 2))
        until = at + steps * step
        self._prefills, self._holding = 0, False
        self._at, self._steps, self._until = at, steps, until
        self._event += 1
        self._queue.at(until, self._boundary, self._event)

    def _starting(self) -> bool:
        """Whether more sequences are one prefill step from their next token than decode."""
        return self._prompts.near > len(self._decoding.heap)

    def _prefill(self, at: float) -> None:
        """A prefill step of a single stage: nobody decodes meanwhile."""
        self._prompts.begin(at)
        self._prefills += 1
        self._hold(at, self._prompts.next_back)

    def _pipeline(self, at: float) -> None:
        """Prompts in a pipeline of several stages: the next prefill step, if there is room for it, and what decodes.

        Half of the steps in flight are prefill steps while others decode, since the two alternate. The micro-batches
        that are ahead of a prefill step still come out: all but the one whose place it takes, or one between two of
        them. The others are stuck behind it, stage by stage, until it is out.
        """
        decoding, prompts, stages = self._decoding, self._prompts, self._stages
        heap = decoding.heap
        others = min(stages, len(heap))
        most = max(-(-stages // 2), stages - others) if others else stages
        if prompts.queued and prompts.steps < most and at >= prompts.entrance_free:
            if not prompts.steps and others:
                self._allowance = min(1.0, (stages - 1) / others)
            prompts.begin(at)
        until = prompts.next_back
        if prompts.queued and prompts.steps < most:
            until = min(until, prompts.entrance_free)
        steps = 0.0
        if heap and self._allowance > ROUNDING:
            self._step = step = self._times.step(len(heap), decoding.context(0.0))
            steps = min(self._allowance, (until - at) / step)
            left = heap[0][0] - decoding.steps
            if left <= steps:
                steps, until = left, at + left * step
            self._allowance -= steps
        self._hold(at, until, steps)

    # Parts of it

    @property
    def _running(self) -> int:
        prompts = self._prompts
        return len(self._decoding.heap) + len(prompts.queued) + len(prompts.in_flight) + len(self._adopted)

    def _length(self, request: int) -> int:
        return self._book.prompt[request] + self._book.generated[request]

    def _needed(self, positions: int) -> int:
        return -(-positions // self._page_size)

    def _most(self, request: int) -> int:
        """Pages that a request takes with its last token."""
        return -(-(self._book.prompt[request] + self._book.output[request] - 1) // self._page_size)

    def _compute(self, request: int, computed: int, length: int) -> None:
        """Missing positions of a sequence are computed; it decodes if that is one, which is the same."""
        if length - computed > 1:
            self._prompts.queued.append((request, computed, length))
        else:
            self._adopted.append(request)

    def _wake(self) -> None:
        """Somebody came: the segment ends at the next boundary."""
        now = self._queue.now
        if self._until == inf:
            self._hold(now, now)
            return
        if self._holding:
            until = max(now, self._prompts.entrance_free)
            if 1 < self._stages > len(self._decoding.heap) + self._prompts.steps and until < self._until:
                steps = min(self._steps, (until - self._at) / self._step) if self._steps else 0.0
                self._allowance += self._steps - steps
                self._hold(self._at, until, steps)
            return
        until, steps = self._next_boundary(self._stages)
        if until < self._until:
            self._until, self._steps = until, steps
            self._event += 1
            self._queue.at(until, self._boundary, self._event)

    def _hold(self, at: float, until: float, steps: float = 0.0) -> None:
        """The segment from ``at`` to ``until``: so many steps, then nobody decodes."""
        self._holding, self._at, self._until, self._steps = True, at, until, steps
        self._event += 1
        self._queue.at(until, self._boundary, self._event)

    def _catch_up(self) -> None:
        """Lets happen what happens now but was not called yet."""
        while self._until <= self._queue.now + ROUNDING * self._step:
            self._boundary(self._event)

    def _next_boundary(self, micro_batches: int) -> tuple[float, float]:
        """While sequences decode: when the next step of a micro-batch ends, and the segment's steps until then."""
        steps = (self._queue.now - self._at) / self._step
        if len(self._decoding.heap) >= micro_batches:  # else there is room for another step right now
            steps = min(self._steps, ceil(steps * micro_batches - ROUNDING) / micro_batches)
        return self._at + steps * self._step, steps

    def _whole_steps(self) -> float:
        """Steps of the segment that have ended by now; with several stages, a part of the micro-batches' next ones."""
        if not self._steps or self._until == inf:
            return 0.0
        steps = (self._queue.now - self._at) / self._step
        return min(self._steps, floor(steps + ROUNDING) if self._stages == 1 else steps)

    def _advance(self, steps: float) -> None:
        """So many steps of the segment are over."""
        if steps:
            self._decoding.advance(self._at, steps, self._step)
            self._at += steps * self._step
            self._steps -= steps

    # When there are fewer pages than all that run may come to need

    def _used(self, ahead: float = 0.0) -> int:
        """Pages taken now, or those that are needed once everybody has decoded so many steps more."""
        size = self._page_size
        taken = sum(-(-self._length(request) // size) for request in self._adopted)
        return taken + self._prompts.pages(size) + self._decoding.pages(size, ahead or self._whole_steps())

    def _make_room(self) -> None:
        """Preempts the youngest until all others have the pages for their next step."""
        while self._decoding.heap and self._used(1.0) > self._pages:
            latest = max(request for _, request, _ in self._decoding.heap)
            youngest = self._prompts.remove_youngest(latest)
            if youngest < 0:
                youngest = latest
                self._decoding.remove(youngest)
            self._most_pages -= self._most(youngest)
            insort(self._waiting, youngest)

    def _steps_with_room(self, steps: float) -> float:
        """The most steps for which there are pages, of so many; there are for one."""
        fit, most = 1, floor(steps)
        if most < 1 or self._used(steps) <= self._pages:
            return steps
        while most - fit > 1:
            middle = (fit + most) // 2
            if self._used(middle) <= self._pages:
                fit = middle
            else:
                most = middle
        return fit
