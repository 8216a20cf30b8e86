"""The loop of one replica: schedule, run, commit, with as many steps in flight as the pipeline has stages.

What is committed is delivered once the log has it, which the next step does not wait for.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from functools import partial

from spotjax.engine.batch import Batch, Pipeline
from spotjax.engine.commit_log import CommitLog
from spotjax.engine.request import RequestState
from spotjax.engine.scheduler import Scheduler
from spotjax.engine.step_times import StepTimes
from spotjax.engine.text import Detokenizer, advance
from spotjax.errors import InstanceLost

Deliver = Callable[[Sequence[RequestState]], None]


class Replica:
    """Drives one scheduler over one pipeline until it is stopped or an instance is lost.

    Args:
      scheduler: what to run next.
      pipeline: runs it.
      log: where tokens are committed.
      detokenizer: for text and stop texts.
      deliver: called with new states once they are recorded.
      clock: monotonic seconds.

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
    ) -> None:
        self.scheduler, self.pipeline, self.step_times = scheduler, pipeline, StepTimes()
        self.lost = False
        """Whether an instance of the replica is gone; its KV is of no use then."""
        self._log, self._detokenizer, self._deliver, self._clock = log, detokenizer, deliver, clock
        self._wake = asyncio.Event()
        self._stopping = False

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
        in_flight: set[asyncio.Task[None]] = set()
        while True:
            self._wake.clear()
            while len(in_flight) < self.pipeline.depth and not self._stopping:
                batch = self.scheduler.schedule()
                if batch is None:
                    break
                in_flight.add(asyncio.create_task(self._step(batch)))
            if in_flight:
                in_flight = await self._progress(in_flight)
            elif self._stopping:
                return
            else:
                await self._wake.wait()

    async def _progress(self, in_flight: set[asyncio.Task[None]]) -> set[asyncio.Task[None]]:
        """Waits for a step to come back, or for something new while there is room for it. Returns those in flight."""
        waiting = set(in_flight)
        if len(in_flight) < self.pipeline.depth and not self._stopping:
            waiting.add(asyncio.create_task(self._woken()))
        done, pending = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for task in waiting - in_flight:
            task.cancel()
        for step in done:
            step.result()
        return pending & in_flight

    async def _woken(self) -> None:
        await self._wake.wait()

    async def _step(self, batch: Batch) -> None:
        """One decoding step: run, commit. What a lost instance computed is dropped, never committed."""
        started = self._clock()
        try:
            result = await self.pipeline.run(batch)
        except InstanceLost:
            self.lost = True
            self.stop()
            return
        self.step_times.add(self._clock() - started)
        states = {
            span.sequence: advance(span.state, result.sampled[span.sequence], self._detokenizer)
            for span in batch.spans
            if span.samples and self.scheduler.running[span.sequence].cancelled is None
        }
        ended = self.scheduler.commit(batch, states)
        cancelled = [sequence.state for sequence in ended if sequence.key not in states]
        committed = (*states.values(), *cancelled)
        if committed:
            self._log.append(committed, partial(self._deliver, committed))
