"""Sampling on the device against a slow reference in numpy; a draw depends on its counters alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from spotjax.engine.request import MAX_LOGIT_BIAS, MAX_LOGPROBS, RequestState, Sampled, SamplingParams
from spotjax.engine.structure import Masks
from spotjax.runtime.controls import Variant, mask_words, pack_controls, spread_masks, unpack, variant_for
from spotjax.runtime.sampling import Controls, _filter, _penalise, most_likely, restrict, sample, with_logprobs

VOCAB, POSITIONS, ROWS = 40, 32, 6


@cache
def function(name: str) -> Callable[..., jax.Array]:
    """A jitted piece of sampling."""
    pieces = {variant: partial(sample, variant) for variant in Variant}
    pieces["filter"] = lambda logits, packed: _filter(logits, Controls(packed))
    pieces["penalise"] = lambda logits, packed: _penalise(logits, Controls(packed))
    return jax.jit(pieces[name])


def state(
    sampling: SamplingParams, prompt: Sequence[int] = (1,), tokens: Sequence[int] = (), choice: int = 0
) -> RequestState:
    return RequestState("request", choice, tuple(prompt), sampling, tokens=tuple(tokens))


def draw(logits: np.ndarray, states: Sequence[RequestState | None], variant: Variant) -> list[Sampled | None]:
    """One draw per row; rows are padded to ROWS."""
    padded = np.zeros((ROWS, VOCAB), np.float32)
    padded[: len(logits)] = logits
    rows = [*states, *[None] * (ROWS - len(states))]
    packed = pack_controls(rows, variant, POSITIONS)
    return unpack(np.asarray(function(variant)(jnp.asarray(padded), jnp.asarray(packed))), rows)[: len(states)]


def tokens(logits: np.ndarray, states: Sequence[RequestState], variant: Variant) -> list[int]:
    return [sampled.token for sampled in draw(logits, states, variant) if sampled is not None]


@pytest.mark.parametrize("vocab", [1, 40, 256, 1000])
def test_the_most_likely_token_is_the_first_of_the_largest(vocab: int) -> None:
    few = np.random.default_rng(vocab).integers(0, 3, (64, vocab)).astype(np.float32)  # ties in every row
    few[1], few[2] = -np.inf, np.where(np.arange(vocab) == vocab - 1, np.float32(-5), -np.inf)
    np.testing.assert_array_equal(jax.jit(most_likely)(jnp.asarray(few)), np.argmax(few, axis=1))


def kept(logits: np.ndarray, s: SamplingParams) -> set[int]:
    """Token ids that survive top-k, then top-p, then min-p, by sorting, in float64. Ties at a threshold all stay."""
    scaled = logits.astype(np.float64) / s.temperature
    ids = set(range(len(scaled)))
    if s.top_k:
        threshold = sorted(scaled, reverse=True)[min(s.top_k, len(scaled)) - 1]
        ids = {i for i in ids if scaled[i] >= threshold}
    weights = {i: np.exp(scaled[i] - scaled.max()) for i in ids}
    total = sum(weights.values())
    if s.top_p < 1:
        mass = 0.0
        for i in sorted(ids, key=lambda i: -scaled[i]):
            mass += weights[i] / total
            threshold = scaled[i]
            if mass >= s.top_p:
                break
        ids = {i for i in ids if scaled[i] >= threshold}
    best = max(weights[i] for i in ids)
    return {i for i in ids if weights[i] >= s.min_p * best}


def clear_cut(logits: np.ndarray, s: SamplingParams) -> bool:
    """Whether a slightly different top-p and min-p keep the same: else rounding decides."""
    nudged = [
        SamplingParams(
            temperature=s.temperature,
            top_k=s.top_k,
            top_p=min(1.0, s.top_p * (1 + sign * 1e-4)) if s.top_p < 1 else 1.0,
            min_p=min(1.0, s.min_p * (1 + sign * 1e-4)),
        )
        for sign in (-1, 1)
    ]
    return all(kept(logits, other) == kept(logits, s) for other in nudged)


samplings = st.builds(
    SamplingParams,
    temperature=st.floats(0.2, 3.0),
    top_k=st.sampled_from([0, 1, 2, 7, 39, 40, 41, 2**40]),
    top_p=st.sampled_from([1.0, 0.99, 0.9, 0.5, 0.1, 1e-6]),
    min_p=st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]),
)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(samplings, min_size=1, max_size=ROWS), seed=st.integers(0, 2**32 - 1))
def test_filters_keep_exactly_what_a_sort_keeps(rows: list[SamplingParams], seed: int) -> None:
    logits = np.random.default_rng(seed).normal(0, 2, (ROWS, VOCAB)).astype(np.float32)
    logits[:, 3] = logits[:, 11]  # a tie
    packed = pack_controls([*map(state, rows), *[None] * (ROWS - len(rows))], Variant.RANDOM, POSITIONS)
    temperatures = np.array([row.temperature for row in rows] + [1.0] * (ROWS - len(rows)), np.float32)
    filtered = np.asarray(function("filter")(jnp.asarray(logits / temperatures[:, None]), jnp.asarray(packed)))
    for row, sampling in enumerate(rows):
        if clear_cut(logits[row], sampling):
            assert set(np.flatnonzero(np.isfinite(filtered[row])).tolist()) == kept(logits[row], sampling)


def test_a_mass_that_rounding_cannot_reach_keeps_everything() -> None:
    sampling = SamplingParams(top_p=float(np.nextafter(np.float32(1), np.float32(0))))
    packed = pack_controls([state(sampling)] * ROWS, Variant.RANDOM, POSITIONS)
    filtered = function("filter")(jnp.zeros((ROWS, VOCAB)), jnp.asarray(packed))
    assert np.isfinite(np.asarray(filtered)).all()


penalties = st.builds(
    SamplingParams,
    repetition_penalty=st.sampled_from([1.0, 0.5, 1.3, 10.0]),
    presence_penalty=st.sampled_from([0.0, -2.0, 0.7]),
    frequency_penalty=st.sampled_from([0.0, -1.0, 0.3]),
    logit_bias=st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-100, 100, width=32), max_size=5),
)
sequences = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=POSITIONS // 2)


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.tuples(penalties, sequences, sequences), min_size=1, max_size=ROWS), seed=st.integers(0, 1000))
def test_penalties_and_bias_equal_a_loop_over_tokens(
    rows: list[tuple[SamplingParams, list[int], list[int]]], seed: int
) -> None:
    logits = np.random.default_rng(seed).normal(0, 2, (ROWS, VOCAB)).astype(np.float32)
    states = [state(*row) for row in rows]
    packed = pack_controls([*states, *[None] * (ROWS - len(rows))], Variant.FULL, POSITIONS)
    found = np.asarray(function("penalise")(jnp.asarray(logits), jnp.asarray(packed)))
    for row, (s, prompt, output) in enumerate(rows):
        expected = logits[row].astype(np.float64)
        for token in set(prompt) | set(output):
            penalty = s.repetition_penalty
            expected[token] = expected[token] / penalty if expected[token] > 0 else expected[token] * penalty
        for token in output:
            expected[token] -= s.frequency_penalty
        for token in set(output):
            expected[token] -= s.presence_penalty
        for token, bias in s.logit_bias.items():
            expected[token] += bias
        np.testing.assert_allclose(found[row], expected, atol=1e-4)
    np.testing.assert_array_equal(found[len(rows) :], logits[len(rows) :])


def test_as_many_biases_as_allowed_all_count() -> None:
    vocab = MAX_LOGIT_BIAS + 50
    sampling = SamplingParams(temperature=0, logit_bias=dict.fromkeys(range(MAX_LOGIT_BIAS), -100.0))
    packed = pack_controls([state(sampling)], Variant.FULL, POSITIONS)
    found = np.asarray(function("penalise")(jnp.ones((1, vocab)), jnp.asarray(packed)))[0]
    np.testing.assert_array_equal(found, [-99.0] * MAX_LOGIT_BIAS + [1.0] * 50)


@pytest.mark.parametrize("wanted", [0, 1, 5, MAX_LOGPROBS])
def test_logprobs_are_those_of_the_untouched_distribution(wanted: int) -> None:
    logits = np.random.default_rng(wanted).normal(0, 3, (1, VOCAB)).astype(np.float32)
    sampling = SamplingParams(
        temperature=0.5, top_k=3, presence_penalty=1.0, logit_bias={5: 9.0}, logprobs=wanted, seed=4
    )
    (sampled,) = draw(logits, [state(sampling, [5, 6], [7])], Variant.FULL)
    wide = logits[0].astype(np.float64)
    expected = wide - wide.max() - np.log(np.exp(wide - wide.max()).sum())
    assert sampled is not None and sampled.logprobs is not None
    assert sampled.logprobs.token == pytest.approx(expected[sampled.token], abs=1e-5)
    best = np.argsort(-expected)[:wanted]
    assert [token for token, _ in sampled.logprobs.top] == best.tolist()
    np.testing.assert_allclose([value for _, value in sampled.logprobs.top], expected[best], atol=1e-5)


def test_a_vocabulary_smaller_than_the_reported_tokens_is_reported_in_full() -> None:
    sampling = SamplingParams(temperature=0, logprobs=3)
    packed = pack_controls([state(sampling)], Variant.FULL, POSITIONS)
    result = function(Variant.FULL)(jnp.asarray([[0.0, 2.0, 1.0]]), jnp.asarray(packed))
    (sampled,) = unpack(np.asarray(result), [state(sampling)])
    assert sampled is not None and sampled.logprobs is not None
    assert [token for token, _ in sampled.logprobs.top] == [1, 2, 0]


def test_a_greedy_row_gives_the_most_likely_token_in_every_variant() -> None:
    logits = np.random.default_rng(0).normal(size=(ROWS, VOCAB)).astype(np.float32)
    rows = [state(SamplingParams(temperature=0, top_p=0.3, seed=row)) for row in range(ROWS)]
    for variant in Variant:
        assert tokens(logits, rows, variant) == np.argmax(logits, axis=1).tolist()


def test_a_draw_is_the_same_in_any_row_batch_and_variant() -> None:
    generator = np.random.default_rng(1)
    logits = generator.normal(size=(ROWS, VOCAB)).astype(np.float32)
    rows = [
        state(SamplingParams(temperature=1.5, seed=row * 2**33 + 1, top_p=0.95), [1] * (row + 1), choice=row)
        for row in range(ROWS)
    ]
    together = tokens(logits, rows, Variant.RANDOM)
    assert tokens(logits, rows, Variant.FULL) == together
    order = generator.permutation(ROWS)
    assert tokens(logits[order], [rows[row] for row in order], Variant.RANDOM) == [together[row] for row in order]
    for row in range(ROWS):
        assert tokens(logits[row : row + 1], [rows[row]], Variant.FULL) == [together[row]]
        packed = pack_controls([rows[row]], Variant.RANDOM, POSITIONS)  # a batch of one row
        alone = function(Variant.RANDOM)(jnp.asarray(logits[row : row + 1]), jnp.asarray(packed))
        assert int(alone[0, 0]) == together[row]


@pytest.mark.parametrize(
    "other",
    [
        state(SamplingParams(seed=7 + 2**32), [1, 2]),
        state(SamplingParams(seed=7 + 2**63), [1, 2]),
        state(SamplingParams(seed=8), [1, 2]),
        state(SamplingParams(seed=7), [1, 2], choice=1),
        state(SamplingParams(seed=7), [1, 2, 3]),
        state(SamplingParams(seed=7), [1, 2], [3]),
    ],
    ids=["seed above 32 bits", "highest seed bit", "seed", "choice", "prompt length", "output length"],
)
def test_each_counter_changes_the_draws(other: RequestState) -> None:
    flat = np.zeros((1, 4096), np.float32)

    def one(state: RequestState) -> int:
        packed = pack_controls([state], Variant.RANDOM, POSITIONS)
        return int(flat_draw(jnp.asarray(flat), jnp.asarray(packed))[0, 0])

    flat_draw = function(Variant.RANDOM)
    assert one(state(SamplingParams(seed=7), [1, 2])) != one(other)
    assert one(other) == one(other)


def test_a_draw_counts_positions_not_where_prompt_and_output_meet() -> None:
    logits = np.zeros((1, VOCAB), np.float32)
    sampling = SamplingParams(seed=3)
    assert tokens(logits, [state(sampling, [1, 2, 3])], Variant.RANDOM) == tokens(
        logits, [state(sampling, [1, 2], [3])], Variant.RANDOM
    )


@pytest.mark.parametrize("vary", ["seed", "choice", "position"])
def test_draws_follow_the_filtered_distribution(vary: str) -> None:
    logits = np.array([2.0, 1.0, 0.5, 0.0, -0.5, -1.0, -8.0, -9.0], np.float32)
    count, options = 4000, {"temperature": 0.8, "top_k": 6, "top_p": 0.97}
    states = [
        state(
            SamplingParams(**options, seed=number if vary == "seed" else 1),
            [0] * (number + 1 if vary == "position" else 1),
            choice=number if vary == "choice" else 0,
        )
        for number in range(count)
    ]
    packed = pack_controls(states, Variant.RANDOM, POSITIONS)
    drawn = np.asarray(function(Variant.RANDOM)(jnp.tile(logits, (count, 1)), jnp.asarray(packed)))[:, 0]
    ids = sorted(kept(logits, SamplingParams(**options)))
    assert len(ids) < 6 and set(drawn.tolist()) == set(ids)
    weights = np.exp(logits[ids].astype(np.float64) / 0.8)
    observed = np.array([(drawn == token).sum() for token in ids])
    assert chisquare(observed, count * weights / weights.sum()).pvalue > 1e-3


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([SamplingParams(temperature=0)], Variant.GREEDY),
        ([SamplingParams(temperature=0), SamplingParams(temperature=1.0)], Variant.RANDOM),
        ([SamplingParams(temperature=0, logprobs=0)], Variant.FULL),
        ([SamplingParams(), SamplingParams(presence_penalty=0.1)], Variant.FULL),
        ([SamplingParams(), SamplingParams(frequency_penalty=-0.1)], Variant.FULL),
        ([SamplingParams(repetition_penalty=0.9)], Variant.FULL),
        ([SamplingParams(logit_bias={1: 1.0})], Variant.FULL),
        ([], Variant.GREEDY),
    ],
)
def test_a_step_uses_the_least_variant_that_serves_all_its_rows(rows: list[SamplingParams], expected: Variant) -> None:
    assert variant_for(rows) is expected


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 97])
def test_a_mask_leaves_the_tokens_whose_bits_are_set(vocab: int) -> None:
    draw = np.random.default_rng(vocab)
    logits = draw.normal(size=(3, vocab)).astype(np.float32)
    words = draw.integers(-(2**31), 2**31, (3, mask_words(vocab)), np.int64).astype(np.int32)
    bits = np.array([[int(words[row, t // 32]) >> t % 32 & 1 for t in range(vocab)] for row in range(3)])
    expected = np.where(bits, logits, -np.inf)
    np.testing.assert_array_equal(jax.jit(restrict)(logits, words), expected)


def test_rows_without_a_structure_may_draw_anything() -> None:
    words = spread_masks(Masks((2, 0), np.array([[5, 6], [7, 8]], np.int32), {}), 4)
    np.testing.assert_array_equal(words, np.array([[7, 8], [-1, -1], [5, 6], [-1, -1]], np.int32))


@pytest.mark.parametrize("variant", Variant)
def test_draws_within_a_mask_are_those_of_a_model_that_knows_no_other_tokens(variant: Variant) -> None:
    draw_, few = np.random.default_rng(5), [3, 8, 17, 33, 39]
    logits = draw_.normal(0, 3, (ROWS, VOCAB)).astype(np.float32)
    words = np.zeros((ROWS, mask_words(VOCAB)), np.int32)
    for token in few:
        words[:, token // 32] |= np.array(1 << token % 32, np.uint32).astype(np.int32)
    within = np.asarray(restrict(jnp.asarray(logits), jnp.asarray(words)))
    sampling = SamplingParams(
        temperature=0 if variant is Variant.GREEDY else 1.3,
        top_p=0.9,
        top_k=3,
        logit_bias={1: 100.0, 8: 1.0} if variant is Variant.FULL else {},
    )
    states = [state(replace(sampling, seed=seed), tokens=(3, 8, 8)) for seed in range(ROWS)]
    drawn = tokens(within, states, variant)
    assert set(drawn) <= set(few)
    if variant is Variant.GREEDY:
        assert drawn == [max(few, key=lambda token: logits[row, token]) for row in range(ROWS)]


def test_logprobs_within_a_mask_are_those_of_the_untouched_distribution() -> None:
    logits = np.random.default_rng(6).normal(0, 3, (ROWS, VOCAB)).astype(np.float32)
    states = [state(SamplingParams(logprobs=4, temperature=0)) for _ in range(ROWS)]
    chosen = np.arange(ROWS, dtype=np.int32) * 5
    reported = unpack(np.asarray(with_logprobs(jnp.asarray(logits), jnp.asarray(chosen))), states)
    exact = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum(axis=1, keepdims=True))
    for row, sampled in enumerate(reported):
        assert sampled is not None and sampled.logprobs is not None and sampled.token == chosen[row]
        np.testing.assert_allclose(sampled.logprobs.token, exact[row, chosen[row]], atol=1e-5)
        assert [token for token, _ in sampled.logprobs.top] == np.argsort(-exact[row])[:4].tolist()
