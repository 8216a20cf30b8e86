"""Requests come as asked for: at the rate, as bursty as vLLM's ``--burstiness`` has them, and the same for a seed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from spotjax.bench.arrivals import ArrivalKind, Arrivals, Seconds
from spotjax.errors import ConfigError


def drawn(kind: ArrivalKind, count: int, rate: float | None = None, burstiness: float | None = None) -> Seconds:
    return Arrivals(kind, rate, burstiness).draw(count, np.random.default_rng(7))


def test_all_come_at_once_or_in_equal_steps_from_one_step_on() -> None:
    assert drawn("all", 3).tolist() == [0, 0, 0]
    assert drawn("fixed", 4, rate=2).tolist() == [0.5, 1, 1.5, 2]


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_moments_and_the_shape_of_the_gamma_distribution(burstiness: float) -> None:
    rate, count = 3.0, 20_000
    times = drawn("poisson", count, rate) if burstiness == 1 else drawn("gamma", count, rate, burstiness)
    gaps = np.diff(times, prepend=0.0)
    assert gaps.mean() == pytest.approx(1 / rate)
    assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.03)
    assert stats.kstest(gaps, stats.gamma(burstiness, scale=1 / (rate * burstiness)).cdf).pvalue > 1e-3
    assert abs(np.corrcoef(gaps[:-1], gaps[1:])[0, 1]) < 0.03  # one gap says nothing of the next


def test_poisson_arrivals_in_seconds_are_as_many_on_average_as_their_variance() -> None:
    counts = np.bincount(drawn("poisson", 20_000, 5.0).astype(int))[:-1]
    assert counts.var() / counts.mean() == pytest.approx(1, abs=0.1)


@given(st.sampled_from(["fixed", "poisson", "gamma"]), st.integers(1, 300), st.floats(0.01, 1e4), st.floats(0.05, 50))
def test_the_last_of_n_requests_comes_at_n_over_the_rate_and_none_before_another(
    kind: ArrivalKind, count: int, rate: float, burstiness: float
) -> None:
    times = drawn(kind, count, rate, burstiness if kind == "gamma" else None)
    assert times[-1] == pytest.approx(count / rate) and (np.diff(times) >= 0).all() and times[0] >= 0


def test_poisson_is_gamma_of_burstiness_one() -> None:
    assert drawn("poisson", 50, 2.0).tolist() == drawn("gamma", 50, 2.0, 1.0).tolist()


@pytest.mark.parametrize(
    ("kind", "rate", "burstiness"),
    [("all", 1, None), ("fixed", None, None), ("poisson", 0, None), ("poisson", 1, 2), ("gamma", 1, None),
     ("gamma", 1, 0), ("poisson", float("inf"), None), ("trace", -1, None)],
)  # fmt: skip
def test_arrivals_of_no_meaning_are_refused(kind: ArrivalKind, rate: float | None, burstiness: float | None) -> None:
    with pytest.raises(ConfigError, match=r"--(rate|burstiness)"):
        Arrivals(kind, rate, burstiness)
