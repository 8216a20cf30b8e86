"""SpotServe, Reparallelization and Rerouting: nothing is lost, nothing runs where nothing is, and what they decide."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from published_cases import NAMES, SYSTEMS, run, scenario, workload

from spotjax.sim.workload import SpotEvent
from spotjax.sim.world import World

NETWORK = 50e9 / 8
"""Bytes per second between instances."""


def start(count: int) -> SpotEvent:
    return SpotEvent(0.0, added=NAMES[:count])


def shapes(world: World) -> list[str]:
    return [str(change.shape) for change in world.changes]


@st.composite
def markets(draw: st.DrawFn) -> list[SpotEvent]:
    """Instances come and go in any way, several in one instant, all of them, and some as soon as they have come."""
    there = list(NAMES[: draw(st.integers(0, 9))])
    events = [SpotEvent(0.0, added=tuple(there))] if there else []
    given, now = len(there), 0.0
    for _ in range(draw(st.integers(0, 9))):
        now += draw(st.sampled_from((0.0, 0.0, 1.0, 7.5, 20.0, 30.0, 45.0, 70.0)))
        if now == 0:
            now = 1.0
        if there and draw(st.booleans()):
            lost = draw(st.sampled_from((1, 1, 2, 3, len(there))))
            gone = draw(st.permutations(there))[:lost]
            there = [name for name in there if name not in gone]
            events.append(SpotEvent(now, removed=tuple(gone)))
        else:
            new = NAMES[given : given + draw(st.integers(1, 6))]
            given += len(new)
            there += new
            events.append(SpotEvent(now, added=new))
    return events


@pytest.mark.parametrize("name", SYSTEMS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whatever_comes_and_goes_every_request_is_somewhere_once(name: str, data: st.DataObject) -> None:
    events = data.draw(markets())
    gaps = data.draw(st.lists(st.sampled_from((0.0, 0.5, 2.0, 5.0, 11.0, 40.0)), max_size=30))
    outputs = [data.draw(st.sampled_from((1, 20, 128))) for _ in gaps]
    arrivals = [sum(gaps[: number + 1]) for number in range(len(gaps))]
    model = data.draw(st.sampled_from(("gpt-20b", "gpt-20b", "opt-6.7b")))
    case = scenario(
        events, arrivals, duration=700.0, model=model, output=outputs,
        notice_seconds=data.draw(st.sampled_from((0.0, 5.0, 30.0))),
        start_seconds=data.draw(st.sampled_from((0.0, 40.0))),
        engine_start_seconds=data.draw(st.sampled_from((0.0, 5.0))),
    )  # fmt: skip
    run(case, SYSTEMS[name](workload(model)))
