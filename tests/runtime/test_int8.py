"""int8 matrices on devices: what is computed with them, and that no mesh changes it."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from serving_cases import (
    BUCKETS,
    EXPERTS,
    GEMMA,
    PAGE_SIZE,
    PAGES,
    POSITIONS,
    POST_NORM,
    SHARED_HEADS,
    FewBuckets,
    RandomCheckpoint,
    build_pipelines,
    build_stage,
    generate,
    greedy,
)

from spotjax.meshes.shape import MeshShape
from spotjax.meshes.slices import whole
from spotjax.models.checkpoint import Checkpoint
from spotjax.models.config import DecoderConfig
from spotjax.models.projection import project
from spotjax.models.quantization import INPUT_AXES
from spotjax.models.quantized import Quantized
from spotjax.models.quantized_checkpoint import QuantizedCheckpoint
from spotjax.runtime.compiled import CompiledModel

CONFIGS = {
    "opt": replace(POST_NORM, layers=1),
    "gemma": replace(GEMMA, layers=2),
    "experts": replace(EXPERTS, layers=1),
}
TIED = replace(SHARED_HEADS, tied_embeddings=True)


class Restored(RandomCheckpoint):
    """Weights that were rounded to int8, as plain float32: what int8 should compute the same as."""

    def whole(self, name: str) -> np.ndarray:
        array = next(one for one in self.spec.parameters if one.name == name)
        if array.axes not in INPUT_AXES:
            return super().whole(name)
        found = int8(self.spec.config)
        scale = next(one for one in found.spec.parameters if one.name == f"{name}_scale")
        wide = np.expand_dims(found.read(scale.name, whole(scale.shape)), INPUT_AXES[array.axes])
        content: np.ndarray = found.read(name, whole(array.shape)) * wide
        return content


@cache
def int8(config: DecoderConfig) -> QuantizedCheckpoint:
    return QuantizedCheckpoint(RandomCheckpoint(config))  # type: ignore[arg-type]


@cache
def model(weights: Checkpoint, dtype: str = "float32") -> CompiledModel:
    return CompiledModel(weights.spec, PAGES, PAGE_SIZE, POSITIONS, jnp.dtype(dtype))


def prefill_logits(weights: Checkpoint, tensor: int, dtype: str = "float32") -> np.ndarray:
    """Logits (V,) after a prompt from a single stage of that tensor degree."""
    compiled = model(weights, dtype)
    stage = build_stage(compiled, weights, jax.devices()[:tensor], stages=1, number=0)
    prompt = np.random.default_rng(7).integers(0, 97, 13)
    rows = np.zeros((1, 2 + 16), np.int32)
    rows[0, : 2 + len(prompt)] = (0, len(prompt), *prompt)
    pages = np.zeros((1, BUCKETS.max_pages), np.int32)
    pages[0, :2] = (4, 2)
    return np.asarray(stage.run(BUCKETS.shape(1, 16, 2), rows, pages, None))[0]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_logits_are_those_of_the_rounded_weights_on_any_number_of_shards(config: DecoderConfig) -> None:
    expected = prefill_logits(Restored(config), 1)  # type: ignore[arg-type]
    plain = prefill_logits(RandomCheckpoint(config), 1)  # type: ignore[arg-type]
    np.testing.assert_allclose(prefill_logits(int8(config), 3), expected, atol=1e-4)
    assert np.abs(expected - plain).max() > 1e-3, "rounding is not without effect"


def test_activations_may_be_bfloat16() -> None:
    expected = prefill_logits(Restored(TIED), 1)  # type: ignore[arg-type]
    found = prefill_logits(int8(TIED), 2, "bfloat16")
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=0.06 * np.abs(expected).max())


@pytest.mark.parametrize("mesh", [MeshShape(1, 2, 2), MeshShape(1, 1, 6)], ids=str)
def test_greedy_tokens_are_the_same_on_every_mesh(mesh: MeshShape) -> None:
    assert tokens(mesh) == tokens(MeshShape(1, 1, 1))


@cache
def tokens(mesh: MeshShape) -> list[tuple[int, ...]]:
    """What greedy choices make of three prompts."""
    chance = np.random.default_rng(3)
    prompts = [chance.integers(0, 97, length) for length in (3, 20, 35)]
    few = FewBuckets(BUCKETS.max_batch, BUCKETS.prefill_tokens, BUCKETS.page_size, BUCKETS.max_positions)
    pipelines = build_pipelines(model(int8(SHARED_HEADS)), int8(SHARED_HEADS), mesh, buckets=few)
    return [state.tokens for state in generate(pipelines, [greedy(prompt, 12) for prompt in prompts])]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("inputs", [1, 2])
def test_a_product_is_scaled_by_output_channel_whatever_its_axes(dtype: str, inputs: int) -> None:
    chance = np.random.default_rng(0)
    x = chance.normal(size=(2, 5, 4, 6)).astype(dtype)
    values = chance.integers(-127, 128, (4, 6, 3)[2 - inputs :], np.int8)
    scale = chance.uniform(0.1, 1, 3).astype(np.float32)
    matrix = Quantized(jnp.asarray(values), jnp.asarray(scale), jnp.dtype(dtype))
    found = project(jnp.asarray(x), matrix, inputs)
    assert found.dtype == dtype
    wide = x.astype(np.float64)
    expected = np.tensordot(wide, values * scale.astype(np.float64), inputs)
    np.testing.assert_allclose(
        found.astype(jnp.float32), expected, rtol=2e-2 if dtype == "bfloat16" else 1e-4, atol=0.5
    )


def test_devices_hold_int8() -> None:
    weights = int8(TIED)
    stage = build_stage(model(weights), weights, jax.devices()[:2], stages=1, number=0)
    held = {array.dtype.name for array in stage.arrays() if array.ndim < 4}
    assert held == {"int8", "float32"}
    assert sum(array.nbytes for array in stage.arrays() if array.dtype == jnp.int8) > 0
