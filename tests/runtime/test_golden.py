"""The serving path against Hugging Face: stages, pages, pipelines and scheduler on every mesh give the same tokens."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.typing import DTypeLike
from serving_cases import (
    BUCKETS,
    CASES,
    EXPERTS,
    GEMMA,
    LONGER,
    NEOX,
    PAGE_SIZE,
    PAGES,
    POSITIONS,
    POST_NORM,
    SHARED_HEADS,
    FewBuckets,
    build_pipelines,
    build_stage,
    checkpoint,
    compiled,
    generate,
    golden,
    greedy,
    random_weights,
)

from spotjax.meshes.shape import MeshShape
from spotjax.models.config import DecoderConfig
from spotjax.runtime.buckets import Buckets
from spotjax.runtime.compiled import CompiledModel

MESHES = [MeshShape(*degrees) for degrees in itertools.product((1, 2), (1, 2, 3), (1, 2, 3)) if np.prod(degrees) <= 8]
ON_ALL_MESHES = "llama-gqa-linear-bias"
ON_SOME_MESHES = [case for case in CASES if case != ON_ALL_MESHES]
SOME_MESHES = (MeshShape(1, 2, 3), MeshShape(1, 3, 2))
SHARDED = {"llama": SHARED_HEADS, "opt": POST_NORM, "neox": NEOX, "gemma": GEMMA, "experts": EXPERTS}


def check(case: str, mesh: MeshShape, buckets: Buckets) -> None:
    """Greedy tokens of all golden prompts twice: mixed lengths in a batch, the longer prompts in several chunks."""
    expected = golden(case)
    prompts = [expected[f"prompt_{number}"] for number in (0, 1, 2)]
    assert max(len(prompt) for prompt in prompts) > 2 * BUCKETS.prefill_tokens
    pipelines = build_pipelines(compiled(case), checkpoint(case), mesh, buckets=buckets)
    found = generate(pipelines, [greedy(prompt, len(expected["greedy_0"])) for prompt in prompts * 2])
    for number, state in enumerate(found):
        np.testing.assert_array_equal(state.tokens, expected[f"greedy_{number % 3}"], err_msg=f"prompt {number % 3}")


def uneven_mesh(case: str) -> MeshShape:
    """Stages, and shards that cannot have as many kv heads each, where one of ``SOME_MESHES`` makes such."""
    heads = checkpoint(case).spec.config.kv_heads
    return next((mesh for mesh in SOME_MESHES if heads % mesh.tensor), SOME_MESHES[0])


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_greedy_tokens_equal_hugging_face_on_every_mesh(mesh: MeshShape) -> None:
    check(ON_ALL_MESHES, mesh, LONGER)


@pytest.mark.parametrize(
    ("case", "mesh"),
    [
        pytest.param(case, mesh, marks=() if mesh == uneven_mesh(case) else pytest.mark.slow, id=f"{case}-{mesh}")
        for case in ON_SOME_MESHES
        for mesh in SOME_MESHES
    ],
)
def test_greedy_tokens_of_all_architectures_equal_hugging_face(case: str, mesh: MeshShape) -> None:
    few = FewBuckets(LONGER.max_batch, LONGER.prefill_tokens, LONGER.page_size, LONGER.max_positions)
    check(case, mesh, few)


@pytest.mark.parametrize(
    ("config", "tensor"),
    [
        pytest.param(
            config, tensor, id=f"{name}-{tensor}", marks=() if name == "llama" or tensor in (3, 4) else pytest.mark.slow
        )
        for name, config in SHARDED.items()
        for tensor in (2, 3, 4, 6)
    ],
)
def test_logits_of_shards_equal_those_of_one_device(config: DecoderConfig, tensor: int) -> None:
    prompt = np.random.default_rng(7).integers(0, 97, 13)
    np.testing.assert_allclose(prefill_logits(config, tensor, prompt), prefill_logits(config, 1, prompt), atol=4e-5)


def test_logits_in_bfloat16_are_near_those_in_float32() -> None:
    prompt = np.random.default_rng(7).integers(0, 97, 13)
    wide, narrow = prefill_logits(SHARED_HEADS, 1, prompt), prefill_logits(SHARED_HEADS, 3, prompt, jnp.bfloat16)
    np.testing.assert_allclose(narrow, wide, atol=0.15 * wide.std())


def prefill_logits(
    config: DecoderConfig, tensor: int, prompt: np.ndarray, dtype: DTypeLike = jnp.float32
) -> np.ndarray:
    """Logits (V,) after ``prompt`` from a single stage of that tensor degree."""
    model, weights = random_weights(config)
    if dtype != model.dtype:
        model = CompiledModel(weights.spec, PAGES, PAGE_SIZE, POSITIONS, dtype)
    stage = build_stage(model, weights, jax.devices()[:tensor], stages=1, number=0)
    rows = np.zeros((1, 2 + 16), np.int32)
    rows[0, : 2 + len(prompt)] = (0, len(prompt), *prompt)
    pages = np.zeros((1, BUCKETS.max_pages), np.int32)
    pages[0, :2] = (4, 2)
    logits = np.asarray(stage.run(BUCKETS.shape(1, 16, 2), rows, pages, None))
    assert logits.shape == (1, 97)
    return logits[0]
