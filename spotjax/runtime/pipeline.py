"""The stages of one replica inside one process: a step is dispatched to all of them, then its one result array is read.

Dispatch is asynchronous, so stages work on different steps at the same time. Steps enter one after another (a lock);
each step's reader waits in a thread of its own.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from spotjax.engine.batch import Batch, Span, StepResult
from spotjax.engine.request import RequestState
from spotjax.errors import InstanceLost
from spotjax.runtime.buckets import Buckets, StepShape
from spotjax.runtime.compiled import CompiledModel
from spotjax.runtime.sampling import pack_controls, unpack, variant_for
from spotjax.runtime.stage import Stage
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
        self._entry = threading.Lock()
        self._threads = ThreadPoolExecutor(len(self.stages), thread_name_prefix="pipeline")
        self._lost: str | None = None

    @property
    def depth(self) -> int:
        """Steps that may be in flight at once."""
        return len(self.stages)

    async def run(self, batch: Batch) -> StepResult:
        """Runs one batch.

        Raises:
          InstanceLost: ``lose`` was called before the result was read.
        """
        return await asyncio.get_running_loop().run_in_executor(self._threads, self.execute, batch)

    def execute(self, batch: Batch) -> StepResult:
        """The same, blocking."""
        try:
            with self._entry:
                result = self._dispatch(batch)
            read = np.asarray(result)
        except RuntimeError:
            # jax raises one of several RuntimeErrors when a buffer is deleted under a running step
            self._check_alive()
            raise
        self._check_alive()
        states = _sampling_states(batch.spans)
        sampled = unpack(read, states)
        return StepResult(
            batch.step,
            {span.sequence: token for span, token in zip(batch.spans, sampled, strict=False) if token is not None},
        )

    def lose(self, instance: str) -> None:
        """Makes every step that has not been read fail with InstanceLost."""
        self._lost = instance

    def close(self) -> None:
        """Ends the threads; no step may be in flight."""
        self._threads.shutdown(wait=True)

    def _check_alive(self) -> None:
        if self._lost is not None:
            raise InstanceLost(f"instance {self._lost} was lost during the step")

    def _dispatch(self, batch: Batch) -> jax.Array:
        """Starts the step on all stages and draws tokens from the logits; nothing is waited for."""
        self._check_alive()
        shape = self._shape(batch.spans)
        rows, pages = _pack(batch.spans, shape)
        out: jax.Array | None = None
        for stage in self.stages:
            out = stage.run(shape, rows, pages, out)
        assert out is not None
        states = _sampling_states(batch.spans)
        variant = variant_for([state.sampling for state in states if state is not None])
        self.recent.append((self._buckets.shape(*_extents(batch.spans)), variant))
        padded = [*states, *[None] * (shape.rows - len(states))]
        controls = pack_controls(padded, variant, self._buckets.max_positions)
        logits = out.addressable_shards[0].data  # every shard holds all logits
        device = self.stages[-1].devices[0]
        drawn: jax.Array = self._model.sample(device, variant, shape.rows)(logits, jax.device_put(controls, device))
        return drawn

    def _shape(self, spans: Sequence[Span]) -> StepShape:
        """A close-fitting shape for decode steps once it is compiled for whole stages, else one compiled at boot."""
        extents = _extents(spans)
        if self._fuse and extents[1] == 1:
            close = self._buckets.shape(*extents, fine=True)
            ready = [stage.has_block(close) for stage in self.stages]  # a list: every stage is asked
            if all(ready):
                return close
        return self._buckets.shape(*extents)


def _extents(spans: Sequence[Span]) -> tuple[int, int, int]:
    """Rows, positions per row and pages per row of a step before padding."""
    return len(spans), max(len(span.tokens) for span in spans), max(len(span.pages) for span in spans)


def _pack(spans: Sequence[Span], shape: StepShape) -> tuple[np.ndarray, np.ndarray]:
    """The padded step input, see ``kv.StepInput``."""
    rows = np.zeros((shape.rows, 2 + shape.span), np.int32)
    pages = np.zeros((shape.rows, shape.pages), np.int32)
    for row, span in enumerate(spans):
        rows[row, : 2 + len(span.tokens)] = (span.start, len(span.tokens), *span.tokens)
        pages[row, : len(span.pages)] = span.pages
    return rows, pages


def _sampling_states(spans: Sequence[Span]) -> list[RequestState | None]:
    return [span.state if span.samples else None for span in spans]
