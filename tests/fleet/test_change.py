"""Plans of a change stand on instances that are ready, read from ones that are there, and leave in place what can."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from fleet_cases import PAGE_SIZE, SPEC, TIGHT, instances
from hypothesis import given
from hypothesis import strategies as st

from spotjax.errors import NoFeasibleShape
from spotjax.fleet.change import Planning, is_in_place, plan_change, plan_kv
from spotjax.meshes.instance import Instance, InstanceState
from spotjax.meshes.layout import slices_at
from spotjax.meshes.placement import Placement
from spotjax.meshes.shape import MeshShape
from spotjax.planner.cohorts import choose_heirs
from spotjax.planner.demand import Demand
from spotjax.planner.kv_cohorts import LiveSequence
from spotjax.reshard.transfer import Preparation

DEMAND = Demand(batch=3, prompt=8, output=8, page_size=PAGE_SIZE, kv_pages=19, step_tokens=8)
PLANNING = Planning(SPEC, DEMAND)
READY, NOTICED, GONE = InstanceState.READY, InstanceState.NOTICED, InstanceState.GONE


def with_states(machines: Sequence[Instance], *states: InstanceState) -> list[Instance]:
    return [replace(machine, state=state) for machine, state in zip(machines, states, strict=True)]


def first_mesh(machines: Sequence[Instance], planning: Planning = PLANNING) -> Placement:
    return plan_change(planning, None, machines, {}, 1).placement


def live_on(placement: Placement, *progress: int) -> dict[int, list[LiveSequence]]:
    """One sequence of each progress on every replica."""
    return {
        data: [
            LiveSequence(10 * data + number, -(-positions // PAGE_SIZE), positions)
            for number, positions in enumerate(progress)
        ]
        for data in range(placement.shape.data)
    }


def used(placement: Placement) -> set[str]:
    return {device.instance for device in placement.devices.values()}


def check(preparation: Preparation, machines: Sequence[Instance], current: Placement | None, epoch: int) -> None:
    """What holds for every plan."""
    placement, states = preparation.placement, {machine.name: machine.state for machine in machines}
    assert placement.epoch == epoch
    assert all(states[name] is READY for name in used(placement))
    for position, device in placement.devices.items():
        needed = slices_at(SPEC.parameters, SPEC, placement.shape, placement.layers, position)
        assert dict(preparation.needs[device]) == needed, "parameters and nothing else"
    held = set(current.devices.values()) if current is not None else set()
    for move in preparation.plan.moves:
        assert move.target in preparation.needs
        assert move.source is None or (move.source in held and states[move.source.instance] is not GONE)
    plan = preparation.plan
    total = sum(
        SPEC.dtype_bytes * size(index) for needs in preparation.needs.values() for index in dict(needs).values()
    )
    assert plan.bytes_in_place + plan.bytes_moved + plan.bytes_loaded == total
    assert plan.bytes_moved == sum(move.bytes for move in plan.moves if move.source is not None)


def size(index: Sequence[tuple[int, int]]) -> int:
    product = 1
    for start, stop in index:
        product *= stop - start
    return product


@given(
    st.integers(1, 2),
    st.booleans(),
    st.lists(st.sampled_from([READY, READY, NOTICED, GONE]), min_size=4, max_size=4),
    st.lists(st.sampled_from([READY, READY, NOTICED, GONE]), min_size=4, max_size=4),
    st.lists(st.integers(1, 12), max_size=3),
)
def test_any_change_of_instances_is_planned_soundly(
    devices: int, tight: bool, before: list[InstanceState], after: list[InstanceState], progress: list[int]
) -> None:
    machines = instances(4, devices, TIGHT if tight else 2**30)
    try:
        first = plan_change(PLANNING, None, with_states(machines, *before), {}, 1)
    except NoFeasibleShape:
        assert devices * before.count(READY) < 2
        return
    check(first, with_states(machines, *before), None, 1)
    assert first.plan.bytes_in_place == first.plan.bytes_moved == 0, "all is loaded"
    current, now = first.placement, with_states(machines, *after)
    live = live_on(current, *progress)
    try:
        preparation = plan_change(PLANNING, current, now, live, 2)
    except NoFeasibleShape:
        assert devices * after.count(READY) < 2
        return
    check(preparation, now, current, 2)
    assert plan_change(PLANNING, current, now, live, 2) == preparation, "the same inputs give the same plan"
    kv = plan_kv(PLANNING, preparation, current, now, live, [DEMAND.pages] * preparation.placement.shape.data)
    whole = {data for data in range(current.shape.data) if all_there(current, data, now)}
    kept = {(cohort.old, one.key) for cohort in kv.cohorts for one in cohort.sequences}
    assert {old for old, _ in kept} <= whole, "KV of a replica that lost a part is computed again"
    if preparation.placement.shape.data >= current.shape.data:
        assert kept == {(data, one.key) for data in whole for one in live[data]}, "KV that is there and fits goes on"
    pages = [sum(one.pages for cohort in kv.cohorts if cohort.new == new for one in cohort.sequences)
             for new in range(preparation.placement.shape.data)]  # fmt: skip
    assert max(pages, default=0) <= DEMAND.pages
    gone = {machine.name for machine in now if machine.state is GONE}
    for move in kv.plan.moves:
        assert move.source is not None and move.source.instance not in gone, "KV is on devices or nowhere"


def all_there(placement: Placement, data: int, machines: Sequence[Instance]) -> bool:
    states = {machine.name: machine.state for machine in machines}
    return all(states[name] is not GONE for name in placement.instances(data))


def test_a_plan_for_the_same_instances_changes_nothing() -> None:
    machines = instances(3)
    current = first_mesh(machines)
    preparation = plan_change(PLANNING, current, machines, live_on(current, 5), 2)
    assert is_in_place(preparation, current)
    assert preparation.plan.moves == () and preparation.heirs == {0: 0, 1: 1, 2: 2}


@pytest.mark.parametrize("other", [None, "shape", "devices"])
def test_another_mesh_or_none_is_not_in_place(other: str | None) -> None:
    machines = instances(3)
    current = first_mesh(machines[:2])
    preparation = plan_change(PLANNING, current, machines[:2], {}, 2)
    assert is_in_place(preparation, current)
    elsewhere = {"shape": machines, "devices": machines[1:]}
    assert not is_in_place(preparation, first_mesh(elsewhere[other]) if other is not None else None)


def test_a_noticed_instance_is_a_source_and_a_lost_one_is_not() -> None:
    machines = instances(2)
    current = first_mesh(machines[:1])
    leaving = plan_change(PLANNING, current, with_states(machines, NOTICED, READY), {}, 2)
    assert used(leaving.placement) == {"i1"}
    assert {move.source.instance for move in leaving.plan.moves if move.source is not None} == {"i0"}
    assert leaving.plan.bytes_loaded == 0
    gone = plan_change(PLANNING, current, with_states(machines, GONE, READY), {}, 2)
    assert {move.source for move in gone.plan.moves} == {None}
    assert gone.plan.bytes_loaded == SPEC.parameter_bytes


def test_kv_of_a_noticed_replica_moves_and_that_of_a_lost_one_is_lost() -> None:
    machines = instances(3)
    current = first_mesh(machines[:2])
    live = live_on(current, 5, 9)
    for state, kept in [(NOTICED, {0, 1, 10, 11}), (GONE, {10, 11})]:
        now = with_states(machines, state, READY, READY)
        preparation = plan_change(PLANNING, current, now, live, 2)
        kv = plan_kv(PLANNING, preparation, current, now, live, [DEMAND.pages] * preparation.placement.shape.data)
        assert {one.key for cohort in kv.cohorts for one in cohort.sequences} == kept
        assert all(move.source is not None for move in kv.plan.moves)


def test_sequences_that_found_no_room_are_in_no_cohort() -> None:
    machines = instances(2)
    current = first_mesh(machines)
    live = live_on(current, 40, 30)  # 18 pages on each replica, 19 on the only one to come
    now = with_states(machines, READY, NOTICED)
    preparation = plan_change(PLANNING, current, now, live, 2)
    kv = plan_kv(PLANNING, preparation, current, now, live, [DEMAND.pages] * preparation.placement.shape.data)
    assert preparation.placement.shape.data == 1
    assert {one.key for cohort in kv.cohorts for one in cohort.sequences} == {0, 1}


def test_heirs_are_those_that_the_planner_chose_by_what_runs() -> None:
    machines = instances(3)
    current = first_mesh(machines)
    live = live_on(current, 5)
    live[0] = []
    now = with_states(machines, READY, READY, GONE)
    preparation = plan_change(PLANNING, current, now, live, 2)
    assert dict(preparation.heirs) == choose_heirs(live, 2)


def test_a_wanted_shape_is_taken_while_it_fits() -> None:
    machines = instances(4)
    wanted = Planning(SPEC, DEMAND, MeshShape(1, 4, 1))
    current = first_mesh(machines, wanted)
    assert current.shape == MeshShape(1, 4, 1)
    now = with_states(machines, READY, READY, READY, GONE)
    assert plan_change(wanted, current, now, {}, 2).placement.shape != MeshShape(1, 4, 1)


def test_without_ready_instances_there_is_no_plan() -> None:
    machines = with_states(instances(2), NOTICED, GONE)
    with pytest.raises(NoFeasibleShape, match="no instance is ready"):
        plan_change(PLANNING, None, machines, {}, 1)
