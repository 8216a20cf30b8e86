"""One replica whose stages are on workers: steps go to the first stage as frames, results come back from the last."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial

from spotjax.engine.batch import Batch, StepResult
from spotjax.engine.structure import Masks
from spotjax.errors import InstanceLost
from spotjax.protocol.steps import MaskHeader, ResultHeader, StepHeader, mask_payload, read_result, step_payload
from spotjax.runtime.buckets import Buckets, StepShape
from spotjax.runtime.controls import Variant, variant_for
from spotjax.runtime.step import pack_step, step_shape, unpack_result

RECENT_STEPS = 16

Send = Callable[[str, StepHeader | MaskHeader, Sequence[memoryview]], None]
"""Sends a frame to an instance; what goes wrong is told to the cluster, which loses the instance for it."""


class RemotePipeline:
    """Runs batches on workers; see ``engine.batch.Pipeline``. For the event loop's thread only.

    Args:
      name: unique among all pipelines ever; contains the epoch.
      instances: of every stage, in order.
      buckets: shapes that steps are padded to.
      send: to an instance with one of its stages.
      fuse: ask stages to compile close-fitting shapes in the background, and use them when all have.

    Attributes:
      recent: what the last steps ran, at the shapes compiled at boot; whoever goes on will soon need the same.
    """

    def __init__(self, name: str, instances: Sequence[str], buckets: Buckets, send: Send, *, fuse: bool) -> None:
        self.name, self.instances = name, tuple(instances)
        self.recent: deque[tuple[StepShape, Variant, bool]] = deque(maxlen=RECENT_STEPS)
        self._buckets, self._send, self._fuse = buckets, send, fuse
        self._ready: set[StepShape] = set()
        self._running: dict[int, tuple[Batch, StepShape | None, asyncio.Future[StepResult]]] = {}
        self._lost: str | None = None

    @property
    def depth(self) -> int:
        """Steps that may be in flight at once: one for each stage."""
        return len(self.instances)

    @property
    def ahead(self) -> bool:
        """What is drawn stays on the worker that drew it, so that must be the one that needs it."""
        return len(self.instances) == 1

    async def run(self, batch: Batch) -> StepResult:
        """Runs one batch.

        Raises:
          InstanceLost: an instance of the replica was lost before the result was here.
        """
        if self._lost is not None:
            raise InstanceLost(self._lost)
        shape, want = self._shape(batch)
        packed = pack_step(batch, self._buckets, shape)
        result: asyncio.Future[StepResult] = asyncio.get_running_loop().create_future()
        self._running[batch.step] = batch, want, result
        sequences = tuple(span.sequence for span in batch.spans)
        header = StepHeader(
            self.name, batch.step, 0, shape, packed.variant, sequences, want, want is not None, batch.follows,
            batch.masks is not None,
        )  # fmt: skip
        try:
            self._send(self.instances[0], header, step_payload(packed, None))
            if batch.masks is not None:  # also if nobody waits any more: the step does until they come
                send, loop = partial(self._send_masks, batch.step, result), result.get_loop()
                batch.masks.add_done_callback(lambda masks: loop.call_soon_threadsafe(send, masks))
            return await result
        finally:
            del self._running[batch.step]

    def receive(self, header: ResultHeader, payload: memoryview) -> None:
        """A result has come; one that nobody waits for is dropped."""
        if header.step not in self._running:
            return
        batch, want, result = self._running[header.step]
        if want is not None and header.ready:
            self._ready.add(want)
        if not result.done():
            result.set_result(unpack_result(batch, read_result(header, payload)))

    def _send_masks(self, step: int, result: asyncio.Future[StepResult], computed: Future[Masks]) -> None:
        """Masks go to the last stage by themselves: it needs them only when the step has come through all."""
        if (problem := computed.exception()) is None:
            masks = computed.result()
            header = MaskHeader(self.name, step, masks.rows)
            self._send(self.instances[-1], header, mask_payload(masks.words))
        elif not result.done():
            result.set_exception(problem)

    def lose(self, why: str) -> None:
        """Makes every step that has not come back, and every later one, fail with InstanceLost."""
        self._lost = why
        for _, _, result in self._running.values():
            if not result.done():
                result.set_exception(InstanceLost(why))

    def _shape(self, batch: Batch) -> tuple[StepShape, StepShape | None]:
        """The shape to run at, and the one that stages should get ready.

        A close-fitting one for decode steps once it is compiled on all stages, else one compiled at boot.
        """
        common = step_shape(batch, self._buckets, fine=False)
        states = [span.state.sampling for span in batch.spans if span.samples]
        self.recent.append((common, variant_for(states), batch.masks is not None))
        if not self._fuse or common.span > 1:
            return common, None
        close = step_shape(batch, self._buckets, fine=True)
        return (close, None) if close in self._ready else (common, close)
