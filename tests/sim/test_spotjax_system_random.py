"""Over random traces a simulated Spotjax finishes every request exactly once, and never runs on what is gone."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import example, given, settings
from hypothesis import strategies as st
from spotjax_cases import NAMES, finished, run, scenario

from spotjax.sim.systems.spotjax_options import FEATURES, Feature, SpotjaxOptions
from spotjax.sim.workload import SpotEvent

LAST = 300.0
"""Then there are enough instances again, for long enough."""


@dataclass(frozen=True)
class Case:
    """A random market, its requests, and who serves them."""

    events: tuple[SpotEvent, ...]
    arrivals: tuple[float, ...]
    notice: float
    start: float
    without: Feature | None
    late: bool


@st.composite
def cases(draw: st.DrawFn) -> Case:
    there = list(NAMES[: draw(st.integers(0, 7))])
    events = [SpotEvent(0, tuple(there))] if there else []
    seconds = draw(st.lists(st.floats(1, LAST - 1), max_size=8))
    for at in sorted(round(second, 1) for second in seconds):
        gone = [name for name in NAMES[:8] if name not in there]
        if there and (not gone or draw(st.booleans())):
            names = draw(st.lists(st.sampled_from(there), min_size=1, max_size=3, unique=True))
            there = [name for name in there if name not in names]
            events.append(SpotEvent(at, removed=tuple(names)))
        else:
            names = draw(st.lists(st.sampled_from(gone), min_size=1, max_size=3, unique=True))
            there += names
            events.append(SpotEvent(at, tuple(names)))
    events.append(SpotEvent(LAST, NAMES[8:12]))
    arrivals = draw(st.lists(st.floats(0, LAST), min_size=1, max_size=25))
    return Case(
        tuple(events),
        tuple(arrivals),
        draw(st.sampled_from([0.0, 3.0, 30.0])),
        draw(st.sampled_from([0.0, 20.0])),
        draw(st.sampled_from([None, None, None, *FEATURES])),
        draw(st.booleans()),
    )


TWICE_IN_A_CHANGE = Case(
    (
        SpotEvent(0, NAMES[:6]),
        SpotEvent(50, removed=NAMES[:1]),
        SpotEvent(51, removed=NAMES[1:2]),
        SpotEvent(52, NAMES[:2]),
        SpotEvent(53, removed=NAMES[2:3]),
        SpotEvent(LAST, NAMES[8:12]),
    ),
    tuple(40 + number / 4 for number in range(60)),
    0.0,
    0.0,
    None,
    late=True,
)


@given(cases())
@example(TWICE_IN_A_CHANGE)
@settings(max_examples=60, deadline=None)
def test_every_request_is_finished_once_whatever_the_market_does(case: Case) -> None:
    options = SpotjaxOptions(leave="late" if case.late else "early")
    small = scenario(case.events, case.arrivals, LAST + 1500, notice=case.notice)
    world, system = run(small, case.without, options)
    assert finished(world)
    assert world.book.restarts == [0] * len(case.arrivals), "no token is thrown away"
    assert all(stall.stall >= 0 for stall in world.changes)
    assert not system._replicas.parked
