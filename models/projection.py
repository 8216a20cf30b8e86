"""What layers are made of: matrix products, and the functions between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod

import jax

from spotjax.models.quantized import Matrix, Quantized, multiply

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}


def project(x: jax.Array, kernel: Matrix, inputs: int = 1) -> jax.Array:
    """(..., *in) times (*in, *out), ``inputs`` axes being summed over.

    One plain matrix product; blocked layouts are 5-10 times slower on CPU.
    """
    if isinstance(kernel, Quantized):
        return multiply(x, kernel, inputs)
    rows, width = x.shape[: x.ndim - inputs], prod(kernel.shape[:inputs])
    return (x.reshape(-1, width) @ kernel.reshape(width, -1)).reshape(*rows, *kernel.shape[inputs:])


@dataclass(frozen=True)
class Products:
    """Who computes the products of a model: here XLA, wherever it runs.

    What is compiled depends on it, so its ``repr`` says all that it does.
    """

    def project(self, x: jax.Array, kernels: Sequence[Matrix], inputs: int = 1) -> list[jax.Array]:
        """(..., *in) times each of some (*in, *out), ``inputs`` axes being summed over."""
        return [project(x, kernel, inputs) for kernel in kernels]

    def score(self, x: jax.Array, table: Matrix) -> jax.Array:
        """(B, D) times each row of (V, D): (B, V)."""
        return project(x, table.T)


BY_XLA = Products()
