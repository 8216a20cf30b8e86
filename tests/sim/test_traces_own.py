"""Our own formats lose nothing; what can be done to a trace does what it says."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotjax.errors import ConfigError
from spotjax.sim.traces import own
from spotjax.sim.traces.formats import open_requests, open_spot
from spotjax.sim.workload import RequestTrace, SpotEvent, SpotTrace

SECONDS = st.floats(0, 1e9)
TOKENS = st.integers(1, 2**40)
NAMES = st.text(st.characters(min_codepoint=33, exclude_categories=["C", "Z"], exclude_characters=","), min_size=1)


@st.composite
def request_traces(draw: st.DrawFn) -> RequestTrace:
    rows = draw(st.lists(st.tuples(SECONDS, TOKENS, TOKENS), min_size=1, max_size=20))
    times, prompts, outputs = zip(*rows, strict=True)
    return RequestTrace.of("trace", sorted(times), prompts, outputs)


@st.composite
def spot_traces(draw: st.DrawFn) -> SpotTrace:
    """Instances come, go, and some come back."""
    names = draw(st.lists(NAMES, unique=True, min_size=1, max_size=6))
    times = sorted(draw(st.lists(SECONDS, min_size=1, max_size=8)))
    there: set[str] = set()
    events = []
    for seconds in times:
        picked = draw(st.lists(st.sampled_from(names), unique=True))
        added = tuple(name for name in picked if name not in there)
        removed = tuple(name for name in picked if name in there)
        there = there.symmetric_difference(picked)
        events.append(SpotEvent(seconds, added, removed, draw(st.booleans())))
    return SpotTrace("trace", tuple(events), times[-1] + draw(SECONDS))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("own") / "trace.csv"


@given(request_traces())
def test_requests_that_are_written_and_read_again_are_the_same(path: Path, trace: RequestTrace) -> None:
    own.write_requests(path, trace)
    again = open_requests(path)
    assert again.name == trace.name
    for name in ("arrival", "prompt", "output"):
        assert getattr(again, name).tolist() == getattr(trace, name).tolist()


@given(spot_traces())
def test_a_spot_trace_that_is_written_and_read_again_is_the_same(path: Path, trace: SpotTrace) -> None:
    own.write_spot(path, trace)
    assert open_spot(path) == trace


@pytest.mark.parametrize("name", ["two words", "a,b", "", "tab\t", "new\nline", " edge"])
def test_names_that_would_not_be_read_again_are_not_written(path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        own.write_spot(path, SpotTrace("trace", (SpotEvent(0, added=(name,)),), 1))


def test_scaling_keeps_the_pattern_and_sets_the_rate() -> None:
    trace = RequestTrace.of("trace", [1, 2, 4, 8], [1, 2, 3, 4], 5).scaled_to(3.0)
    assert trace.arrival == pytest.approx(np.array([1, 2, 4, 8]) / 7)
    assert trace.gap_cv == pytest.approx(RequestTrace.of("", [1, 2, 4, 8], 1, 1).gap_cv)
    assert trace.prompt.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(("times", "rate"), [([1, 2], 0), ([1, 2], float("inf")), ([1], 1), ([], 1), ([2, 2], 1)])
def test_what_has_no_rate_is_not_scaled(times: list[float], rate: float) -> None:
    with pytest.raises(ConfigError, match="cannot scale"):
        RequestTrace.of("trace", times, 1, 1).scaled_to(rate)


@given(request_traces(), SECONDS, st.floats(1e-3, 1e9))
def test_windows_side_by_side_hold_every_request_once(trace: RequestTrace, middle: float, rest: float) -> None:
    edges = [0.0, middle + 1e-3, middle + 1e-3 + rest, 1e10]
    windows = [trace.window(start, stop) for start, stop in pairwise(edges)]
    assert [token for window in windows for token in window.prompt] == trace.prompt.tolist()
    assert all((window.arrival >= 0).all() for window in windows)


def test_an_empty_window_is_refused() -> None:
    trace = RequestTrace.of("trace", [1, 2], 1, 1)
    for start, stop in ((3, 3), (-1, 2)):
        with pytest.raises(ConfigError, match="a window from"):
            trace.window(start, stop)


def test_clipping_limits_lengths_only() -> None:
    trace = RequestTrace.of("trace", [1, 2], [10, 1000], [300, 20]).clipped(prompt=512, output=128)
    assert (trace.prompt.tolist(), trace.output.tolist()) == ([10, 512], [128, 20])
    with pytest.raises(ConfigError, match="at least one prompt"):
        trace.clipped(0, 1)


@given(spot_traces(), st.data())
def test_a_spot_window_shows_as_many_instances_as_the_whole(trace: SpotTrace, data: st.DataObject) -> None:
    if trace.duration == 0:
        return
    start = data.draw(st.floats(0, trace.duration, exclude_max=True))
    window = trace.window(start, trace.duration)

    def there(of: SpotTrace, seconds: float) -> int:
        return next((count for at, count in reversed(of.counts()) if at <= seconds), 0)

    assert window.duration == trace.duration - start
    assert there(window, 0) >= 0
    assert there(window, window.duration) == there(trace, trace.duration)
    assert sum(len(event.added) for event in window.events if event.seconds == 0) >= there(trace, start)


def test_a_spot_window_begins_with_those_that_are_there_at_their_price() -> None:
    trace = SpotTrace(
        "trace",
        (
            SpotEvent(0, added=("a", "b")),
            SpotEvent(10, added=("c",), removed=("a",), on_demand=True),
            SpotEvent(20, removed=("b",)),
            SpotEvent(30, removed=("c",)),
        ),
        40,
    )
    window = trace.window(10, 25)
    assert window.events == (
        SpotEvent(0, added=("b",)),
        SpotEvent(0, added=("c",), on_demand=True),
        SpotEvent(10, removed=("b",)),
    )
    assert window.duration == 15
    with pytest.raises(ConfigError, match="a window from"):
        trace.window(10, 41)


def test_a_cap_limits_the_number_at_any_time() -> None:
    trace = SpotTrace("trace", (SpotEvent(0, added=tuple("abcd")), SpotEvent(5, removed=("a", "b", "c"))), 9)
    assert trace.held(2).counts() == [(0, 2), (5, 1)]
