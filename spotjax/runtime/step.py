"""A batch as the host arrays that one step runs on, and its one result array as the batch's result. Imports no jax."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from spotjax.engine.batch import Batch, Span, StepResult
from spotjax.engine.request import RequestState
from spotjax.runtime.buckets import Buckets, StepShape
from spotjax.runtime.controls import Variant, pack_controls, unpack, variant_for


@dataclass(frozen=True, slots=True, eq=False)
class PackedStep:
    """All that the stages of a replica are told about one step.

    Attributes:
      shape: padded extents.
      variant: how tokens are drawn.
      rows: (B, 2 + T) int32, see ``kv.StepInput``; of a step that follows another ``sampling.fill_in``.
      pages: (B, N) int32, see ``kv.StepInput``.
      controls: (B, C) int32, see ``controls.pack_controls``.
    """

    shape: StepShape
    variant: Variant
    rows: np.ndarray
    pages: np.ndarray
    controls: np.ndarray


def step_shape(batch: Batch, buckets: Buckets, fine: bool) -> StepShape:
    """The smallest shape that holds the batch: one compiled at boot, or a ``fine`` one, compiled when used.

    Raises:
      ValueError: no shape is large enough; the scheduler never asks for that.
    """
    spans = batch.spans
    rows, span, pages = len(spans), max(len(s.tokens) for s in spans), max(len(s.pages) for s in spans)
    return buckets.shape(rows, span, pages, fine)


def pack_step(batch: Batch, buckets: Buckets, shape: StepShape) -> PackedStep:
    """Pads a batch to ``shape``, which must hold it, see ``step_shape``."""
    rows = np.zeros((shape.rows, 2 + shape.span), np.int32)
    pages = np.zeros((shape.rows, shape.pages), np.int32)
    for row, span in enumerate(batch.spans):
        rows[row, : 2 + len(span.tokens)] = (span.start, len(span.tokens), *span.tokens)
        pages[row, : len(span.pages)] = span.pages
    states = _sampling_states(batch.spans)
    variant = variant_for([state.sampling for state in states if state is not None])
    padded, stops = [*states, *[None] * (shape.rows - len(states))], [span.stop for span in batch.spans]
    controls = pack_controls(padded, variant, buckets.max_positions, stops)
    return PackedStep(shape, variant, rows, pages, controls)


def unpack_result(batch: Batch, result: np.ndarray) -> StepResult:
    """Reads the (B, R) int32 array that ``sampling.sample`` returned for the batch; padding rows are passed over."""
    sampled = unpack(result, _sampling_states(batch.spans))
    tokens = {span.sequence: token for span, token in zip(batch.spans, sampled, strict=True) if token is not None}
    return StepResult(batch.step, tokens)


def _sampling_states(spans: Sequence[Span]) -> list[RequestState | None]:
    """The sequence of every row that draws a token."""
    return [span.state if span.samples else None for span in spans]
