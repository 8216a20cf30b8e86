"""Steps as they arrive at workers."""

from __future__ import annotations

from collections.abc import Sequence

from serving_cases import BUCKETS, greedy

from spotjax.engine.batch import Batch, Span
from spotjax.protocol.steps import StepHeader, step_payload
from spotjax.runtime.step import pack_step, step_shape


def whole(payload: Sequence[memoryview]) -> memoryview:
    """A payload as it arrives: in fresh memory."""
    return memoryview(b"".join(payload))


def prefill(step: int, prompt: Sequence[int] = (1, 5, 9, 2)) -> Batch:
    return Batch(step, (Span(3, tuple(prompt), 0, (1,), greedy(prompt, 4), True),))


def frame(pipeline: str, batch: Batch, stage: int = 0) -> tuple[StepHeader, memoryview]:
    shape = step_shape(batch, BUCKETS, fine=False)
    packed = pack_step(batch, BUCKETS, shape)
    keys = tuple(span.sequence for span in batch.spans)
    header = StepHeader(pipeline, batch.step, stage, shape, packed.variant, keys, None, ready=False)
    return header, whole(step_payload(packed, None))
