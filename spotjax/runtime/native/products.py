"""Products by the library's kernels, in programs for CPUs; what they do not serve by XLA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import prod

import jax
import jax.numpy as jnp

from spotjax.models.projection import Products
from spotjax.models.quantized import Matrix, Quantized
from spotjax.runtime.native.library import SERVED

MOST_SCORED = 32
"""Rows up to which a tied head's kernel is faster than XLA."""


@dataclass(frozen=True)
class NativeProducts(Products):
    """See ``models.projection.Products``. What a row gives does not depend on the rows beside it.

    Attributes:
      target: name of the kernel among XLA's custom calls.
      lengths: (B,) int32: of each B-th part of the rows so many, the first, are computed; None for all.
    """

    target: str
    lengths: jax.Array | None = field(default=None, repr=False)

    def without_padding(self, lengths: jax.Array) -> Products:
        """Padding takes no time, and gives zeros."""
        return replace(self, lengths=lengths)

    def project(self, x: jax.Array, kernels: Sequence[Matrix], inputs: int = 1) -> list[jax.Array]:
        """One call for all kernels, so that threads begin and end together once."""
        rows, width = x.shape[: x.ndim - inputs], prod(x.shape[x.ndim - inputs :])
        if not self._serves(x, prod(rows), kernels):
            return super().project(x, kernels, inputs)
        flat = [_reshaped(kernel, (width, -1)) for kernel in kernels]
        results = self._call(x.reshape(-1, width), flat, transposed=False)
        return [result.reshape(*rows, *kernel.shape[inputs:]) for result, kernel in zip(results, kernels, strict=True)]

    def score(self, x: jax.Array, head: Matrix, *, transposed: bool) -> jax.Array:
        """Reads the head as it lies. The kernel's results are of the type of x, so in bfloat16 they were rounded."""
        if not self._serves(x, len(x), [head]) or (transposed and len(x) > MOST_SCORED):
            return super().score(x, head, transposed=transposed)
        return self._call(x, [head], transposed=transposed)[0].astype(jnp.float32)

    def _serves(self, x: jax.Array, rows: int, kernels: Sequence[Matrix]) -> bool:
        held = {jnp.dtype(jnp.int8 if isinstance(kernel, Quantized) else kernel.dtype) for kernel in kernels}
        return rows > 0 and x.dtype in SERVED and held in ({x.dtype}, {jnp.dtype(jnp.int8)})

    def _call(self, x: jax.Array, kernels: Sequence[Matrix], *, transposed: bool) -> list[jax.Array]:
        values = [kernel.values if isinstance(kernel, Quantized) else kernel for kernel in kernels]
        scales = [kernel.scale.reshape(-1) for kernel in kernels if isinstance(kernel, Quantized)]
        widths = [array.shape[0 if transposed else 1] for array in values]
        results = [jax.ShapeDtypeStruct((len(x), width), x.dtype) for width in widths]
        lengths = jnp.full(1, len(x), jnp.int32) if self.lengths is None else self.lengths
        return list(jax.ffi.ffi_call(self.target, results)(x, lengths, *values, *scales, transposed=transposed))


def _reshaped(kernel: Matrix, shape: tuple[int, ...]) -> Matrix:
    if isinstance(kernel, Quantized):
        return Quantized(kernel.values.reshape(shape), kernel.scale, kernel.dtype)
    return kernel.reshape(shape)
