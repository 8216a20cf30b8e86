"""Who rents only some of what a market offers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from spotjax.sim.traces.scenarios import A_S, B_S, day
from spotjax.sim.workload import SpotEvent, SpotTrace


def test_another_instance_is_rented_for_each_that_goes() -> None:
    trace = SpotTrace(
        "x",
        (SpotEvent(0, ("a", "b", "c")), SpotEvent(5, ("d",)), SpotEvent(9, removed=("a", "c")), SpotEvent(11, ("e",))),
        20,
    )
    assert trace.held(2).events == (
        SpotEvent(0, ("a", "b")),
        SpotEvent(9, removed=("a",)),
        SpotEvent(9, ("d",)),
    )


def test_who_wants_more_than_is_offered_has_all() -> None:
    for trace in (A_S.spot, B_S.spot):
        assert trace.held(100).counts() == trace.counts()


@given(st.integers(1, 12), st.integers(0, 3))
def test_never_more_than_wanted_and_as_many_as_are_offered(most: int, seed: int) -> None:
    trace = day(12, seed, 6 * 3600.0)
    held = trace.held(most)
    offered, rented = dict(trace.counts()), dict(held.counts())
    last = 0
    for seconds in sorted({*offered, *rented}):
        last = rented.get(seconds, last)
        there = max(count for when, count in trace.counts() if when == max(t for t in offered if t <= seconds))
        assert last == min(most, there)
