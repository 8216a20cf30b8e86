"""Decisions that are remembered are those that the planner would make again."""

from __future__ import annotations

from dataclasses import replace
from math import log2

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from spotjax_cases import KIND, LATENCY, SPEC

from spotjax.errors import NoFeasibleShape
from spotjax.fleet.change import Planning
from spotjax.meshes.instance import Instance
from spotjax.meshes.shape import MeshShape
from spotjax.planner.demand import Demand
from spotjax.planner.goal import Goal, Running
from spotjax.planner.optimizer import choose_shape
from spotjax.sim.systems.spotjax_shapes import LEAST_GAIN, Shapes, of_one_kind, typical_demand

PLANNING = Planning(SPEC, Demand(8, 512, 128, kv_pages=320), latency=of_one_kind(LATENCY, 1.0))


def shapes() -> Shapes:
    return Shapes(PLANNING, Goal(near_tie=0), fixed=False, smoothing_seconds=60, stall_seconds=1)


REMEMBERING = shapes()


def fleet(spot: int, on_demand: int, first: int) -> list[Instance]:
    return [Instance(f"i-{first + number}", KIND, on_demand=number >= spot) for number in range(spot + on_demand)]


@given(st.integers(0, 12), st.integers(0, 3), st.integers(0, 99), st.booleans(), st.sampled_from([1.0, 300.0, 1e5]))
@settings(max_examples=60, deadline=None)
def test_a_remembered_decision_is_that_of_the_planner(
    spot: int, on_demand: int, first: int, serving: bool, horizon: float
) -> None:
    ready = fleet(spot, on_demand, first)
    shape = MeshShape(2, 3, 4) if serving else None
    remembered = REMEMBERING.load(0.0)
    running = None
    if shape is not None:
        rounded = 2.0 ** round(log2(horizon))
        running = Running(shape, 1, rounded, stalls_same=False, least_gain=LEAST_GAIN)
    goal = Goal(load=remembered, near_tie=0)
    try:
        anew = choose_shape(SPEC, ready, PLANNING.demand, goal=goal, latency=PLANNING.latency, running=running)
    except NoFeasibleShape as problem:
        with pytest.raises(NoFeasibleShape) as raised:
            REMEMBERING.decide(0.0, ready, shape, horizon)
        assert str(raised.value) == str(problem)
    else:
        decision = REMEMBERING.decide(0.0, ready, shape, horizon)
        assert replace(decision, reason="", runner_ups=()) == replace(anew, reason="", runner_ups=())


def test_the_load_is_observed_and_not_told() -> None:
    chooser = shapes()
    for number in range(200):
        chooser.arrived(number / 2)
    load = chooser.load(100)
    assert load is not None and load.rate == pytest.approx(2, rel=0.06)
    assert shapes().load(100) is None


def test_typical_demand_has_room_for_the_longest_request() -> None:
    demand = typical_demand([100, 300], [10, 30], 4, 2.0)
    assert (demand.batch, demand.prompt, demand.output) == (4, 200, 20)
    assert demand.pages == 2 * 4 * -(-220 // 16)
    assert typical_demand([100, 30000], [10, 30], 4, 1.0).pages >= 30030 / 16
    assert typical_demand([], [], 4, 1.0).batch == 4
