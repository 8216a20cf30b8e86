"""A spot process has the statistics of the trace that it was fitted from, at any size. Seeds are fixed."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotjax.errors import ConfigError
from spotjax.sim.traces.spot_process import Sizes, SpotProcess, fit
from spotjax.sim.workload import SpotEvent, SpotTrace

MARKET = SpotProcess(0.02, 0.001, ((1, 7), (4, 1)), ((1, 6), (2, 3), (5, 1)))


def mean_count(trace: SpotTrace) -> float:
    steps = [*trace.counts(), (trace.duration, 0)]
    return sum(count * (end - start) for (start, count), (end, _) in pairwise(steps)) / trace.duration


def mean_size(sizes: Sizes) -> float:
    return sum(size * often for size, often in sizes) / sum(often for _, often in sizes)


def test_a_fit_counts_what_came_what_went_and_how_long_it_was_there() -> None:
    trace = SpotTrace(
        "trace",
        (
            SpotEvent(0, added=("a", "b", "c")),
            SpotEvent(100, added=("d",), removed=("a", "b")),
            SpotEvent(150, added=("paid",), on_demand=True),
            SpotEvent(200, added=("e",)),
            SpotEvent(200, added=("f",)),
            SpotEvent(300, removed=("c", "paid")),
        ),
        400,
    )
    process = fit(trace)
    lived = 100 + 100 + 300 + 300 + 200 + 200  # a to f; what is on demand does not count
    assert process == SpotProcess(3 / 400, 3 / lived, ((1, 1), (2, 1)), ((1, 1), (2, 1)))
    assert process.mean_life == lived / 3
    assert process.mean_instances == pytest.approx(3 / 400 * lived / 3)


@pytest.mark.parametrize("instances", [12, 200])
def test_samples_have_the_fitted_statistics_at_any_size(instances: int) -> None:
    trace = MARKET.sample(instances, 40_000_000 / instances, seed=0)
    again = fit(trace)
    assert trace.counts()[0] == (0, instances)
    assert again.hazard == pytest.approx(MARKET.hazard, rel=0.03)
    assert again.grants == pytest.approx(MARKET.hazard * instances, rel=0.03)
    assert mean_size(again.grant_sizes) == pytest.approx(mean_size(MARKET.grant_sizes), rel=0.03)
    assert mean_size(again.removal_sizes) == pytest.approx(mean_size(MARKET.removal_sizes), rel=0.03)
    assert mean_count(trace) == pytest.approx(instances, rel=0.05)


def test_lives_are_exponential() -> None:
    trace = MARKET.sample(200, 50_000, seed=1)
    came = {name: event.seconds for event in trace.events for name in event.added}
    lives = [event.seconds - came[name] for event in trace.events for name in event.removed if came[name] > 0]
    assert sum(lives) / len(lives) == pytest.approx(1000, rel=0.05)
    assert sum(life > 1000 for life in lives) / len(lives) == pytest.approx(0.368, abs=0.02)


def test_a_fleet_smaller_than_the_batches_keeps_the_hazard() -> None:
    process = SpotProcess(0.001, 0.001, ((1, 1),), ((5, 1),))
    trace = process.sample(2, 20_000_000, seed=0)
    assert fit(trace).hazard == pytest.approx(0.001, rel=0.03)
    assert mean_count(trace) == pytest.approx(2, rel=0.05)


def test_larger_batches_come_less_often() -> None:
    trace = MARKET.sample(200, 1_500_000, seed=0, batch_scale=10)
    again = fit(trace)
    assert again.hazard == pytest.approx(MARKET.hazard, rel=0.05)
    assert {size for size, _ in again.grant_sizes} <= {10, 40}
    assert mean_size(again.removal_sizes) == pytest.approx(10 * mean_size(MARKET.removal_sizes), rel=0.05)
    assert mean_count(trace) == pytest.approx(200, rel=0.1)


@given(st.integers(1, 30), st.floats(1, 20_000), st.integers(0, 99), st.floats(0.1, 8))
def test_every_sample_is_a_trace_and_a_seed_repeats_it(
    instances: int, duration: float, seed: int, scale: float
) -> None:
    trace = MARKET.sample(instances, duration, seed, scale)
    assert trace == MARKET.sample(instances, duration, seed, scale)
    assert trace.duration == duration
    assert len(trace.events[0].added) == instances
    assert all(count >= 0 for _, count in trace.counts())


def test_seeds_differ() -> None:
    assert MARKET.sample(20, 5000, seed=1) != MARKET.sample(20, 5000, seed=2)


@pytest.mark.parametrize(
    "events",
    [
        (),
        (SpotEvent(0, added=("a",)), SpotEvent(5, removed=("a",))),
        (SpotEvent(0, added=("a",)), SpotEvent(5, added=("b",))),
        (SpotEvent(0, added=("a",)), SpotEvent(5, added=("b",), on_demand=True), SpotEvent(6, removed=("b",))),
    ],
)
def test_a_trace_without_grants_or_losses_is_not_fitted(events: tuple[SpotEvent, ...]) -> None:
    with pytest.raises(ConfigError, match="come after 0 s and that go"):
        fit(SpotTrace("trace", events, 10))


@pytest.mark.parametrize(("instances", "duration", "scale"), [(0, 1, 1), (1, 0, 1), (1, 1, 0), (1, float("inf"), 1)])
def test_samples_of_nothing_are_refused(instances: int, duration: float, scale: float) -> None:
    with pytest.raises(ConfigError, match="cannot sample"):
        MARKET.sample(instances, duration, 0, scale)


@pytest.mark.parametrize(
    ("grants", "hazard", "sizes"),
    [(0, 1, ((1, 1),)), (1, 0, ((1, 1),)), (1, 1, ()), (1, 1, ((0, 1),)), (1, 1, ((1, 0),))],
)
def test_statistics_out_of_range_are_refused(grants: float, hazard: float, sizes: Sizes) -> None:
    with pytest.raises(ConfigError, match=r"spot process needs|sizes of batches"):
        SpotProcess(grants, hazard, sizes, sizes)
