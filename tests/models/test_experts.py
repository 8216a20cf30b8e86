"""Mixtures of experts: both ways of computing them against one expert at a time, whatever a shard holds."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spotjax.models.config import Experts
from spotjax.models.experts import Kernels, block_size, in_blocks, mix, ragged, route
from spotjax.models.quantized import Quantized

WIDTH, MLP = 5, 3


def random_kernels(experts: int, seed: int = 0) -> Kernels:
    generator = np.random.default_rng(seed)
    shapes = [(experts, WIDTH, MLP), (experts, WIDTH, MLP), (experts, MLP, WIDTH)]
    return Kernels(*(jnp.asarray(generator.normal(size=s), jnp.float32) for s in shapes), jax.nn.silu)


def expert(kernels: Kernels, number: int, token: np.ndarray) -> np.ndarray:
    """One expert on one token, in float64."""
    gate, up, down = (np.asarray(kernel[number], np.float64) for kernel in kernels[:3])
    gated = token.astype(np.float64) @ gate
    return (gated / (1 + np.exp(-gated)) * (token @ up)) @ down


@pytest.mark.parametrize(("first", "held"), [(0, 5), (0, 2), (3, 2)], ids=["all", "the first", "the last"])
@pytest.mark.parametrize(("rows", "per_token", "block"), [(1, 2, 1), (7, 2, 3), (7, 5, 7), (20, 3, 8)])
def test_tokens_get_exactly_what_their_experts_make_of_them(
    rows: int, per_token: int, block: int, first: int, held: int
) -> None:
    kernels, generator = random_kernels(5), np.random.default_rng(rows)
    tokens = generator.normal(size=(rows, WIDTH)).astype(np.float32)
    weights = generator.random((rows, per_token)).astype(np.float32)
    chosen = np.array([generator.permutation(5)[:per_token] for _ in range(rows)], np.int32)
    here = Kernels(*(kernel[first : first + held] for kernel in kernels[:3]), kernels.activation)
    found = mix(jnp.asarray(tokens), jnp.asarray(chosen - first), jnp.asarray(weights), here, block)
    for row, token in enumerate(tokens):
        mine = zip(chosen[row], weights[row], strict=True)
        parts = [w * expert(kernels, number, token) for number, w in mine if first <= number < first + held]
        np.testing.assert_allclose(found[row], np.sum([np.zeros(WIDTH), *parts], axis=0), atol=2e-5)


@settings(max_examples=40)
@given(st.lists(st.integers(0, 9), min_size=5, max_size=5))
def test_ragged_products_and_blocks_agree_on_tokens_of_experts(sizes: list[int]) -> None:
    """Sizes may add up to less than the tokens; what is made of the rest is undefined."""
    found, expected = both_ways(jnp.asarray(sizes, jnp.int32))
    np.testing.assert_allclose(found[: sum(sizes)], expected[: sum(sizes)], atol=2e-5)


def test_experts_in_int8_are_scaled_each_by_its_own() -> None:
    generator, kernels = np.random.default_rng(5), random_kernels(5)
    shapes = [kernel.shape for kernel in kernels[:3]]
    values = [jnp.asarray(generator.integers(-127, 128, shape, np.int8)) for shape in shapes]
    scales = [jnp.asarray(generator.uniform(0.001, 0.01, (5, shape[2])), jnp.float32) for shape in shapes]
    int8 = Kernels(*(Quantized(*pair, jnp.float32) for pair in zip(values, scales, strict=True)), jax.nn.silu)
    restored = [v.astype(jnp.float32) * s[:, None] for v, s in zip(values, scales, strict=True)]
    tokens = jnp.asarray(generator.normal(size=(20, WIDTH)), jnp.float32)
    sizes = jnp.asarray([3, 0, 7, 1, 4], jnp.int32)
    expected = ragged(Kernels(*restored, jax.nn.silu), tokens, sizes)[:15]
    assert np.abs(expected).max() > 0.01
    for found in (ragged(int8, tokens, sizes), in_blocks(int8, 4, tokens, sizes)):
        np.testing.assert_allclose(found[:15], expected, atol=1e-5)


@jax.jit
def both_ways(sizes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of 50 tokens, in blocks of 4 and as one ragged product."""
    kernels = random_kernels(5)
    tokens = jnp.asarray(np.random.default_rng(2).normal(size=(50, WIDTH)), jnp.float32)
    return in_blocks(kernels, 4, tokens, sizes), ragged(kernels, tokens, sizes)


def test_other_platforms_compute_with_ragged_products() -> None:
    """Lowered for a TPU, the loop over blocks is not there; never run on one."""
    arguments = (jnp.zeros((4, WIDTH)), jnp.zeros((4, 2), jnp.int32), jnp.zeros((4, 2)))
    kernels = random_kernels(4)

    def function(tokens: jax.Array, chosen: jax.Array, weights: jax.Array) -> jax.Array:
        return mix(tokens, chosen, weights, kernels, 4)

    lowered = {
        platform: jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
        for platform in ("cpu", "tpu")
    }
    assert "ragged_dot" in lowered["tpu"] and "stablehlo.while" not in lowered["tpu"]
    assert "ragged_dot" not in lowered["cpu"] and "stablehlo.while" in lowered["cpu"]


def test_a_token_does_not_depend_on_the_others_nor_on_padding() -> None:
    kernels, experts = random_kernels(6), Experts(6, 2)
    generator = np.random.default_rng(3)
    tokens = generator.normal(size=(7, WIDTH)).astype(np.float32)
    scores = generator.normal(size=(7, 6)).astype(np.float32)
    chosen, weights = route(jnp.asarray(scores), experts)
    alone = mix(jnp.asarray(tokens), chosen, weights, kernels, 7)[:3]
    tokens[3:], scores[3:] = np.nan, generator.normal(size=(4, 6))
    chosen, weights = route(jnp.asarray(scores), experts)
    np.testing.assert_array_equal(mix(jnp.asarray(tokens), chosen, weights, kernels, 7)[:3], alone)


@pytest.mark.parametrize("normalized", [True, False])
def test_the_likeliest_experts_are_chosen_with_their_probabilities(normalized: bool) -> None:
    scores = np.log(np.array([[0.1, 0.5, 0.15, 0.25]], np.float32))
    chosen, weights = route(jnp.asarray(scores), Experts(4, 2, normalized=normalized))
    np.testing.assert_array_equal(chosen, [[1, 3]])
    np.testing.assert_allclose(weights, [[2 / 3, 1 / 3]] if normalized else [[0.5, 0.25]], rtol=1e-6)


@pytest.mark.parametrize(("rows", "block"), [(1, 1), (4, 4), (8, 8), (32, 32), (512, 64)])
def test_blocks_are_no_larger_than_the_step(rows: int, block: int) -> None:
    assert block_size(rows, Experts(8, 2)) == block


@pytest.mark.parametrize(("per_token", "shared"), [(0, 0), (5, 0), (2, -1)])
def test_impossible_experts_are_refused(per_token: int, shared: int) -> None:
    with pytest.raises(ValueError, match=r"per_token must be from 1 to the 4 experts|shared_mlp must not be negative"):
        Experts(4, per_token, shared_mlp=shared)
