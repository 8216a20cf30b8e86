import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from spotjax.sim.statistics import mean_interval, paired_ratio

values = st.lists(st.floats(0.01, 1e4), min_size=2, max_size=12)


@given(values, st.sampled_from([0.8, 0.95, 0.99]))
def test_the_interval_is_that_of_students_t(numbers: list[float], confidence: float) -> None:
    got = mean_interval(numbers, confidence)
    assert got.mean == pytest.approx(np.mean(numbers)) and got.count == len(numbers)
    spread = stats.sem(numbers)
    if spread > 1e-9 * got.mean:
        low, high = stats.t.interval(confidence, len(numbers) - 1, loc=np.mean(numbers), scale=spread)
        assert (got.low, got.high) == (pytest.approx(low), pytest.approx(high))


def test_five_seeds_have_the_interval_of_the_table() -> None:
    got = mean_interval([1, 2, 3, 4, 5])  # t(0.975, 4) = 2.776, deviation sqrt(2.5)
    assert got.mean == 3 and got.high == pytest.approx(3 + 2.776445 * (2.5 / 5) ** 0.5, rel=1e-6)


def test_the_interval_holds_the_true_mean_about_as_often_as_it_says() -> None:
    draw = np.random.default_rng(0)
    hits = 0
    for _ in range(1000):
        got = mean_interval(draw.normal(7.0, 2.0, 5).tolist())
        assert got.low is not None and got.high is not None
        hits += got.low <= 7.0 <= got.high
    assert 0.93 < hits / 1000 < 0.97


def test_one_seed_tells_nothing_about_others() -> None:
    assert mean_interval([4.0]) == mean_interval([4.0], 0.5)
    assert mean_interval([4.0]).low is None and paired_ratio([2.0], [4.0]).high is None
    assert paired_ratio([2.0], [4.0]).mean == pytest.approx(2)


def test_a_constant_ratio_is_certain_however_much_seeds_differ() -> None:
    got = paired_ratio([1, 10, 100], [3, 30, 300])
    assert (got.mean, got.low, got.high) == (pytest.approx(3), pytest.approx(3), pytest.approx(3))


@given(values, st.randoms(use_true_random=False))
def test_swapping_the_systems_gives_the_reciprocal(numbers: list[float], random) -> None:
    others = [number * random.uniform(0.5, 2) for number in numbers]
    one, other = paired_ratio(numbers, others), paired_ratio(others, numbers)
    assert one.mean == pytest.approx(1 / other.mean)
    assert one.low is not None and one.high is not None and other.low is not None and other.high is not None
    assert (one.low, one.high) == (pytest.approx(1 / other.high), pytest.approx(1 / other.low))


@pytest.mark.parametrize("wrong", [[], [1.0, float("nan")], [float("inf")]])
def test_a_mean_of_nothing_or_of_what_is_not_finite_is_refused(wrong: list[float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        mean_interval(wrong)


def test_wrong_pairs_and_confidences_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be paired"):
        paired_ratio([1.0], [1.0, 2.0])
    for wrong in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="positive"):
            paired_ratio([1.0], [wrong])
    with pytest.raises(ValueError, match="confidence"):
        mean_interval([1.0, 2.0], 1.0)
