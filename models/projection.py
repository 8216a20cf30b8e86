"""What layers are made of: matrix products, and the functions between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from spotjax.models.quantized import Matrix, Quantized, multiply

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}


def project(x: jax.Array, kernel: Matrix, inputs: int = 1, result: DTypeLike | None = None) -> jax.Array:
    """(..., *in) times (*in, *out), ``inputs`` axes being summed over, as ``result`` or, if None, in the type of x.

    One plain matrix product; blocked layouts are 5-10 times slower on CPU.
    """
    if isinstance(kernel, Quantized):
        return multiply(x, kernel, inputs, result)
    rows, width = x.shape[: x.ndim - inputs], prod(kernel.shape[:inputs])
    flat = jnp.matmul(x.reshape(-1, width), kernel.reshape(width, -1), preferred_element_type=result)
    return flat.reshape(*rows, *kernel.shape[inputs:])


@dataclass(frozen=True)
class Products:
    """Who computes the products of a model: here XLA, wherever it runs.

    What is compiled depends on it, so its ``repr`` says all that it does.
    """

    def project(self, x: jax.Array, kernels: Sequence[Matrix], inputs: int = 1) -> list[jax.Array]:
        """(..., *in) times each of some (*in, *out), ``inputs`` axes being summed over."""
        return [project(x, kernel, inputs) for kernel in kernels]

    def score(self, x: jax.Array, head: Matrix, *, transposed: bool) -> jax.Array:
        """(B, D) times (D, V), or each row of (V, D) where it is ``transposed``: (B, V) in float32.

        Logits that are near each other would be the same in bfloat16, so they are not rounded to it on their way.
        """
        return project(x, head.T if transposed else head, result=jnp.float32)

    def without_padding(self, lengths: jax.Array) -> Products:
        """For x (B, T, ...) of which ``lengths`` (B,) positions are valid: others may be left out, and give anything
        finite."""
        del lengths
        return self


BY_XLA = Products()
