"""The stages of one replica inside one process: a step is dispatched to all of them, then its one result array is read.

Dispatch is asynchronous, so stages work on different steps at the same time, and a step is dispatched while the one
that it follows still runs. Steps enter one after another, in a thread of their own; results are read in another.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import jax
import numpy as np

from spotjax.engine.batch import Batch, StepResult
from spotjax.errors import InstanceLost
from spotjax.runtime.buckets import Buckets, StepShape
from spotjax.runtime.compiled import CompiledModel
from spotjax.runtime.controls import spread_masks
from spotjax.runtime.drawing import draw
from spotjax.runtime.drawn import Drawn
from spotjax.runtime.stage import Stage
from spotjax.runtime.step import pack_step, step_shape, unpack_result
from spotjax.runtime.warmup import Step

RECENT_STEPS = 16


class LocalPipeline:
    """Runs batches through stages that live in this process; see ``engine.batch.Pipeline``.

    Args:
      model: compiled functions.
      buckets: shapes that steps are padded to.
      stages: in pipeline order.
      fuse: compile whole stages in the background and use them when ready.
    """

    def __init__(self, model: CompiledModel, buckets: Buckets, stages: Sequence[Stage], *, fuse: bool) -> None:
        self.stages = tuple(stages)
        self._model, self._buckets, self._fuse = model, buckets, fuse
        self.recent: deque[Step] = deque(maxlen=RECENT_STEPS)
        """What the last steps ran, oldest first; whoever goes on elsewhere will soon need the same."""
        self._drawn = Drawn(model, len(self.stages) + 1)
        self._entrance = ThreadPoolExecutor(1, thread_name_prefix="pipeline-in")
        self._exit = ThreadPoolExecutor(1, thread_name_prefix="pipeline-out")
        self._lost: str | None = None

    @property
    def depth(self) -> int:
        """Steps that may be in flight at once."""
        return len(self.stages)

    @property
    def ahead(self) -> bool:
        """What the last stage draws goes to the first without the host."""
        return True

    async def run(self, batch: Batch) -> StepResult:
        """Runs one batch.

        Raises:
          InstanceLost: ``lose`` was called before the result was read.
        """
        done: Future[StepResult] = Future()
        self._entrance.submit(self._enter, batch, done)
        return await asyncio.wrap_future(done)

    def _enter(self, batch: Batch, done: Future[StepResult]) -> None:
        with self._told(done):
            self._exit.submit(self._read, batch, self._dispatch(batch), done)

    def _read(self, batch: Batch, result: jax.Array, done: Future[StepResult]) -> None:
        with self._told(done):
            read = np.asarray(result)
            self._check_alive()
            done.set_result(unpack_result(batch, read))

    @contextmanager
    def _told(self, done: Future[StepResult]) -> Iterator[None]:
        """Whoever waits for the step is told what went wrong."""
        try:
            yield
        except Exception as problem:
            # jax raises one of several RuntimeErrors when a buffer is deleted under a running step
            lost = isinstance(problem, RuntimeError) and self._lost is not None
            done.set_exception(self._loss() if lost else problem)

    def lose(self, instance: str) -> None:
        """Makes every step that has not been read fail with InstanceLost."""
        self._lost = instance

    def close(self) -> None:
        """Ends the threads; no step may be in flight."""
        self._entrance.shutdown(wait=True)
        self._exit.shutdown(wait=True)

    def _check_alive(self) -> None:
        if self._lost is not None:
            raise self._loss()

    def _loss(self) -> InstanceLost:
        return InstanceLost(f"instance {self._lost} was lost during the step")

    def _dispatch(self, batch: Batch) -> jax.Array:
        """Starts the step on all stages and draws tokens from the logits; nothing is waited for."""
        self._check_alive()
        common = step_shape(batch, self._buckets, fine=False)
        step = pack_step(batch, self._buckets, self._fused_shape(batch, common) or common)
        rows: np.ndarray | jax.Array = step.rows
        if batch.follows is not None:
            rows = self._drawn.fill_in(step.rows, batch.follows, self.stages[0].devices[0])
        out: jax.Array | None = None
        for stage in self.stages:
            out = stage.run(step.shape, rows if stage.first else step.rows, step.pages, out)
        assert out is not None
        self.recent.append((common, step.variant, batch.masks is not None))
        logits = out.addressable_shards[0].data  # every shard holds all logits
        device = self.stages[-1].devices[0]
        # the masks are waited for here, while the devices compute the logits
        masks = spread_masks(batch.masks.result(), step.shape.rows) if batch.masks is not None else None
        result, tokens = draw(self._model, device, step, logits, masks)
        self._drawn.keep(batch.step, tokens)
        return result

    def _fused_shape(self, batch: Batch, common: StepShape) -> StepShape | None:
        """A close-fitting shape for decode steps once all stages are compiled whole for it; asks for that if not.

        Args:
          common: the shape compiled at boot that holds the batch.
        """
        if not self._fuse or common.span > 1:
            return None
        close = step_shape(batch, self._buckets, fine=True)
        ready = [stage.has_block(close) for stage in self.stages]  # a list: every stage is asked
        return close if all(ready) else None
