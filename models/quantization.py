"""int8 weights: which arrays are kept so, with which scales, and how they are rounded. Numpy only; computes no model.

Symmetric and weight-only: a matrix W is kept as whole numbers Q from -127 to 127 and one float32 scale S for every
output channel, the greatest magnitude of its column over 127, so that |W - Q S| is at most S / 2 everywhere. A scale is
of the whole column, whatever part of it a device holds: the same numbers on every mesh.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Quantization = Literal["none", "int8"]
"""How matrices are kept: as all other parameters, or as described above."""

ElementType = Literal["int8", "float32"]
"""Of what is not kept at the dtype that a model is served at."""

SCALE = "_scale"
"""What the name of an array's scales ends with, behind the array's own name."""

LEVELS = 127

INPUT_AXES: dict[tuple[str, ...], tuple[int, ...]] = {
    ("embed", "heads", "head_size"): (0,),
    ("embed", "kv_heads", "head_size"): (0,),
    ("heads", "head_size", "embed"): (0, 1),
    ("embed", "mlp"): (0,),
    ("mlp", "embed"): (0,),
    ("embed", "vocab"): (0,),
    ("vocab", "embed"): (1,),
    ("expert", "embed", "expert_mlp"): (1,),
    ("expert", "expert_mlp", "embed"): (1,),
}
"""Arrays that are quantized, by their logical axes: over which axes inputs are summed, or one row is read.

A row of the embedding is an output channel both ways: read for a token, or as a column of a tied head. Norms, biases
and routers are too small to matter; learned positions are added once; only OPT-350M has projections beside these.
"""


def scale_axes(axes: tuple[str, ...]) -> tuple[int, ...] | None:
    """Which axes of an array its scales have: those of the output channels. None for arrays that are not quantized."""
    inputs = INPUT_AXES.get(axes)
    return None if inputs is None else tuple(axis for axis in range(len(axes)) if axis not in inputs)


def scales_from(peaks: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scales of output channels by the greatest magnitude in each; a channel of zeros gets one that divides."""
    scales: NDArray[np.float32] = np.maximum(peaks / np.float32(LEVELS), np.finfo(np.float32).tiny)
    return scales


def quantize(block: NDArray[np.float32], scales: NDArray[np.float32]) -> NDArray[np.int8]:
    """The nearest whole numbers of scales.

    Args:
      block: a part of an array.
      scales: of its output channels, with an extent of 1 along the axes of inputs.
    """
    levels: NDArray[np.float32] = np.rint(block / scales)
    return np.clip(levels, -LEVELS, LEVELS).astype(np.int8)
