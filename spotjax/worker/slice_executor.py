"""Runs steps on one host of a TPU slice: all hosts start the same computations in the same order, in one thread each.

A computation over devices of several hosts waits in its collectives until all have started it, so the order is sacred:
what the leader put into it every host must go through, and whether a step is dropped must be decided at its place in
the order. A failure on one host cannot be made good on another; it ends the slice.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue

import jax
import numpy as np

from spotjax.protocol.steps import StepHeader, read_step, step_payload
from spotjax.runtime.buckets import StepShape
from spotjax.runtime.compiled import CompiledModel
from spotjax.runtime.stage import Stage
from spotjax.runtime.step import PackedStep
from spotjax.worker.executor import Failed, Send, StageExecutor
from spotjax.worker.watchdog import Watchdog

log = logging.getLogger(__name__)

Circulate = Callable[[StepHeader, tuple[memoryview, ...]], None]
"""Has the leader give a step of the next stage, which is in this slice, its turn. Called from any thread."""


class Gate:
    """A place in the order at which steps stop until it is opened."""

    def __init__(self) -> None:
        self._reached, self._opened = threading.Event(), threading.Event()

    def stop(self) -> None:
        """Called when its turn has come."""
        self._reached.set()
        self._opened.wait()

    def open(self) -> None:
        """Lets steps go on; may be repeated, and may come first."""
        self._opened.set()

    def wait(self) -> None:
        """Returns when all before it is dispatched."""
        self._reached.wait()

    async def reached(self) -> None:
        """The same without blocking."""
        await asyncio.to_thread(self._reached.wait)


class SliceExecutor(StageExecutor):
    """All stages of one host; see ``StageExecutor``.

    Args:
      circulate: see ``Circulate``.

    Attributes:
      thread: that starts all computations.
    """

    def __init__(
        self,
        name: str,
        model: CompiledModel,
        max_positions: int,
        send: Send,
        failed: Failed,
        watchdog: Watchdog,
        circulate: Circulate,
    ) -> None:
        super().__init__(name, model, max_positions, send, failed, watchdog)
        self._circulate = circulate
        self._order: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self.thread = threading.Thread(target=self._issue, name="issue", daemon=True)
        self.thread.start()

    def receive(self, header: StepHeader, payload: memoryview) -> None:
        """Puts a step into the order; returns at once."""
        self._order.put(partial(self._take_turn, header, payload))

    def gate(self) -> Gate:
        """Puts a gate into the order."""
        gate = Gate()
        self._order.put(gate.stop)
        return gate

    def settle(self) -> None:
        """Returns when all that is in the order so far is dispatched: whatever reads KV then finds what it writes."""
        gate = self.gate()
        gate.open()
        gate.wait()

    def end(self) -> None:
        """Ends the thread when all that is in the order has had its turn; nothing may be put into it afterwards."""
        self._order.put(None)

    def _issue(self) -> None:
        while (turn := self._order.get()) is not None:
            turn()

    def _take_turn(self, header: StepHeader, payload: memoryview) -> None:
        post = self._posts.get((header.pipeline, header.stage))
        if post is None:
            log.debug("step %d of pipeline %s has no stage here", header.step, header.pipeline)
            return
        width, dtype = self._model.spec.config.width, self._model.dtype
        packed, hidden = read_step(header, payload, width, self._max_positions, dtype)
        self._run(post, header, packed, hidden)

    def _hands_on(self, stage: Stage) -> bool:
        """Only the host of the stage's first device does."""
        return bool(stage.own[0] == stage.devices[0])

    def _submit(self, header: StepHeader, packed: PackedStep, hidden: np.ndarray | jax.Array | None) -> None:
        """The next stage is in this slice, on whichever hosts."""
        assert isinstance(hidden, jax.Array), "there is a stage before it"
        self._circulate(header, step_payload(packed, np.asarray(hidden.addressable_shards[0].data)))

    def _has(self, stage: Stage, want: StepShape | None) -> bool:
        """Hosts would not begin to use a whole stage's block at the same step."""
        return len(stage.own) == len(stage.devices) and super()._has(stage, want)
