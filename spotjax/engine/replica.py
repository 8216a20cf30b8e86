"""The loop of one replica: schedule, run, commit, with as many steps in flight as the pipeline has stages.

And one more, where steps may follow those that have not come back: so no stage ever waits for this loop. Steps are
committed in the order in which they were scheduled. What is committed is delivered once the log has it, which the next
step does not wait for.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from spotjax.engine.batch import Batch, Pipeline, StepResult
from spotjax.engine.commit_log import CommitLog
from spotjax.engine.observer import EngineObserver, Unobserved
from spotjax.engine.request import FinishReason, RequestState, Sampled
from spotjax.engine.scheduler import Scheduler
from spotjax.engine.sequence import Sequence as ScheduledSequence
from spotjax.engine.step_times import StepTimes
from spotjax.engine.structure import Guide, GuidedRow, StructureFailed
from spotjax.engine.text import Detokenizer, advance
from spotjax.errors import InstanceLost

log = logging.getLogger(__name__)

Deliver = Callable[[Sequence[RequestState]], None]


@dataclass(frozen=True, slots=True, eq=False)
class _Step:
    """A step in flight, since some time on the clock."""

    batch: Batch
    started: float
    result: asyncio.Task[StepResult]


class Replica:
    """Drives one scheduler over one pipeline until it is stopped or an instance is lost.

    Args:
      scheduler: what to run next.
      pipeline: runs it.
      log: where tokens are committed.
      detokenizer: for text and stop texts.
      deliver: called with new states once they are recorded.
      clock: monotonic seconds.
      observer: is told about steps.
      guide: keeps sequences to their structures; None where there are no such sequences.

    Attributes:
      step_times: of the steps that came back.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        pipeline: Pipeline,
        log: CommitLog,
        detokenizer: Detokenizer,
        deliver: Deliver,
        clock: Callable[[], float] = time.monotonic,
        observer: EngineObserver | None = None,
        guide: Guide | None = None,
    ) -> None:
        self.scheduler, self.pipeline, self.step_times = scheduler, pipeline, StepTimes()
        self.lost = False
        """Whether an instance of the replica is gone; its KV is of no use then."""
        self._log, self._detokenizer, self._deliver, self._clock = log, detokenizer, deliver, clock
        self._observer: EngineObserver = observer or Unobserved()
        self._guide = guide
        self._wake = asyncio.Event()
        self._stopping = False
        self._most = pipeline.depth + pipeline.ahead
        self._back: deque[float] = deque(maxlen=pipeline.depth)
        """When the last steps came back: of so many before it, a step waits for the first."""

    @property
    def stopping(self) -> bool:
        """Whether the loop ends, or has ended, at a token boundary."""
        return self._stopping

    def wake(self) -> None:
        """Tells the loop that there may be something new to schedule."""
        self._wake.set()

    def stop(self) -> None:
        """Schedules nothing more; ``run`` returns at the token boundary, when all steps in flight are committed."""
        self._stopping = True
        self._wake.set()

    async def run(self) -> None:
        """Steps until stopped; returns early, with ``lost`` set, when an instance is lost. Other errors are raised."""
        in_flight: deque[_Step] = deque()
        try:
            await self._run(in_flight)
        finally:
            for step in in_flight:
                step.result.cancel()

    async def _run(self, in_flight: deque[_Step]) -> None:
        while True:
            self._wake.clear()
            while len(in_flight) < self._most and not self._stopping:
                batch, now = self.scheduler.schedule(ahead=self.pipeline.ahead), self._clock()
                for sequence in self.scheduler.entered:
                    self._observer.begun(sequence.state, now)
                if batch is None:
                    break
                batch = self._guided(batch)
                in_flight.append(_Step(batch, now, asyncio.create_task(self.pipeline.run(batch))))
            if in_flight:
                await self._progress(in_flight)
            elif self._stopping:
                return
            else:
                await self._wake.wait()

    async def _progress(self, in_flight: deque[_Step]) -> None:
        """Waits for the oldest step to come back and commits it, or for something new while there is room for it."""
        oldest = in_flight[0].result
        if len(in_flight) < self._most and not self._stopping:
            woken = asyncio.create_task(self._wake.wait())
            await asyncio.wait((oldest, woken), return_when=asyncio.FIRST_COMPLETED)
            woken.cancel()
        else:
            await asyncio.wait((oldest,))
        if oldest.done():
            self._take(in_flight.popleft())

    def _take(self, step: _Step) -> None:
        """Commits a step that is back. What a lost instance computed is dropped, and all that came after it."""
        try:
            result = step.result.result()
        except InstanceLost:
            self.lost = True
            self.stop()
        if self.lost:
            return
        back = self._time(step)
        running, failed = self.scheduler.running, step.batch.masks.result().failed if step.batch.masks else {}
        states = {
            sequence.key: self._advanced(sequence, result.sampled[sequence.key], failed.get(row))
            for row, span in enumerate(step.batch.spans)
            if span.samples and (sequence := running.get(span.sequence)) is not None and sequence.cancelled is None
        }
        ended = self.scheduler.commit(step.batch, states)
        for sequence in ended:
            sequence.matcher = None  # states of ended sequences are kept for a while
        cancelled = [sequence.state for sequence in ended if sequence.key not in states]
        committed = (*states.values(), *cancelled)
        if committed:
            self._log.append(committed, partial(self._recorded, committed, back))

    def _guided(self, batch: Batch) -> Batch:
        """The batch, and what its rows with a structure may draw, which is computed from now on."""
        rows = {}
        for row, span in enumerate(batch.spans):
            sampling = span.state.sampling
            if span.samples and sampling.structure is not None:
                assert self._guide is not None, "a request with a structure is refused where nothing can keep to it"
                sequence = self.scheduler.running[span.sequence]
                if sequence.matcher is None:
                    sequence.matcher = self._guide.matcher(sampling.structure, ends=not sampling.ignore_eos)
                rows[row] = GuidedRow(sequence.matcher, span.state.tokens)
        return replace(batch, masks=self._guide.masks(rows)) if self._guide is not None and rows else batch

    def _advanced(self, sequence: ScheduledSequence, sampled: Sampled, problem: str | None) -> RequestState:
        """The sequence one token further, or ended where its structure cannot be followed."""
        state, complete = sequence.state, False
        if sequence.matcher is not None and problem is None:
            try:
                complete = sequence.matcher.completed_by(state.tokens, sampled.token)
            except StructureFailed as failure:
                problem = str(failure)
        if problem is not None:
            log.error("request %s: its structure cannot be followed: %s", state.request_id, problem)
            return state.finished(FinishReason.ERROR)
        return advance(state, sampled, self._detokenizer, complete=complete)

    def _recorded(self, states: Sequence[RequestState], since: float) -> None:
        """The log has what a step came to that came back at that time."""
        self._observer.recorded(self._clock() - since)
        self._deliver(states)

    def _time(self, step: _Step) -> float:
        """Notes how long a step took: by itself, and until it was back. Returns: when that is, now."""
        now, whole = self._clock(), len(self._back) == self._back.maxlen
        begun = max(step.started, self._back[0]) if whole else step.started
        self._back.append(now)
        self.step_times.add(now - begun, now - step.started)
        self._observer.stepped(len(step.batch.spans[0].tokens) > 1, now - begun)
        return now
