"""Products of a model: in which types they are summed up and handed on."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spotjax.models.projection import BY_XLA
from spotjax.models.quantized import Matrix, Quantized


def head(kind: str, transposed: bool) -> Matrix:
    """Of 24 inputs and 50 logits."""
    values = np.random.default_rng(1).standard_normal((50, 24) if transposed else (24, 50))
    if kind == "int8":
        return Quantized(jnp.asarray(values * 30, jnp.int8), jnp.full(50, 1 / 30, jnp.float32), jnp.dtype("bfloat16"))
    return jnp.asarray(values, kind)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_logits_are_never_rounded_to_less_than_float32(kind: str, transposed: bool) -> None:
    """On no platform: nothing of their shape has another type on its way."""
    x = jnp.asarray(np.random.default_rng(2).standard_normal((3, 24)), "float32" if kind == "float32" else "bfloat16")
    matrix = head(kind, transposed)

    def score(x: jax.Array) -> jax.Array:
        return BY_XLA.score(x, matrix, transposed=transposed)

    steps = [out.aval for equation in jax.make_jaxpr(score)(x).eqns for out in equation.outvars]
    assert {str(one.dtype) for one in steps if one.shape == (3, 50)} == {"float32"}
    plain = np.asarray(matrix.values, np.float64) / 30 if isinstance(matrix, Quantized) else np.asarray(matrix, "f8")
    exact = np.asarray(x, np.float64) @ (plain.T if transposed else plain)
    np.testing.assert_allclose(np.asarray(score(x)), exact, rtol=1e-5, atol=1e-5)
