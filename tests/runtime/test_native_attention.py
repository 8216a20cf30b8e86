"""The native kernel for attention against XLA's over the same pages."""

from __future__ import annotations

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_attention_backends import CASES, Case, check, inputs, run

from spotjax.models.attention import Scoring
from spotjax.runtime.kv import StepInput
from spotjax.runtime.native.attention import NativeAttention
from spotjax.runtime.native.choice import native_kernels
from spotjax.runtime.native.library import NativeUnavailable

OTHERS = {
    "decode, groups of five, odd sizes": Case(10, 2, 37, 5, 9, ((40, 1), (4, 1), (11, 1)), Scoring(0.1)),
    "decode, pages of sixteen": Case(9, 3, 64, 16, 8, ((120, 1), (15, 1), (16, 1), (0, 1), (0, 0)), Scoring(0.125)),
    "chunks in blocks": Case(6, 2, 32, 16, 5, ((3, 40), (0, 61), (70, 9)), Scoring(0.1)),
    "chunk, window": Case(2, 2, 72, 4, 20, ((9, 50),), Scoring(0.1, window=11)),
}


@cache
def backend(case: Case) -> NativeAttention:
    try:
        return native_kernels().attention(case.head_size, case.page_size)
    except NativeUnavailable as reason:
        pytest.skip(f"no native kernels here: {reason}")


@pytest.mark.parametrize("name", [*CASES, *OTHERS])
def test_the_kernel_attends_as_xla_does(name: str) -> None:
    case = {**CASES, **OTHERS}[name]
    check(case, backend(case), jnp.dtype(jnp.float32), 3e-6)


@pytest.mark.parametrize("name", ["decode, window", "chunks", "decode, groups of five, odd sizes"])
def test_the_kernel_attends_in_bfloat16_as_xla_does(name: str) -> None:
    case = {**CASES, **OTHERS}[name]
    check(case, backend(case), jnp.dtype(jnp.bfloat16), 0.02)


@pytest.mark.parametrize("name", ["decode", "decode, pages of sixteen", "chunks in blocks"])
def test_a_row_does_not_depend_on_what_else_is_in_the_batch(name: str) -> None:
    case = {**CASES, **OTHERS}[name]
    content, step, *new = inputs(case, jnp.dtype(jnp.float32))
    together, _ = run(backend(case), case, content, step, *new)
    for row in range(len(case.rows)):
        picked = slice(row, row + 1)
        alone = StepInput(step.rows[picked], step.pages[picked])
        mixed, _ = run(backend(case), case, content, alone, *(array[picked] for array in new))
        valid = np.asarray(alone.valid)
        np.testing.assert_array_equal(np.asarray(mixed)[valid], np.asarray(together)[picked][valid])


def test_a_type_that_the_kernel_does_not_serve_is_left_to_xla() -> None:
    case = CASES["decode"]
    content, step, *new = inputs(case, jnp.dtype(jnp.float16))
    store = backend(case).store((content.keys, content.values), step)
    lowered = jax.jit(lambda *new: store.attend(*new, case.scoring)).lower(*new)
    assert backend(case).target not in lowered.as_text()
