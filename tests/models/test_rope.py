"""Rotary positions: frequencies of every scaling variant, and what rotating must preserve."""

from __future__ import annotations

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spotjax.models.config import DecoderConfig, RopeScaling
from spotjax.models.rope import frequencies, rotate, rotations

CONFIG = DecoderConfig(vocab=8, width=8, layers=1, heads=1, kv_heads=1, head_size=16, mlp=8, rope_base=1000.0)
LLAMA3 = RopeScaling("llama3", factor=8.0, original_positions=256, low_frequency=1.0, high_frequency=4.0)
KIND = CONFIG.kind(0)
YARN = RopeScaling("yarn", factor=4.0, original_positions=256, beta_fast=8.0, beta_slow=1.0)


def speeds(scaling: RopeScaling | None) -> np.ndarray:
    return frequencies(CONFIG, replace(KIND, rope_scaling=scaling))[0].astype(np.float64)


def wavelengths() -> np.ndarray:
    return 2 * np.pi / speeds(None)


def test_unscaled_frequencies_fall_geometrically_from_one() -> None:
    np.testing.assert_allclose(speeds(None), 1000.0 ** -(np.arange(8) / 8), rtol=1e-6)


def test_linear_scaling_divides_positions_by_the_factor() -> None:
    np.testing.assert_allclose(speeds(RopeScaling("linear", factor=4.0)), speeds(None) / 4, rtol=1e-6)


def test_llama3_keeps_short_wavelengths_stretches_long_ones_and_interpolates_between() -> None:
    scaled, plain, waves = speeds(LLAMA3), speeds(None), wavelengths()
    for pair, wave in enumerate(waves):
        if wave < 256 / 4:
            expected = plain[pair]
        elif wave > 256 / 1:
            expected = plain[pair] / 8
        else:
            smooth = (256 / wave - 1) / (4 - 1)
            expected = (1 - smooth) * plain[pair] / 8 + smooth * plain[pair]
        assert scaled[pair] == pytest.approx(expected, rel=1e-5), f"wavelength {wave}"
    assert any(256 / 4 <= wave <= 256 for wave in waves), "the case must cover the interpolated part"


def test_yarn_keeps_pairs_that_turn_often_and_interpolates_those_that_turn_seldom() -> None:
    scaled, plain, waves = speeds(YARN), speeds(None), wavelengths()
    turns = 256 / waves
    np.testing.assert_allclose(scaled[turns > 2 * YARN.beta_fast], plain[turns > 2 * YARN.beta_fast], rtol=1e-6)
    np.testing.assert_allclose(scaled[turns < 0.25], plain[turns < 0.25] / 4, rtol=1e-6)
    assert np.all(scaled <= plain * (1 + 1e-6)) and np.all(scaled >= plain / 4 * (1 - 1e-6))
    assert np.all(np.diff(scaled) < 0)


@pytest.mark.parametrize(
    ("factor", "given_factor", "expected"),
    [(4.0, None, 0.1 * math.log(4.0) + 1), (4.0, 0.75, 0.75), (1.0, None, 1.0)],
)
def test_yarn_scales_the_rotated_vectors(factor: float, given_factor: float | None, expected: float) -> None:
    scaling = replace(YARN, factor=factor, attention_factor=given_factor)
    kind = replace(KIND, rope_scaling=scaling)
    assert frequencies(CONFIG, kind)[1] == pytest.approx(expected)
    cos, sin = rotations(CONFIG, kind, jnp.zeros((1, 1), jnp.int32))
    np.testing.assert_allclose(cos, expected, rtol=1e-6)
    np.testing.assert_array_equal(sin, 0)


@settings(max_examples=10, deadline=None)
@given(first=st.integers(0, 500), distance=st.integers(0, 500), shift=st.integers(0, 1000))
def test_scores_depend_on_the_distance_of_positions_alone(first: int, distance: int, shift: int) -> None:
    generator = np.random.default_rng(first)
    query, key = (jnp.asarray(generator.normal(size=(1, 1, 1, 16)), jnp.float32) for _ in range(2))

    def score(offset: int) -> float:
        here, there = (jnp.full((1, 1), place + offset, jnp.int32) for place in (first, first + distance))
        turned = rotate(query, rotations(CONFIG, KIND, here)), rotate(key, rotations(CONFIG, KIND, there))
        return float(jnp.sum(turned[0] * turned[1]))

    assert score(shift) == pytest.approx(score(0), abs=2e-3)


def test_rotation_keeps_lengths_and_matches_complex_multiplication() -> None:
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 16)).astype(np.float32)
    positions = np.array([[0, 1, 2], [7, 8, 300]], np.int32)
    turned = np.asarray(rotate(jnp.asarray(x), rotations(CONFIG, KIND, jnp.asarray(positions))))
    angles = positions[:, :, None, None] * (1000.0 ** -(np.arange(8) / 8))
    expected = (x[..., :8] + 1j * x[..., 8:]) * np.exp(1j * angles)
    np.testing.assert_allclose(turned[..., :8], expected.real, atol=2e-4)
    np.testing.assert_allclose(turned[..., 8:], expected.imag, atol=2e-4)
    np.testing.assert_allclose(np.linalg.norm(turned, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_rotation_keeps_the_dtype(dtype: jnp.dtype) -> None:
    rotation = rotations(CONFIG, KIND, jnp.ones((1, 2), jnp.int32))
    assert jax.eval_shape(rotate, jnp.ones((1, 2, 1, 16), dtype), rotation).dtype == dtype
