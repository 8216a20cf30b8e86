"""Rows of a step that follows another are completed on the device, and drawn as if the host had known the tokens."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_cases import shared_heads

from spotjax.engine.batch import Batch, Span, ahead
from spotjax.engine.request import RequestState, SamplingParams
from spotjax.runtime.buckets import Buckets, StepShape
from spotjax.runtime.drawn import Drawn
from spotjax.runtime.sampling import drawn_tokens, drawn_width, fill_in
from spotjax.runtime.step import pack_step

STEPS = 3
BUCKETS = Buckets(max_batch=4, prefill_tokens=16, page_size=8, max_positions=64)


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_tokens_that_are_missing_are_those_that_were_drawn_and_others_stay(data: st.DataObject) -> None:
    result = np.array(data.draw(st.lists(st.integers(0, 999), min_size=8, max_size=8)), np.int32).reshape(4, 2)
    tokens = data.draw(st.lists(st.integers(-4, 999), min_size=3, max_size=3))
    rows = np.array([(7, 1, token) for token in tokens], np.int32)
    drawn = drawn_tokens(jnp.asarray(result))
    assert drawn.shape == (drawn_width(4),)
    expected = [(7, 1, token if token >= 0 else int(result[-1 - token, 0])) for token in tokens]
    assert np.asarray(fill_in(jnp.asarray(rows), drawn)).tolist() == [list(row) for row in expected]


def test_only_recent_steps_are_kept() -> None:
    drawn, device = Drawn(shared_heads()[0], STEPS), jax.devices()[0]
    for step in range(STEPS + 1):
        drawn.keep(step, jax.device_put(np.full(drawn_width(1), step, np.int32), device))
    rows = np.array([[3, 1, ahead(0)]], np.int32)
    assert np.asarray(drawn.fill_in(rows, STEPS, device)).tolist() == [[3, 1, STEPS]]
    with pytest.raises(KeyError):
        drawn.fill_in(rows, 0, device)


@pytest.mark.parametrize(
    "sampling", [SamplingParams(seed=5), SamplingParams(logprobs=2), SamplingParams(temperature=0)]
)
def test_who_runs_ahead_is_drawn_with_the_position_that_it_will_have(sampling: SamplingParams) -> None:
    known = RequestState("r", 0, (1, 2, 3), sampling, tokens=(4,))
    later, shape = replace(known, tokens=(4, 9)), StepShape(1, 1, 1)
    early = pack_step(Batch(2, (Span(0, (ahead(0),), 4, (1,), known, True),), follows=1), BUCKETS, shape)
    exact = pack_step(Batch(2, (Span(0, (9,), 4, (1,), later, True),)), BUCKETS, shape)
    columns = slice(0, 11)  # up to the position; lengths and tokens are penalties', which never run ahead
    np.testing.assert_array_equal(early.controls[:, columns], exact.controls[:, columns])
    assert early.rows.tolist() == [[4, 1, -1]] and exact.rows.tolist() == [[4, 1, 9]]
