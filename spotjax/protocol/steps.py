"""The frames of a step on the data plane: controller -> first stage -> ... -> last stage -> controller.

Headers are small messages; arrays travel beside them as payload, in native byte order, each padded to 64 bytes so that
they can be used where they arrived. Who sends what when is not decided here. Imports no jax.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate

import msgspec
import numpy as np

from spotjax.engine.structure import Masks
from spotjax.runtime.buckets import StepShape
from spotjax.runtime.controls import Variant, controls_width, mask_words
from spotjax.runtime.step import PackedStep

ALIGNMENT = 64
"""Bytes; devices read host arrays that begin at a multiple of this without copying them."""
PADDING = memoryview(bytes(ALIGNMENT))
INT32 = np.dtype(np.int32)


class StepHeader(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """One step for one stage; the payload is ``step_payload``.

    Attributes:
      pipeline: id of the replica's pipeline, which contains the epoch.
      step: number of the batch.
      stage: the stage that is to run it, from 0.
      shape: padded extents.
      variant: how tokens are drawn.
      sequences: keys of the sequences of the real rows, in order.
      want: a close-fitting shape that stages should get ready in the background.
      ready: whether all stages so far have ``want`` ready.
      follows: the step that draws tokens which the rows lack, see ``sampling.fill_in``; None if they lack none.
      masked: whether ``MaskHeader`` says, to the last stage, what some rows may draw.
    """

    pipeline: str
    step: int
    stage: int
    shape: StepShape
    variant: Variant
    sequences: tuple[int, ...]
    want: StepShape | None
    ready: bool
    follows: int | None = None
    masked: bool = False


class MaskHeader(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Which tokens rows of a step may draw, straight to its last stage; the payload is ``mask_payload``.

    Attributes:
      pipeline, step: as in the step's ``StepHeader``.
      rows: that have a structure; the others may draw any.
    """

    pipeline: str
    step: int
    rows: tuple[int, ...]


class ResultHeader(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """What the last stage drew; the payload is ``result_payload``.

    Attributes:
      pipeline, step: as in the step's ``StepHeader``.
      rows, columns: extents of the result array.
      ready: whether all stages have the step's ``want`` ready.
    """

    pipeline: str
    step: int
    rows: int
    columns: int
    ready: bool


def step_payload(packed: PackedStep, hidden: np.ndarray | None) -> tuple[memoryview, ...]:
    """Bytes of rows, pages, controls and, after the first stage, ``hidden`` (B, T, D); arrays are not copied."""
    arrays = (packed.rows, packed.pages, packed.controls)
    return tuple(_pieces(arrays if hidden is None else (*arrays, hidden)))


def read_step(
    header: StepHeader, payload: memoryview, width: int, max_positions: int, dtype: np.dtype
) -> tuple[PackedStep, np.ndarray | None]:
    """Takes a step's payload apart without copying: the arrays are views into it.

    Args:
      header: came with the payload.
      payload: bytes; the arrays are as well aligned as its start is.
      width: D of the model.
      max_positions: longest sequence.
      dtype: of activations.

    Returns: the step, and the hidden vectors (B, T, D) that the stage before computed, None at the first stage.

    Raises:
      ValueError: the payload is not as long as the header says.
    """
    shape, variant = header.shape, header.variant
    extents: list[tuple[tuple[int, ...], np.dtype]] = [
        ((shape.rows, 2 + shape.span), INT32),
        ((shape.rows, shape.pages), INT32),
        ((shape.rows, controls_width(variant, max_positions)), INT32),
    ]
    if header.stage > 0:
        extents.append(((shape.rows, shape.span, width), dtype))
    rows, pages, controls, *hidden = _views(payload, extents)
    return PackedStep(shape, variant, rows, pages, controls), hidden[0] if hidden else None


def mask_payload(words: np.ndarray) -> tuple[memoryview, ...]:
    """Bytes of masks, (rows, words) int32; not copied."""
    return tuple(_pieces((words,)))


def read_masks(header: MaskHeader, payload: memoryview, vocab: int) -> Masks:
    """The masks, as a view into the payload.

    Raises:
      ValueError: the payload is not as long as the header says.
    """
    (words,) = _views(payload, [((len(header.rows), mask_words(vocab)), INT32)])
    return Masks(header.rows, words, {})


def result_payload(result: np.ndarray) -> tuple[memoryview, ...]:
    """Bytes of a result, (rows, columns) int32; not copied."""
    return tuple(_pieces((result,)))


def read_result(header: ResultHeader, payload: memoryview) -> np.ndarray:
    """The result, (rows, columns) int32, as a view into the payload.

    Raises:
      ValueError: the payload is not as long as the header says.
    """
    (result,) = _views(payload, [((header.rows, header.columns), INT32)])
    return result


def _pieces(arrays: Sequence[np.ndarray]) -> Iterator[memoryview]:
    """The bytes of each array and what pads them to ALIGNMENT."""
    for array in arrays:
        content = np.ascontiguousarray(array).reshape(-1).view(np.uint8)  # bfloat16 has no buffer of its own
        yield content.data
        if gap := -content.nbytes % ALIGNMENT:
            yield PADDING[:gap]


def _views(payload: memoryview, extents: Sequence[tuple[tuple[int, ...], np.dtype]]) -> list[np.ndarray]:
    """Arrays of these shapes and dtypes, laid out as ``_pieces`` does."""
    sizes = [dtype.itemsize * math.prod(shape) for shape, dtype in extents]
    padded = [size + -size % ALIGNMENT for size in sizes]
    if payload.nbytes != sum(padded):
        expected = " + ".join(f"{dtype.name}{list(shape)}" for shape, dtype in extents)
        raise ValueError(f"payload has {payload.nbytes} bytes, {expected} takes {sum(padded)}")
    offsets = [0, *accumulate(padded)]
    return [np.ndarray(shape, dtype, payload, offset) for (shape, dtype), offset in zip(extents, offsets, strict=False)]
