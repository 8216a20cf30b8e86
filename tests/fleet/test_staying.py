"""Replicas that stay where they are leave the matching, and that changes no plan for the worse."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from spotjax.errors import NoFeasibleShape
from spotjax.fleet import change
from spotjax.fleet.change import Planning, decide, plan_change
from spotjax.fleet.staying import stay
from spotjax.meshes.instance import Instance, InstanceState
from spotjax.meshes.instance_types import instance_type
from spotjax.meshes.shape import MeshShape
from spotjax.models.presets import preset
from spotjax.planner.demand import Demand
from spotjax.planner.kv_cohorts import LiveSequence
from spotjax.planner.plan import Phase

KIND = instance_type("g4dn.12xlarge")
DEMAND = Demand(batch=8, prompt=512, output=128, kv_pages=640)
SPECS = [preset("gpt-20b"), preset("opt-6.7b")]


@st.composite
def changes(draw: st.DrawFn) -> tuple[Planning, list[Instance], list[Instance], dict[int, list[LiveSequence]], int]:
    """A mesh on some instances, and what has become of these since."""
    count, more = draw(st.integers(2, 9)), draw(st.integers(0, 3))
    wanted = MeshShape(99, draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 4])))
    planning = Planning(draw(st.sampled_from(SPECS)), DEMAND, wanted)
    before = [Instance(f"i-{number}", KIND) for number in range(count)]
    states = [InstanceState.READY] * 3 + [InstanceState.NOTICED, InstanceState.GONE]
    after = [replace(one, state=draw(st.sampled_from(states))) for one in before]
    after += [Instance(f"new-{number}", KIND) for number in range(more)]
    try:
        decide(planning, before)
        decide(planning, after)
    except NoFeasibleShape:
        assume(False)
    data = plan_change(planning, None, before, {}, 1).placement.shape.data
    live = {old: [LiveSequence(old * 10 + n, 33, 520) for n in range(draw(st.integers(0, 3)))] for old in range(data)}
    return planning, before, after, live, data


@given(changes())
@settings(max_examples=30, deadline=None)
def test_plans_are_as_good_as_with_all_replicas_matched(
    case: tuple[Planning, list[Instance], list[Instance], dict[int, list[LiveSequence]], int],
) -> None:
    planning, before, after, live, data = case
    current = plan_change(planning, None, before, {}, 1).placement
    there = {one.name for one in after if one.state is not InstanceState.GONE}
    running = [old for old in range(data) if current.instances(old) <= there]
    live = {old: sequences if old in running else [] for old, sequences in live.items()}
    short = plan_change(planning, current, after, live, 2, running)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(change, "stay", lambda *_: {})
        full = plan_change(planning, current, after, live, 2, running)
    assert short.heirs == full.heirs and short.placement.shape == full.placement.shape
    assert short.plan.bytes_moved + short.plan.bytes_loaded == full.plan.bytes_moved + full.plan.bytes_loaded
    assert short.plan.bytes_in_place == full.plan.bytes_in_place
    slower = 1.05 if len(short.carried) == len(full.carried) else 2.0
    assert short.plan.seconds(Phase.PRECOPY) <= slower * full.plan.seconds(Phase.PRECOPY)
    assert short.carried.items() >= full.carried.items(), "nobody stops who would not have to"


def test_every_running_replica_on_ready_instances_goes_on_when_another_is_lost() -> None:
    planning = Planning(SPECS[0], DEMAND, MeshShape(99, 2, 4))
    fleet = [Instance(f"i-{number}", KIND) for number in range(8)]
    current = plan_change(planning, None, fleet, {}, 1).placement
    busy: Mapping[int, list[LiveSequence]] = {
        old: [LiveSequence(old * 10 + n, 40, 630) for n in range(9 - 2 * old)] for old in range(4)
    }
    lost = next(iter(current.instances(0)))
    after = [replace(one, state=InstanceState.NOTICED) if one.name == lost else one for one in fleet]
    preparation = plan_change(planning, current, after, busy, 2, range(4))
    assert preparation.carried.keys() == {1, 2, 3}
    assert preparation.plan.bytes_moved == 0


def test_parameters_that_find_no_room_beside_the_old_ones_move_after_the_stop() -> None:
    """Of 15 GiB a device has 10 of the parameters of gpt-20b and KV; another cut needs 5 GiB more at once."""
    planning = Planning(SPECS[0], DEMAND, MeshShape(1, 2, 4))
    fleet = [Instance(f"i-{number}", KIND) for number in range(2)]
    current = plan_change(planning, None, fleet, {}, 1).placement
    other = replace(planning, wanted=MeshShape(1, 4, 2))
    free = plan_change(other, current, fleet, {0: []}, 2).plan
    bound = plan_change(replace(other, bounded=True), current, fleet, {0: []}, 2).plan
    assert free.seconds(Phase.FINAL) == 0 < bound.seconds(Phase.FINAL)
    assert bound.bytes_moved == free.bytes_moved and bound.memory is not None
    same = plan_change(replace(planning, bounded=True), current, fleet, {0: []}, 2, [0]).plan
    assert same.memory is None and same.bytes_moved == 0


def test_fewer_parts_move_the_same_bytes_in_nearly_the_same_time() -> None:
    planning = Planning(SPECS[0], DEMAND, MeshShape(9, 2, 4))
    fleet = [Instance(f"i-{number}", KIND) for number in range(6)]
    current = plan_change(planning, None, fleet, {}, 1).placement
    other = replace(planning, wanted=MeshShape(9, 3, 4))
    fine, coarse = (plan_change(replace(other, transfers=n), current, fleet, {}, 2).plan for n in (8192, 256))
    assert len(coarse.transfers) < len(fine.transfers) / 4
    assert coarse.bytes_moved == fine.bytes_moved > 0
    assert coarse.seconds(Phase.PRECOPY) <= 1.05 * fine.seconds(Phase.PRECOPY)


def test_groups_of_an_instance_with_places_to_spare_are_matched() -> None:
    planning = Planning(preset("llama-3-8b"), DEMAND, MeshShape(3, 1, 2))
    fleet = [Instance(f"i-{number}", KIND) for number in range(2)]
    first = plan_change(planning, None, fleet, {}, 1)
    decision = decide(planning, fleet)
    full = {old for old in range(3) if len(first.placement.instances(old)) == 1}
    staying = stay(first.placement, decision, {old: old for old in range(3)})
    counts = [sum(device.instance == host.name for device in first.placement.devices.values()) for host in fleet]
    assert full == {0, 1, 2} and sorted(counts) == [2, 4]
    assert len(staying) == 2
