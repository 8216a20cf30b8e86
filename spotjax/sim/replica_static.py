"""A replica as SpotServe's artifact runs it: static batches, decided at batch boundaries only (Miao et al. 2024, 4.1).

A batch takes the largest power of two of the requests that wait here, all of it starts and ends together, and nothing
joins. When the mesh is about to change, the replica is told a time by which to be done and decides before every batch
how many steps of it fit: all, some (the batch is parked there), or none. Times are the artifact's own formula.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Sequence
from math import inf, nan
from typing import NamedTuple

from spotjax.planner.published import powers_of_two, published_phases
from spotjax.planner.published_tables import Table
from spotjax.sim.events import EventQueue
from spotjax.sim.requests import RequestBook

CONSERVATIVE, GENEROUS = 1.0, 1 / 1.1**2
"""Factors on times when steps are counted before something goes, and before something comes.

The artifact then multiplies its profile by the final factor, 1.1 in all of its tables, or divides by it; in
``StaticTimes`` it is multiplied in.
"""


class StaticTimes:
    """Seconds of one static batch, by the artifact's formula for a pipeline of P stages of M devices.

    Args:
      table: per-layer times.
      stages, tensor: P and M.
      micro_batches: (M1, M2), numbers of micro-batches of prompts and of decode steps, where they divide the batch.
      scale: everything takes so many times what the formula says.
    """

    def __init__(self, table: Table, stages: int, tensor: int, micro_batches: tuple[int, int], scale: float) -> None:
        self._scale = scale
        self._phases = {
            batch: published_phases(table, stages, tensor, batch, *(m if batch % m == 0 else 1 for m in micro_batches))
            for batch in powers_of_two(8)
        }

    def prompt(self, batch: int) -> float:
        """Until the first tokens of a batch."""
        return self._phases[batch][0] * self._scale

    def step(self, batch: int) -> float:
        """Between two tokens."""
        return self._phases[batch][1] * self._scale


class Parked(NamedTuple):
    """A batch that was stopped in the middle: its requests, and the tokens that each has."""

    requests: tuple[int, ...]
    steps: int


class StaticReplica:
    """One replica; ``changed`` is called whenever it has room for more, ``stopped`` once when it was told to end.

    Args:
      times: of its shape.
      batch: B, most sequences of a batch.
      book, queue: what it writes into, and the clock.
      changed: called when a batch has ended.
    """

    def __init__(
        self, times: StaticTimes, batch: int, book: RequestBook, queue: EventQueue, changed: Callable[[], None]
    ) -> None:
        self.batch = batch
        self.pool = 0
        """Requests that wait or run here."""
        self.ended = False
        """It takes no more requests."""
        self._times, self._book, self._queue, self._changed = times, book, queue, changed
        self._waiting: list[tuple[float, int]] = []
        self._running: Parked | None = None
        self._began = self._step = 0.0
        self._generation = 0
        self._until = inf
        self._caution = CONSERVATIVE
        self._stopped: Callable[[Parked | None, list[int]], None] | None = None

    def add_all(self, requests: Sequence[int]) -> None:
        """Queues requests; they run with the next batch."""
        for request in requests:
            insort(self._waiting, (self._book.arrival[request], request))
        self.pool += len(requests)
        if self._running is None:
            self._next()

    def resume(self, parked: Parked) -> None:
        """Goes on with a batch that was parked, with its KV. The replica must be new."""
        self.pool += len(parked.requests)
        self._run(parked, with_prompt=False, steps=self._left(parked))

    def stop_by(self, seconds: float, caution: float, stopped: Callable[[Parked | None, list[int]], None]) -> None:
        """Is done by then, as far as whole batches or steps fit; then says what was parked and who still waits.

        One that has ended says so at once.
        """
        if self.ended:
            stopped(None, [])
            return
        self._until, self._caution, self._stopped = seconds, caution, stopped
        if self._running is None:
            self._next()

    def kill(self) -> list[int]:
        """Gone at once. Returns its requests, oldest first; who waits for its end is told that it has come."""
        self.commit()
        running = () if self._running is None else self._running.requests
        lost = sorted([*running, *(request for _, request in self._waiting)])
        self._running, self._waiting = None, []
        self._end(None)
        return lost

    def commit(self) -> None:
        """Writes down the tokens that have come of the batch that runs, for when it ends in the middle."""
        if self._running is None:
            return
        batch, book = self._running, self._book
        steps = max(0, int((self._queue.now - self._began) / self._step))
        for request in batch.requests:
            got = min(batch.steps + steps, book.output[request])
            if got > batch.steps:
                book.generated[request] = got
                book.last_token[request] = self._began + (got - batch.steps) * self._step
            elif book.first_token[request] > self._queue.now:
                book.first_token[request] = nan

    def _next(self) -> None:
        """A batch boundary: runs the next batch, or some of it, or ends."""
        left = self._until - self._queue.now
        least = self._times.prompt(1) * CONSERVATIVE  # whatever the caution
        if left <= least:
            self._end(None)
            return
        if not self._waiting:
            if left < inf:  # nothing to do; looks again when nothing can be begun any more
                self._queue.at(self._until - least, self._idle, self._generation)
            return
        size = max(power for power in powers_of_two(self.batch) if power <= len(self._waiting))
        steps = self._left_steps(left, size)
        batch = Parked(tuple(request for _, request in self._waiting[:size]), 0)
        full = self._left(batch)
        if steps == 0:
            self._end(None)
            return
        del self._waiting[:size]
        self._run(batch, with_prompt=True, steps=min(steps, full))

    def _left_steps(self, left: float, size: int) -> int:
        """Steps of a batch that fit, by the artifact's rule."""
        if left == inf:
            return 1 << 30
        prompt, step = (seconds * self._caution for seconds in (self._times.prompt(size), self._times.step(size)))
        return max(0, int((left - prompt) / step) + (1 if self._caution < CONSERVATIVE else -1))

    def _left(self, batch: Parked) -> int:
        return max(self._book.output[request] for request in batch.requests) - batch.steps

    def _run(self, batch: Parked, *, with_prompt: bool, steps: int) -> None:
        size = min(power for power in powers_of_two(self.batch) if power >= len(batch.requests))
        prompt = self._times.prompt(size) if with_prompt else 0.0
        step = self._times.step(size)
        self._running, self._began, self._step = batch, self._queue.now + prompt, step
        self._generation += 1
        for request in batch.requests:
            if with_prompt and self._book.first_token[request] != self._book.first_token[request]:  # nan
                self._book.first_token[request] = self._queue.now + prompt + step
            self._book.wait(request, self._queue.now + prompt + step)
            self._book.wait(request, step, 0.0)
        self._queue.at(self._queue.now + prompt + steps * step, self._ended, self._generation, steps)

    def _ended(self, generation: int, steps: int) -> None:
        """The batch has run its steps."""
        if generation != self._generation or self._running is None:
            return
        batch, self._running = Parked(self._running.requests, self._running.steps + steps), None
        now, book = self._queue.now, self._book
        for request in batch.requests:
            book.generated[request], book.last_token[request] = min(batch.steps, book.output[request]), now
            if batch.steps >= book.output[request]:
                book.finish[request] = now
        going_on = Parked(tuple(r for r in batch.requests if batch.steps < book.output[r]), batch.steps)
        self.pool -= len(batch.requests) - len(going_on.requests)
        if going_on.requests:
            self._end(going_on)
        else:
            self._next()  # what waits here begins before more can come
            self._changed()

    def _idle(self, generation: int) -> None:
        if generation == self._generation and self._running is None:
            self._end(None)

    def _end(self, parked: Parked | None) -> None:
        """Tells what is left, once."""
        stopped, self._stopped, self.ended = self._stopped, None, True
        waiting = [request for _, request in self._waiting]
        self._waiting, self.pool = [], 0
        self._generation += 1
        if stopped is not None:
            stopped(parked, waiting)
