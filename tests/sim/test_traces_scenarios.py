"""The paper's workloads are those of its artifact, and are billed as it says where that can be inferred."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from spotjax.sim.traces import scenarios
from spotjax.sim.traces.scenarios import SEGMENTS, Segment
from spotjax.sim.workload import SpotTrace

LAUNCH = 90.0  # seconds of an on-demand instance in the artifact

# What the artifact's files of ready times say: (seconds, instances from then on).
READY = {
    "A_S": [(0, 7), (240, 8), (360, 10), (600, 9), (900, 10), (1200, 8)],
    "B_S": [(0, 10), (120, 8), (240, 7), (720, 8), (960, 9)],
    "A_S+O": [(0, 7), (120, 10), (600, 9), (690, 10), (1200, 8), (1290, 10)],
    "B_S+O": [(0, 10), (120, 8), (210, 10), (240, 9), (330, 10)],
    "A'_S+O": [(0, 7), (120, 10), (360, 12), (600, 10)],
    "B'_S+O": [(0, 10), (120, 8), (210, 10), (240, 9), (330, 10), (450, 12), (600, 10)],
}
DURATION = {"A_S": 1320, "B_S": 1020, "A_S+O": 1380, "B_S+O": 720, "A'_S+O": 1140, "B'_S+O": 1140}


def ready(segment: Segment) -> SpotTrace:
    """With those that come later than 0 s at the time at which they are ready."""
    events = [event._replace(added=()) for event in segment.spot.events if event.removed] + [
        event._replace(
            removed=(),
            seconds=event.seconds + (event.seconds > 0) * (LAUNCH if event.on_demand else segment.start_seconds),
        )
        for event in segment.spot.events
        if event.added
    ]
    events.sort(key=lambda event: (event.seconds, not event.removed))
    return replace(segment.spot, events=tuple(events))


def minutes(trace: SpotTrace) -> tuple[float, float]:
    """Billed instance-minutes: (spot, on demand)."""
    billed = {False: 0.0, True: 0.0}
    price = {name: event.on_demand for event in trace.events for name in event.added}
    for event in trace.events:
        for name in event.added:
            billed[price[name]] += (trace.duration - event.seconds) / 60
        for name in event.removed:
            billed[price[name]] -= (trace.duration - event.seconds) / 60
    return billed[False], billed[True]


@pytest.mark.parametrize("name", SEGMENTS)
def test_a_segment_has_as_many_ready_instances_as_the_artifacts_file(name: str) -> None:
    assert ready(SEGMENTS[name]).counts() == READY[name]
    assert SEGMENTS[name].spot.duration == DURATION[name]


@pytest.mark.parametrize(
    ("name", "billed"), [("A_S", (203, 0)), ("B_S", (137, 0)), ("A_S+O", (205, 19)), ("B_S+O", (92, 28))]
)
def test_instance_minutes_are_those_of_the_paper_where_a_trace_can_say_them(
    name: str, billed: tuple[float, float]
) -> None:
    assert minutes(SEGMENTS[name].spot) == pytest.approx(billed)
    if name in ("A_S", "B_S"):
        assert billed == SEGMENTS[name].billed_minutes


def test_the_fluctuating_segments_say_what_is_required() -> None:
    for name in ("A'_S+O", "B'_S+O"):
        assert SEGMENTS[name].required == ((0, 0.6), (300, 0.8), (600, 0.6))


def test_instances_on_demand_are_there_from_first_to_last() -> None:
    trace = scenarios.on_demand(4)
    assert (trace.counts(), trace.duration) == ([(0, 4)], 1020)
    assert minutes(trace) == (0, 4 * 17)


def test_a_day_of_two_hundred_instances_keeps_its_mean_and_changes_often() -> None:
    trace = scenarios.day(200, seed=1)
    counts = trace.counts()
    assert trace.duration == 86400
    assert min(count for _, count in counts) > 120
    assert max(count for _, count in counts) < 280
    assert len(counts) > 2000


@pytest.mark.parametrize("rate", scenarios.RATES.values())
def test_published_and_bursty_requests_differ_in_their_gaps_only(rate: float) -> None:
    published = scenarios.published_requests(rate, 200_000, seed=0)
    bursty = scenarios.gamma_requests(rate, 200_000, seed=0)
    assert published.gap_cv == pytest.approx((6 * rate / 1000) ** 0.5, rel=0.05)
    assert bursty.gap_cv == pytest.approx(6, rel=0.15)
    for trace in (published, bursty):
        assert trace.rate(200_000) == pytest.approx(rate, rel=0.08)
        assert (trace.prompt == 512).all()
        assert (trace.output == 128).all()


def test_the_fluctuating_load_has_its_rate_in_every_minute() -> None:
    assert len(scenarios.FLUCTUATING_RATES) == 19
    trace = scenarios.fluctuating_requests(seed=0)
    counts, _ = np.histogram(trace.arrival, np.arange(20) * 60)
    assert counts / 60 == pytest.approx(scenarios.FLUCTUATING_RATES, abs=1.5 / 60)
    total = np.mean([len(scenarios.fluctuating_requests(seed, true_cv=1.0)) for seed in range(200)])
    assert total == pytest.approx(60 * sum(scenarios.FLUCTUATING_RATES), rel=0.02)


def test_traces_import_no_jax() -> None:
    code = "import sys, spotjax.sim.traces.formats, spotjax.sim.traces.scenarios; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
