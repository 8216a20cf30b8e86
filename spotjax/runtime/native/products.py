"""Products of a few rows with large matrices by the library's kernel, in programs for CPUs; all others by XLA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import jax
import jax.numpy as jnp

from spotjax.models.projection import Products
from spotjax.models.quantized import Matrix, Quantized
from spotjax.runtime.native.library import SERVED

MOST_ROWS = 32
"""Up to so many rows the kernel is faster than XLA; more are bound by arithmetic, which XLA's products are made for."""


@dataclass(frozen=True)
class NativeProducts(Products):
    """See ``models.projection.Products``. What a row gives does not depend on the rows beside it.

    Attributes:
      target: name of the kernel among XLA's custom calls.
    """

    target: str

    def project(self, x: jax.Array, kernels: Sequence[Matrix], inputs: int = 1) -> list[jax.Array]:
        """One call for all kernels, so that threads begin and end together once."""
        rows, width = x.shape[: x.ndim - inputs], prod(x.shape[x.ndim - inputs :])
        if not self._fits(x, prod(rows), kernels):
            return super().project(x, kernels, inputs)
        flat = [_reshaped(kernel, (width, -1)) for kernel in kernels]
        results = self._call(x.reshape(-1, width), flat, transposed=False)
        return [result.reshape(*rows, *kernel.shape[inputs:]) for result, kernel in zip(results, kernels, strict=True)]

    def score(self, x: jax.Array, head: Matrix, *, transposed: bool) -> jax.Array:
        """Reads the head as it lies. The kernel's results are of the type of x, so in bfloat16 they were rounded."""
        if not self._fits(x, len(x), [head]):
            return super().score(x, head, transposed=transposed)
        return self._call(x, [head], transposed=transposed)[0].astype(jnp.float32)

    def _fits(self, x: jax.Array, rows: int, kernels: Sequence[Matrix]) -> bool:
        held = {jnp.dtype(jnp.int8 if isinstance(kernel, Quantized) else kernel.dtype) for kernel in kernels}
        return 0 < rows <= MOST_ROWS and x.dtype in SERVED and held in ({x.dtype}, {jnp.dtype(jnp.int8)})

    def _call(self, x: jax.Array, kernels: Sequence[Matrix], *, transposed: bool) -> list[jax.Array]:
        values = [kernel.values if isinstance(kernel, Quantized) else kernel for kernel in kernels]
        scales = [kernel.scale.reshape(-1) for kernel in kernels if isinstance(kernel, Quantized)]
        widths = [array.shape[0 if transposed else 1] for array in values]
        results = [jax.ShapeDtypeStruct((len(x), width), x.dtype) for width in widths]
        return list(jax.ffi.ffi_call(self.target, results)(x, *values, *scales, transposed=transposed))


def _reshaped(kernel: Matrix, shape: tuple[int, ...]) -> Matrix:
    if isinstance(kernel, Quantized):
        return Quantized(kernel.values.reshape(shape), kernel.scale, kernel.dtype)
    return kernel.reshape(shape)
