"""int8 arrays in computations: a matrix with its scales as one value, beside plain arrays. Rounds nothing itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from types import EllipsisType

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from spotjax.models.quantization import SCALE


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantized:
    """A matrix as int8 and the scales of its output channels. Computed with like an array of ``dtype``.

    Attributes:
      values: int8, in the matrix's own shape.
      scale: float32, in the shape of the output channels.
      dtype: of activations.
    """

    values: jax.Array
    scale: jax.Array
    dtype: DTypeLike = field(metadata={"static": True})

    def __getitem__(self, everything: EllipsisType) -> Quantized:
        """Itself, as an array or a parameter gives itself for ``[...]``."""
        return self

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix."""
        return self.values.shape

    @property
    def T(self) -> Quantized:  # as of arrays
        """A table of rows (V, D) as the matrix (D, V) of which they are the columns."""
        return Quantized(self.values.T, self.scale, self.dtype)


Matrix = jax.Array | Quantized
"""What activations are multiplied with, or rows are taken from."""


def multiply(x: jax.Array, kernel: Quantized, inputs: int, result: DTypeLike | None = None) -> jax.Array:
    """(..., *in) times (*in, *out), ``inputs`` axes being summed over: summed in float32, and scaled after that.

    As ``result`` or, if None, in the type of x.

    XLA reads int8 and converts on the way where its matrix products take such operands (GPU, TPU); on CPU it writes the
    converted matrix to memory first, which the kernels of ``runtime/native`` do not.
    """
    rows, width = x.shape[: x.ndim - inputs], prod(kernel.shape[:inputs])
    values = kernel.values.reshape(width, -1).astype(x.dtype)
    flat = jnp.matmul(x.reshape(-1, width), values, preferred_element_type=jnp.float32)
    scaled = (flat * kernel.scale.reshape(1, -1)).astype(x.dtype if result is None else result)
    return scaled.reshape(*rows, *kernel.shape[inputs:])


def take_rows(table: Matrix, rows: jax.Array) -> jax.Array:
    """Rows (B, T) of a table (V, D): (B, T, D)."""
    if isinstance(table, Quantized):
        scales = jnp.take(table.scale, rows, axis=0)[..., None]
        return (jnp.take(table.values, rows, axis=0).astype(jnp.float32) * scales).astype(table.dtype)
    return jnp.take(table, rows, axis=0)


def with_scales(arrays: Mapping[str, jax.Array], dtype: DTypeLike) -> dict[str, Matrix]:
    """Arrays by name, those of scales put together with what they scale."""
    return {
        name: Quantized(array, arrays[name + SCALE], dtype) if name + SCALE in arrays else array
        for name, array in arrays.items()
        if not (name.endswith(SCALE) and name.removesuffix(SCALE) in arrays)
    }
