"""Generators of arrivals and lengths have the statistics that they are asked for. Seeds are fixed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotjax.errors import ConfigError
from spotjax.sim.traces import arrivals
from spotjax.sim.workload import RequestTrace


def gap_cv(times: arrivals.Seconds) -> float:
    return RequestTrace.of("", times, 1, 1).gap_cv


@pytest.mark.parametrize(("cv", "tolerance"), [(0.25, 0.02), (1.0, 0.02), (6.0, 0.1)])
def test_gamma_arrivals_have_the_rate_and_the_true_coefficient_of_variation(cv: float, tolerance: float) -> None:
    times = arrivals.gamma(2.0, cv, 100_000, seed=0)
    assert len(times) / 100_000 == pytest.approx(2.0, rel=tolerance)
    assert gap_cv(times) == pytest.approx(cv, rel=tolerance)


def test_short_bursty_windows_expect_rate_times_length() -> None:
    """A process that began with an arrival would give 17.5 too many."""
    counts = [len(arrivals.gamma(0.35, 6.0, 300, seed)) for seed in range(4000)]
    assert np.mean(counts) == pytest.approx(0.35 * 300, abs=5)


def test_poisson_counts_vary_as_much_as_they_are() -> None:
    counts = [len(arrivals.poisson(1.0, 50, seed)) for seed in range(2000)]
    assert np.mean(counts) == pytest.approx(50, rel=0.02)
    assert np.var(counts) == pytest.approx(50, rel=0.1)


@pytest.mark.parametrize("rate", [0.35, 1.5, 3.0])
@pytest.mark.parametrize("cv", [1.0, 6.0, 12.0])
def test_what_the_artifact_calls_cv_is_nearly_regular(rate: float, cv: float) -> None:
    times = arrivals.artifact(rate, cv, 5000, seed=1)
    assert len(times) / 5000 == pytest.approx(rate, rel=0.01)
    assert gap_cv(times) == pytest.approx((cv * rate / 1000) ** 0.5, rel=0.07)


@pytest.mark.parametrize("cv", [0.5, 1.0])
def test_piecewise_rates_are_kept_in_every_piece(cv: float) -> None:
    rates = [5.0, 0.0, 20.0, 1.0]
    times = arrivals.piecewise(rates, 1000, cv, seed=2)
    counts, _ = np.histogram(times, np.arange(5) * 1000)
    assert counts[1] == 0
    assert counts / 1000 == pytest.approx(rates, rel=0.1)
    assert gap_cv(times[times < 1000]) == pytest.approx(cv, rel=0.05)


def test_one_piece_is_the_steady_process() -> None:
    assert arrivals.piecewise([2.0], 100, 3.0, 5) == pytest.approx(arrivals.gamma(2.0, 3.0, 100, 5))


def test_the_artifacts_pieces_follow_their_rates() -> None:
    times = arrivals.artifact_piecewise([0.5, 2.0], 600, 6.0, seed=3)
    assert ((times < 600).sum(), (times >= 600).sum()) == (pytest.approx(300, abs=5), pytest.approx(1200, abs=10))
    assert gap_cv(times[times > 610]) == pytest.approx((6 * 2 / 1000) ** 0.5, rel=0.07)


@given(st.floats(0.01, 50), st.floats(0.05, 8), st.floats(0.1, 100), st.integers(0, 99))
def test_arrivals_rise_within_the_time_and_a_seed_repeats_them(
    rate: float, cv: float, duration: float, seed: int
) -> None:
    for make in (arrivals.gamma, arrivals.artifact):
        times = make(rate, cv, duration, seed)
        assert times.tolist() == make(rate, cv, duration, seed).tolist()
        assert (np.diff(times) >= 0).all()
        assert ((times >= 0) & (times < duration)).all()
    pieces = arrivals.piecewise([rate, 0.0, rate], duration, cv, seed)
    assert (np.diff(pieces) >= 0).all()
    assert not ((pieces > duration * 1.0001) & (pieces < duration * 1.9999)).any()


def test_seeds_differ_and_a_generator_goes_on() -> None:
    assert arrivals.poisson(1, 100, 1).tolist() != arrivals.poisson(1, 100, 2).tolist()
    generator = np.random.default_rng(1)
    first, second = (arrivals.poisson(1, 100, generator).tolist() for _ in range(2))
    assert first == arrivals.poisson(1, 100, 1).tolist()
    assert first != second


@pytest.mark.parametrize(("mean", "cv"), [(512, 1.0), (128, 0.3), (28, 2.0)])
def test_lognormal_lengths_have_the_mean_and_the_cv(mean: float, cv: float) -> None:
    lengths = arrivals.lognormal(mean, cv, 400_000, seed=0)
    assert lengths.mean() == pytest.approx(mean, rel=0.03)
    assert lengths.std() / lengths.mean() == pytest.approx(cv, rel=0.05)


def test_lengths_are_whole_tokens_within_their_limits() -> None:
    lengths = arrivals.lognormal(3, 3.0, 10_000, seed=0, most=100)
    assert (lengths.min(), lengths.max()) == (1, 100)
    assert lengths.dtype == np.int64
    assert arrivals.lognormal(128, 0, 4, seed=0).tolist() == [128] * 4


@pytest.mark.parametrize(
    "make",
    [
        lambda: arrivals.gamma(0, 1, 10, 0),
        lambda: arrivals.gamma(1, 0, 10, 0),
        lambda: arrivals.gamma(1, 1, float("inf"), 0),
        lambda: arrivals.artifact(1, float("nan"), 10, 0),
        lambda: arrivals.artifact_piecewise([1, 0], 10, 6, 0),
        lambda: arrivals.piecewise([], 10, 1, 0),
        lambda: arrivals.piecewise([0, 0], 10, 1, 0),
        lambda: arrivals.piecewise([1, -1], 10, 1, 0),
        lambda: arrivals.piecewise([1], 0, 1, 0),
        lambda: arrivals.lognormal(0.5, 1, 10, 0),
        lambda: arrivals.lognormal(5, -1, 10, 0),
        lambda: arrivals.lognormal(5, 1, 10, 0, most=0),
    ],
)
def test_numbers_that_make_no_process_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(ConfigError, match="must be"):
        make()
