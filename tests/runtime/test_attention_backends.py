"""The kernels of TPUs and GPUs, interpreted on the CPU, against plain attention over the same pages."""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kernel_interpreter import interpreted
from serving_cases import (
    BUCKETS,
    PAGE_SIZE,
    PAGES,
    POSITIONS,
    SHARED_HEADS,
    build_pipelines,
    build_stage,
    checkpoint,
    generate,
    golden,
    greedy,
    random_weights,
)

from spotjax.meshes.shape import MeshShape
from spotjax.models.attention import Scoring
from spotjax.reshard.kv import KvMover
from spotjax.runtime.attention.backend import AttentionBackend
from spotjax.runtime.attention.gpu import GpuAttention
from spotjax.runtime.attention.tpu import TpuAttention
from spotjax.runtime.attention.xla import XlaAttention
from spotjax.runtime.compiled import CompiledModel
from spotjax.runtime.kv import LayerPages, StepInput
from spotjax.runtime.stage import Stage


class Case(NamedTuple):
    """A step of one layer. ``rows`` are (first position, valid positions), padding last."""

    heads: int
    kv_heads: int
    head_size: int
    page_size: int
    pages: int
    rows: tuple[tuple[int, int], ...]
    scoring: Scoring


CASES = {
    "decode": Case(6, 2, 64, 8, 4, ((5, 1), (0, 1), (30, 1), (0, 0)), Scoring(0.1)),
    "decode, one kv head, soft cap": Case(4, 1, 128, 16, 3, ((33, 1), (15, 1)), Scoring(0.1, softcap=2.0)),
    "decode, window": Case(4, 2, 32, 8, 4, ((5, 1), (30, 1)), Scoring(0.1, window=7)),
    "decode, long": Case(2, 2, 16, 4, 300, ((1150, 1), (520, 1), (0, 0)), Scoring(0.2)),
    "chunks": Case(9, 3, 32, 8, 3, ((5, 4), (0, 8), (9, 3), (0, 0)), Scoring(0.1)),
    "chunks, window": Case(6, 3, 64, 4, 5, ((5, 4), (9, 8)), Scoring(0.1, window=6)),
    "chunk, one kv head, soft cap": Case(2, 1, 64, 4, 8, ((7, 16),), Scoring(0.2, softcap=1.5)),
}


Inputs = tuple[LayerPages[jax.Array], StepInput, jax.Array, jax.Array, jax.Array]
"""Content of all pages, the step, its query, keys and values."""


def inputs(case: Case, dtype: jnp.dtype) -> Inputs:
    """Random ones; every row has pages of its own."""
    generator = np.random.default_rng(len(case.rows))
    span = max(length for _, length in case.rows)
    total = 1 + len(case.rows) * case.pages
    rows = np.zeros((len(case.rows), 2 + span), np.int32)
    numbers = np.zeros((len(case.rows), case.pages), np.int32)
    free = list(1 + generator.permutation(total - 1))
    for row, (start, length) in enumerate(case.rows):
        rows[row, :2] = start, length
        needed = -(-(start + length) // case.page_size)
        numbers[row, :needed] = [free.pop() for _ in range(needed)]

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(generator.normal(size=shape), dtype)

    size, kv_heads = case.head_size, case.kv_heads
    content = LayerPages(normal(total, kv_heads, size, case.page_size), normal(total, kv_heads, case.page_size, size))
    query, keys, values = (normal(len(rows), span, heads, size) for heads in (case.heads, kv_heads, kv_heads))
    return content, StepInput(jnp.asarray(rows), jnp.asarray(numbers)), query, keys, values


def check(case: Case, backend: AttentionBackend, dtype: jnp.dtype, tolerance: float) -> None:
    """Asserts that the backend mixes the same as XLA's, and leaves the same in the pages."""
    arguments = inputs(case, dtype)
    step = arguments[1]
    expected, left = run(XlaAttention(case.head_size, case.page_size), case, *arguments)
    found, left_here = run(backend, case, *arguments)
    assert found.dtype == dtype and np.isfinite(np.asarray(found, np.float32)).all()  # page 0 gets that of padding
    valid = np.asarray(step.valid)
    np.testing.assert_allclose(
        np.asarray(found, np.float32)[valid], np.asarray(expected, np.float32)[valid], atol=tolerance
    )
    for array, array_here in zip(left, left_here, strict=True):
        np.testing.assert_array_equal(np.asarray(array)[1:], np.asarray(array_here)[1:])


@pytest.mark.parametrize("window", [1, 6, 30])
def test_all_of_a_window_is_seen_and_padding_sees_something(window: int | None) -> None:
    rows = ((0, 9), (14, 3), (21, 1), (0, 0))
    case = Case(2, 1, 4, 4, 6, rows, Scoring(0.5, window=window))
    content, step, query, keys, values = inputs(case, jnp.dtype(jnp.float32))
    found, left = run(XlaAttention(4, 4), case, content, step, query, keys, values)
    assert np.isfinite(np.asarray(found)).all()
    for row, (start, length) in enumerate(rows):
        numbers = np.asarray(step.pages)[row]
        whole = [np.concatenate([np.asarray(part)[number, 0].reshape(4, 4) for number in numbers], axis=1 - turned)
                 for part, turned in zip(left, (0, 1), strict=True)]  # fmt: skip
        for place in range(length):
            seen = slice(max(0, start + place + 1 - (window or 99)), start + place + 1)
            for head in range(2):
                scores = np.asarray(query)[row, place, head] @ whole[0][:, seen] * 0.5
                weights = np.exp(scores - scores.max())
                expected = weights @ whole[1][seen] / weights.sum()
                np.testing.assert_allclose(found[row, place, head], expected, atol=1e-5)


def run(
    backend: AttentionBackend,
    case: Case,
    content: LayerPages[jax.Array],
    step: StepInput,
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
) -> tuple[jax.Array, LayerPages[jax.Array]]:
    """Writes the content, runs the step and reads all pages."""
    every = jnp.arange(len(content.keys), dtype=jnp.int32)

    def layer(content: LayerPages[jax.Array], *new: jax.Array) -> tuple[jax.Array, LayerPages[jax.Array]]:
        empty = tuple(jnp.zeros(a.shape, query.dtype) for a in backend.page_arrays(len(every), case.kv_heads))
        store = backend.store(backend.write_pages(empty, every, content), step)
        mixed = store.attend(*new, case.scoring)  # type: ignore[call-arg]
        return mixed, backend.read_pages(store.pages, every, case.kv_heads)

    with interpreted() if isinstance(backend, TpuAttention) else nullcontext():
        fast_to_compile = {"xla_backend_optimization_level": 0}
        return jax.jit(layer, compiler_options=fast_to_compile)(content, query, keys, values)


@pytest.mark.parametrize("name", ["decode", "chunks, window", "chunk, one kv head, soft cap"])
def test_the_kernel_for_tpus_attends_as_xla_does(name: str) -> None:
    case = CASES[name]
    check(
        case,
        TpuAttention(case.head_size, case.page_size, 4, pages_per_block=2, queries_per_block=8),
        jnp.dtype(jnp.float32),
        2e-6,
    )


def test_the_kernel_for_tpus_attends_in_bfloat16_as_xla_does() -> None:
    case = CASES["chunks"]
    check(
        case,
        TpuAttention(case.head_size, case.page_size, 2, pages_per_block=2, queries_per_block=8),
        jnp.dtype(jnp.bfloat16),
        0.02,
    )


@pytest.mark.parametrize("name", ["decode, one kv head, soft cap", "decode, window", "decode, long", "chunks, window"])
def test_the_kernels_for_gpus_attend_as_xla_does(name: str) -> None:
    case = CASES[name]
    check(case, GpuAttention(case.head_size, case.page_size, emulated=True), jnp.dtype(jnp.float32), 2e-6)


@pytest.mark.parametrize("name", ["decode", "chunks"])
def test_the_kernels_for_gpus_attend_in_bfloat16_as_xla_does(name: str) -> None:
    case = CASES[name]
    with jax.numpy_dtype_promotion("standard"):  # inside jax's attention
        check(case, GpuAttention(case.head_size, case.page_size, emulated=True), jnp.dtype(jnp.bfloat16), 0.02)


def test_a_model_gives_the_tokens_of_hugging_face_with_the_kernels_for_gpus() -> None:
    expected, weights = golden("llama-gqa-llama3"), checkpoint("llama-gqa-llama3")
    kernels = GpuAttention(weights.spec.config.head_size, PAGE_SIZE, emulated=True)
    model = CompiledModel(weights.spec, PAGES, PAGE_SIZE, POSITIONS, jnp.float32, attention=kernels)
    prompts = [expected[f"prompt_{number}"] for number in range(2)]
    found = generate(build_pipelines(model, weights, MeshShape(1, 2, 3)), [greedy(prompt, 6) for prompt in prompts])
    for number, state in enumerate(found):
        np.testing.assert_array_equal(state.tokens, expected[f"greedy_{number}"][:6])


def test_a_sequence_goes_on_with_kv_of_an_instance_with_another_backend() -> None:
    plain, weights = random_weights(SHARED_HEADS)
    kernels = GpuAttention(SHARED_HEADS.head_size, PAGE_SIZE, emulated=True)
    other = CompiledModel(weights.spec, PAGES, PAGE_SIZE, POSITIONS, jnp.float32, attention=kernels)
    prompt, numbers = np.random.default_rng(3).integers(0, 97, 13), [4, 2]
    one = build_stage(plain, weights, jax.devices()[:2], stages=1, number=0)
    expected = logits(one, 0, prompt, numbers), logits(one, 13, prompt[:1], numbers)
    source = build_stage(other, weights, jax.devices()[2:5], stages=1, number=0)  # kv heads that three shards share
    np.testing.assert_allclose(logits(source, 0, prompt, numbers), expected[0], atol=4e-5)
    target = build_stage(plain, weights, jax.devices()[5:7], stages=1, number=0)
    for layer in range(SHARED_HEADS.layers):
        _, (content,) = KvMover(other).host_pages(1, len(numbers))
        KvMover(other).read(source, layer, numbers, content)
        KvMover(plain).write(target, layer, [7, 9], content)
    np.testing.assert_allclose(logits(target, 13, prompt[:1], [7, 9]), expected[1], atol=4e-5)


def logits(stage: Stage, start: int, tokens: np.ndarray, numbers: list[int]) -> np.ndarray:
    """Those after a span of one sequence."""
    span = 16 if len(tokens) > 1 else 1
    rows, pages = np.zeros((1, 2 + span), np.int32), np.zeros((1, BUCKETS.max_pages), np.int32)
    rows[0, : 2 + len(tokens)] = (start, len(tokens), *tokens)
    pages[0, : len(numbers)] = numbers
    return np.asarray(stage.run(BUCKETS.shape(1, span, len(numbers)), rows, pages, None))


@given(st.integers(1, 9), st.sampled_from([2, 4]), st.integers(1, 300))
def test_pages_of_tpus_have_room_for_all_heads_in_whole_tiles(heads: int, width: int, size: int) -> None:
    (((_, _, combined, padded), _),) = TpuAttention(size, 16, width).page_arrays(3, heads)
    words = combined * width // 4
    assert combined >= 2 * heads and padded >= size and padded % 128 == 0 and padded < size + 128
    assert combined * width % 4 == 0 and (words in (1, 2, 4, 8) or words % 8 == 0)
