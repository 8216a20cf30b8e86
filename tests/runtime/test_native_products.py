"""The native kernels against numpy in float64, in threads, and in compiled programs on meshes."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_cases import (
    LONGER,
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
from spotjax.models.projection import BY_XLA
from spotjax.models.quantized import Matrix, Quantized
from spotjax.runtime.buckets import StepShape
from spotjax.runtime.compiled import CompiledModel
from spotjax.runtime.native.choice import native_kernels
from spotjax.runtime.native.library import NativeUnavailable
from spotjax.runtime.native.products import MOST_SCORED, NativeProducts

KINDS = ("float32", "bfloat16", "int8 and float32", "int8 and bfloat16")
FEW = 32
"""Rows up to which they are bound by reading the matrix; more have a kernel of their own."""
CASE = "llama-gqa-linear-bias"


@cache
def kernel() -> NativeProducts:
    """On machines without a compiler the tests of ``test_native_library.py`` say what happens instead."""
    try:
        return native_kernels().products
    except NativeUnavailable as reason:
        pytest.skip(f"no native kernel here: {reason}")


def operands(kind: str, rows: int, shape: tuple[int, int], transposed: bool, seed: int = 0) -> tuple[Any, Matrix]:
    """x (rows, depth) and a matrix of ``shape`` (depth, width), lying transposed if told."""
    chance, dtype = np.random.default_rng(seed), jnp.dtype(kind.rpartition(" ")[2])
    depth, width = shape
    x = jnp.asarray(chance.standard_normal((rows, depth)), dtype)
    lying = (width, depth) if transposed else shape
    if kind.startswith("int8"):
        values = jnp.asarray(chance.integers(-127, 128, lying), jnp.int8)
        return x, Quantized(values, jnp.asarray(chance.random(width) / 64, jnp.float32), dtype)
    return x, jnp.asarray(chance.standard_normal(lying), dtype)


def check(kind: str, rows: int, shape: tuple[int, int], transposed: bool) -> None:
    """The kernel's product against that of float64, relative to what was added up."""
    x, matrix = operands(kind, rows, shape, transposed)
    found = kernel().score(x, matrix, transposed=True) if transposed else kernel().project(x, [matrix])[0]
    assert found.dtype == (jnp.float32 if transposed else x.dtype)
    plain = matrix.values if isinstance(matrix, Quantized) else matrix
    exact = np.asarray(plain, np.float64).T if transposed else np.asarray(plain, np.float64)
    if isinstance(matrix, Quantized):
        exact = exact * np.asarray(matrix.scale, np.float64)
    inputs = np.asarray(x, np.float64)
    step = float(jnp.finfo(x.dtype).eps)
    allowed = np.abs(inputs) @ np.abs(exact) * (shape[0] ** 0.5 + 4) * 2.0**-24 + step * np.abs(inputs @ exact)
    assert (np.abs(np.asarray(found, np.float64) - inputs @ exact) <= allowed + 1e-30).all()


@settings(max_examples=25, derandomize=True)
@given(st.sampled_from(KINDS), st.integers(1, 3 * FEW), st.integers(1, 400), st.integers(1, 200), st.booleans())
def test_products_of_any_shape_are_those_of_float64(
    kind: str, rows: int, depth: int, width: int, transposed: bool
) -> None:
    check(kind, rows, (depth, width), transposed)


@pytest.mark.parametrize("transposed", [False, True], ids=["depth-first", "width-first"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("rows", "shape"), [(1, (1537, 577)), (7, (130, 8209)), (32, (2048, 65)), (100, (1050, 700)), (600, (20, 40))]
)
def test_large_matrices_are_divided_without_a_gap(
    kind: str, rows: int, shape: tuple[int, int], transposed: bool
) -> None:
    check(kind, rows, shape, transposed)


def product(x: jax.Array, matrix: Matrix, transposed: bool = False) -> np.ndarray:
    """That of one kernel."""
    found = kernel().score(x, matrix, transposed=True) if transposed else kernel().project(x, [matrix])[0]
    return np.asarray(found)


@pytest.mark.parametrize("transposed", [False, True], ids=["depth-first", "width-first"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_what_else_is_in_the_batch(kind: str, transposed: bool) -> None:
    rows = MOST_SCORED if transposed else 5 * FEW
    x, matrix = operands(kind, rows, (700, 333), transposed)
    whole = product(x, matrix, transposed)
    for first, last in ((0, 1), (5, 8), (8, 15), (15, FEW), (15, 60), (40, 46), (20, rows)):
        some = x[first:last]
        if len(some):
            np.testing.assert_array_equal(product(some, matrix, transposed), whole[first:last])


@pytest.mark.parametrize("shape", [(1100, 8200), (9000, 70), (3, 70)], ids=str)
def test_few_rows_give_the_same_bits_as_many_however_a_matrix_is_divided(shape: tuple[int, int]) -> None:
    x, matrix = operands("float32", 40, shape, False)
    whole = product(x, matrix)
    for first in range(0, 40, 20):
        np.testing.assert_array_equal(product(x[first : first + 20], matrix), whole[first : first + 20])


@settings(max_examples=15, derandomize=True, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=5), st.integers(1, 40), st.sampled_from(KINDS))
def test_padding_gives_zeros_and_changes_nothing_else(lengths: list[int], span: int, kind: str) -> None:
    x, matrix = operands(kind, len(lengths) * span, (150, 70), False)
    rows = x.reshape(len(lengths), span, -1)
    valid = np.arange(span)[None] < np.array(lengths)[:, None]
    bounded = kernel().without_padding(jnp.asarray(lengths, jnp.int32))
    found = np.asarray(bounded.project(rows, [matrix])[0])
    whole = product(x, matrix).reshape(found.shape)
    np.testing.assert_array_equal(found, np.where(valid[..., None], whole, np.zeros((), whole.dtype)))


def test_what_is_padding_is_not_looked_at() -> None:
    x, matrix = operands("float32", 120, (150, 70), False)
    rows = x.reshape(2, 60, 150).at[0, 50:].set(jnp.nan).at[1, 7:].set(jnp.inf)
    found = kernel().without_padding(jnp.asarray([50, 7], jnp.int32)).project(rows, [matrix])[0]
    assert np.isfinite(np.asarray(found)).all()


def test_several_kernels_at_once_give_what_each_gives_alone() -> None:
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 3, 5, 8)), jnp.float32)
    shapes = [(5, 8, 6, 16), (5, 8, 96), (5, 8, 1)]
    kernels: list[Matrix] = [jnp.asarray(np.random.default_rng(2).standard_normal(s), jnp.float32) for s in shapes]
    together = kernel().project(x, kernels, inputs=2)
    for found, matrix, plain in zip(together, kernels, BY_XLA.project(x, kernels, inputs=2), strict=True):
        np.testing.assert_array_equal(found, kernel().project(x, [matrix], inputs=2)[0])
        np.testing.assert_allclose(found, plain, atol=1e-4)


def test_what_the_kernel_does_not_serve_is_left_to_xla() -> None:
    matrix = jnp.ones((8, 4), jnp.float32)
    for x, weights in [
        (jnp.ones((0, 8), jnp.float32), matrix),
        (jnp.ones((2, 8), jnp.float16), matrix.astype(jnp.float16)),
    ]:
        lowered = jax.jit(lambda x, weights: kernel().project(x, [weights])[0]).lower(x, weights)
        assert kernel().target not in lowered.as_text()
        np.testing.assert_array_equal(kernel().project(x, [weights])[0], x @ weights)


def test_threads_on_all_devices_get_their_own_products() -> None:
    compute = jax.jit(lambda x, first, second: kernel().project(x, [first, second]))
    cases = [operands("float32", rows, (300, 640), False, rows) for rows in range(1, 9)]
    expected = [np.asarray(compute(x, matrix, matrix)[0]) for x, matrix in cases]
    start = threading.Barrier(len(cases))

    def run(number: int) -> None:
        x, matrix = jax.device_put(cases[number], jax.devices()[number])
        start.wait()
        for _ in range(20):
            for found in compute(x, matrix, matrix):
                np.testing.assert_array_equal(found, expected[number])

    with ThreadPoolExecutor(len(cases)) as threads:
        for done in [threads.submit(run, number) for number in range(len(cases))]:
            done.result(120)


@pytest.mark.parametrize("mesh", [MeshShape(2, 2, 2), MeshShape(1, 1, 3)], ids=str)
def test_greedy_tokens_equal_hugging_face(mesh: MeshShape) -> None:
    expected = golden(CASE)
    spec, products = checkpoint(CASE).spec, kernel()
    attention = native_kernels().attention(spec.config.head_size, PAGE_SIZE)
    model = CompiledModel(spec, PAGES, PAGE_SIZE, POSITIONS, jnp.float32, attention=attention, products=products)
    pipelines = build_pipelines(model, checkpoint(CASE), mesh, buckets=LONGER, fuse=True)
    prompts = [expected[f"prompt_{number}"] for number in range(3)]
    found = generate(pipelines, [greedy(prompt, len(expected["greedy_0"])) for prompt in prompts])
    for number, state in enumerate(found):
        np.testing.assert_array_equal(state.tokens, expected[f"greedy_{number}"])


def test_compiled_programs_find_the_kernel_again_and_only_those_made_for_it(tmp_path: Path) -> None:
    _, weights = random_weights(SHARED_HEADS)
    shape, rows, pages = StepShape(1, 1, 8), np.array([[0, 1, 5]], np.int32), np.zeros((1, 8), np.int32)
    pages[0, 0] = 1

    def run(products: Any, number: int) -> tuple[int, np.ndarray]:
        model = CompiledModel(weights.spec, PAGES, PAGE_SIZE, POSITIONS, jnp.float32, tmp_path, products=products)
        stage = build_stage(model, weights, jax.devices()[2 * number : 2 * number + 2], stages=1, number=0)
        logits = np.asarray(stage.run(shape, rows, pages, None))
        return model.executables.compiled, logits

    compiled, first = run(kernel(), 0)
    assert compiled > 0
    again, second = run(kernel(), 1)
    assert again == 0
    np.testing.assert_array_equal(first, second)
    plain, third = run(BY_XLA, 2)
    assert plain > 0
    np.testing.assert_allclose(third, first, atol=4e-5)
