import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planner_cases import Change, changes, fleet, llama, placed

from spotjax.meshes.shape import MeshShape
from spotjax.meshes.slices import ArraySlice, covered, remainder
from spotjax.meshes.stacks import depth, in_stack
from spotjax.planner.holdings import Holdings
from spotjax.planner.kv_cohorts import cohort_of
from spotjax.planner.links import Links
from spotjax.planner.matcher import match
from spotjax.planner.memory import bounded_order
from spotjax.planner.migration import plan_migration
from spotjax.planner.needs import needs_of
from spotjax.planner.plan import Phase
from spotjax.planner.timeline import stages_ready, timeline

tables = st.tuples(st.integers(1, 6), st.integers(1, 4)).flatmap(
    lambda shape: st.tuples(
        *(
            st.lists(
                st.lists(st.integers(0, 9), min_size=shape[1], max_size=shape[1]),
                min_size=shape[0],
                max_size=shape[0],
            )
            for _ in range(2)
        ),
        st.lists(st.integers(0, 30), min_size=shape[1], max_size=shape[1]),
    )
)


@given(tables)
def test_the_reported_peak_is_that_of_the_order(case) -> None:
    arriving, leaving, room = (np.array(part) for part in case)
    result = bounded_order(arriving, leaving, np.zeros_like(room), room)
    assert sorted(result.rows) == list(range(len(arriving)))
    storage = peak = np.zeros_like(room)
    for row in result.rows:
        peak = np.maximum(peak, storage + arriving[row])
        storage = storage + arriving[row] - leaving[row]
    assert (peak == result.peak).all()


def test_layers_stay_in_order_with_room_enough_and_those_that_free_memory_go_first_without() -> None:
    arriving, leaving = np.array([[4], [4], [0]]), np.array([[0], [0], [8]])
    none = np.array([0])
    assert bounded_order(arriving, leaving, none, np.array([100])).rows == (0, 1, 2)
    tight = bounded_order(arriving, leaving, none, np.array([0]))
    assert tight.rows == (2, 0, 1) and (tight.peak <= 0).all()


def bounded(change: Change, room: int):
    by_position = needs_of(change.spec, change.shape, change.after_layers, change.cohorts)
    matching = match(change.shape, by_position, change.hosts, change.holdings)
    needs = {device: by_position[position] for position, device in matching.items()}
    links = Links.of(change.instances)
    plan = plan_migration(needs, change.holdings, links, room=dict.fromkeys(needs, room))
    return needs, matching, plan, plan_migration(needs, change.holdings, links), links


@given(changes(), st.integers(0, 3000))
def test_a_bound_changes_when_slices_move_but_not_which(change: Change, room: int) -> None:
    _, _, plan, free, _ = bounded(change, room)

    def all_moves(plan):
        return sorted((m.slice, m.source or ("", 0), m.target, m.bytes) for m in plan.moves)

    assert all_moves(plan) == all_moves(free)
    assert plan.makespan == pytest.approx(sum(plan.seconds(phase) for phase in Phase))
    assert plan.memory is not None
    assert plan.memory.deferred == sum(
        m.bytes for m in plan.moves if m.phase is Phase.FINAL and not cohort_of(m.slice.name)
    )


@given(changes(), st.integers(0, 3000))
def test_carried_out_in_order_no_device_holds_more_than_reported_nor_than_its_room_if_it_fits(
    change: Change, room: int
) -> None:
    needs, _, plan, _, _ = bounded(change, room)
    assert plan.memory is not None
    held = dict.fromkeys(needs, 0)
    for move in (m for m in plan.moves if m.phase is Phase.PRECOPY):
        held[move.target] += move.bytes
    assert all(held[device] <= max(0, room) for device in needs)
    top = change.spec.config.layers

    def layer_of(name: str) -> int:
        return int(min(depth(name), top))

    late = [m for m in plan.moves if m.phase is Phase.FINAL and not cohort_of(m.slice.name)]
    for layer in plan.memory.layer_order:
        for move in (m for m in late if layer_of(m.slice.name) == layer):
            held[move.target] += move.bytes
        assert all(held[device] <= plan.memory.peak[device] for device in needs)
        if plan.memory.fits:
            assert all(held[device] <= room for device in needs)
        for device in needs:
            held[device] -= given_up(change, needs[device], device, layer, top)


def given_up(change: Change, wanted, device, layer: int, top: int) -> int:
    """Bytes of one layer that a device has and does not need."""
    total = 0
    for array in change.spec.parameters:
        if int(min(depth(array.name), top)) != layer:
            continue
        size = change.spec.element_bytes(array.name)
        stack, whole = in_stack(ArraySlice(array.name, tuple((0, n) for n in array.shape)))
        for box in change.holdings.at(device).get(stack, ()):
            mine = covered(whole, [box])
            needed = covered(whole, [wanted.parameters[stack]]) if stack in wanted.parameters else 0
            if needed:
                common = [part for part in [box] for part in remainder(part, [wanted.parameters[stack]])]
                total += sum(covered(whole, [part]) for part in common) * size
            else:
                total += mine * size
    return total


def swap_of_stages():
    """Two devices that exchange their stages: nothing fits beside what is held."""
    spec, instances = llama(layers=4), fleet(1, 1)
    before = placed(spec, MeshShape(1, 2, 1), instances)
    needs = needs_of(spec, before.shape, before.layers, ())
    holdings = Holdings.of(spec, before, (), instances)
    devices = dict(zip(before.devices, reversed(before.devices.values()), strict=True))
    return spec, holdings, Links.of(instances), {device: needs[at] for at, device in devices.items()}, devices


def test_without_room_everything_moves_after_the_stop_and_the_plan_says_by_how_much_it_passes() -> None:
    spec, holdings, links, needs, _ = swap_of_stages()
    plan = plan_migration(needs, holdings, links, room=dict.fromkeys(needs, 0))
    assert plan.memory is not None and not plan.memory.fits
    assert plan.memory.deferred == spec.parameter_bytes
    assert 0 < plan.memory.excess < spec.parameter_bytes / 2
    assert plan.seconds(Phase.PRECOPY) == 0 < plan.seconds(Phase.FINAL)
    plenty = plan_migration(needs, holdings, links, room=dict.fromkeys(needs, spec.parameter_bytes))
    assert plenty.memory is not None and plenty.memory.fits and plenty.memory.deferred == 0


def test_every_stage_is_ready_at_some_time_after_the_stop() -> None:
    _, holdings, links, needs, devices = swap_of_stages()
    plan = plan_migration(needs, holdings, links, room=dict.fromkeys(needs, 0))
    timed = timeline(plan, links)
    ready = stages_ready(timed, devices)
    assert ready.keys() == {(0, 0), (0, 1)} and min(ready.values()) > 0
    assert max(entry.end for entry in timed[Phase.FINAL]) >= plan.seconds(Phase.FINAL) - 1e-12


@given(changes())
def test_no_two_transfers_use_a_link_at_once_and_the_timeline_is_no_shorter_than_the_makespan(change: Change) -> None:
    _, _, plan, _, links = bounded(change, 10**9)
    for phase, entries in timeline(plan, links).items():
        used: dict = {}
        for entry in entries:
            for link in links.between(entry.transfer.source, entry.transfer.target):
                assert entry.start >= used.get(link, 0.0)
                used[link] = entry.end
        assert max(used.values(), default=0.0) >= plan.seconds(phase) * (1 - 1e-9)
