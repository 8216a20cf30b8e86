"""Packing a batch loses nothing that stages need, and needs no jax."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotjax.engine.batch import Batch, Span
from spotjax.engine.request import MAX_LOGPROBS, Logprobs, RequestState, Sampled, SamplingParams
from spotjax.runtime.buckets import Buckets, StepShape
from spotjax.runtime.controls import FIELDS, Variant, controls_width
from spotjax.runtime.step import pack_step, step_shape, unpack_result

BUCKETS = Buckets(max_batch=4, prefill_tokens=32, page_size=8, max_positions=512)
SAMPLINGS = {
    Variant.GREEDY: SamplingParams(temperature=0),
    Variant.RANDOM: SamplingParams(seed=5),
    Variant.FULL: SamplingParams(logprobs=1),
}
token_ids = st.integers(0, 2**31 - 1)


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """All decode or all prefill, as the scheduler makes them."""
    decode = draw(st.booleans())
    rows = draw(st.integers(1, BUCKETS.max_batch)) if decode else draw(st.integers(1, 2))
    longest = 1 if decode else 16
    spans = []
    for sequence in draw(st.lists(st.integers(0, 2**40), min_size=rows, max_size=rows, unique=True)):
        start = draw(st.integers(0, BUCKETS.max_positions - longest))
        tokens = tuple(draw(st.lists(token_ids, min_size=1, max_size=longest)))
        count = -(-(start + len(tokens)) // BUCKETS.page_size)
        pages = tuple(draw(st.lists(st.integers(1, 999), min_size=count, max_size=count)))
        state = RequestState("request", 0, tokens, SAMPLINGS[draw(st.sampled_from(Variant))])
        spans.append(Span(sequence, tokens, start, pages, state, decode or draw(st.booleans())))
    return Batch(draw(st.integers(0, 2**40)), tuple(spans))


@given(batch=batches(), fine=st.booleans())
def test_every_span_is_in_its_row_and_padding_rows_are_empty(batch: Batch, fine: bool) -> None:
    shape = step_shape(batch, BUCKETS, fine)
    packed = pack_step(batch, BUCKETS, shape)
    assert packed.shape == shape
    assert (packed.rows.shape, packed.pages.shape) == ((shape.rows, 2 + shape.span), (shape.rows, shape.pages))
    assert packed.controls.shape == (shape.rows, controls_width(packed.variant, BUCKETS.max_positions))
    assert {packed.rows.dtype, packed.pages.dtype, packed.controls.dtype} == {np.dtype(np.int32)}
    for row, span in enumerate(batch.spans):
        start, length, *tokens = packed.rows[row].tolist()
        assert (start, tuple(tokens[:length])) == (span.start, span.tokens)
        used = len(span.pages)
        assert tuple(packed.pages[row, :used].tolist()) == span.pages and not packed.pages[row, used:].any()
    assert not packed.rows[len(batch.spans) :].any() and not packed.pages[len(batch.spans) :].any()
    wanted = [
        variant for variant in Variant for s in batch.spans if s.samples and s.state.sampling is SAMPLINGS[variant]
    ]
    assert packed.variant is (wanted[-1] if wanted else Variant.GREEDY)


@given(batch=batches())
def test_a_fine_shape_is_never_larger_than_the_one_compiled_at_boot(batch: Batch) -> None:
    fine, common = step_shape(batch, BUCKETS, fine=True), step_shape(batch, BUCKETS, fine=False)
    assert fine[:2] == common[:2] and fine.pages <= common.pages
    assert (common.span == 1) == all(len(span.tokens) == 1 for span in batch.spans)


@given(batch=batches())
def test_only_rows_that_sample_have_controls(batch: Batch) -> None:
    packed = pack_step(batch, BUCKETS, step_shape(batch, BUCKETS, fine=False))
    lengths = packed.controls[:, FIELDS.index("length")].tolist()
    expected = [span.state.length if span.samples else 0 for span in batch.spans]
    assert lengths == expected + [0] * (packed.shape.rows - len(batch.spans))


@given(batch=batches(), data=st.data())
def test_a_result_goes_to_the_sequences_that_sample(batch: Batch, data: st.DataObject) -> None:
    packed = pack_step(batch, BUCKETS, step_shape(batch, BUCKETS, fine=False))
    rows = packed.shape.rows
    result = np.full((rows, 2 + 2 * MAX_LOGPROBS if packed.variant is Variant.FULL else 1), -1, np.int32)
    result[:, 0] = drawn = data.draw(st.lists(token_ids, min_size=rows, max_size=rows))
    if packed.variant is Variant.FULL:
        result.view(np.float32)[:, [1, 2 + MAX_LOGPROBS]] = [-0.5, -0.25]
        result[:, 2] = 7
    unpacked = unpack_result(batch, result)
    assert unpacked.step == batch.step
    assert unpacked.sampled == {
        span.sequence: Sampled(token, None if span.state.sampling.logprobs is None else Logprobs(-0.5, ((7, -0.25),)))
        for span, token in zip(batch.spans, drawn, strict=False)
        if span.samples
    }


def test_a_batch_that_no_shape_holds_is_refused() -> None:
    state = RequestState("request", 0, (1,), SamplingParams())
    spans = tuple(Span(sequence, (1,), 0, (1,), state, True) for sequence in range(BUCKETS.max_batch + 1))
    with pytest.raises(ValueError, match="5 rows of 1 positions with 1 pages"):
        step_shape(Batch(0, spans), BUCKETS, fine=False)


def test_packing_at_a_shape_keeps_that_shape() -> None:
    state = RequestState("request", 0, (3,), SamplingParams(temperature=0))
    packed = pack_step(Batch(0, (Span(1, (3,), 0, (9,), state, True),)), BUCKETS, StepShape(4, 1, 6))
    assert packed.rows.tolist() == [[0, 1, 3], *[[0, 0, 0]] * 3]
    assert packed.pages.tolist() == [[9, 0, 0, 0, 0, 0], *[[0] * 6] * 3]


def test_steps_are_packed_without_jax() -> None:
    code = "import sys, spotjax.runtime.step, spotjax.runtime.controls; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
