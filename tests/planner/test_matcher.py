from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_cases import Change, changes, fleet, llama, placed

from spotjax.errors import NotEnoughPlaces
from spotjax.meshes.layout import split_layers
from spotjax.meshes.shape import MeshShape
from spotjax.planner.assignment import assign
from spotjax.planner.cohorts import assign_cohorts
from spotjax.planner.holdings import Holdings
from spotjax.planner.kv_cohorts import LiveSequence
from spotjax.planner.matcher import match
from spotjax.planner.needs import needs_of


def matched(change: Change):
    needs = needs_of(change.spec, change.shape, change.after_layers, change.cohorts)
    return needs, match(change.shape, needs, change.hosts, change.holdings)


def bytes_in_place(change: Change, needs, matching) -> int:
    return sum(change.holdings.reusable_bytes(device, needs[position]) for position, device in matching.items())


@given(changes())
def test_every_position_has_its_own_device_and_no_group_crosses_instances(change: Change) -> None:
    _, matching = matched(change)
    assert list(matching) == list(change.shape.positions())
    assert len(set(matching.values())) == len(matching)
    ready = {device for host in change.hosts for device in host.devices}
    assert set(matching.values()) <= ready
    for position, device in matching.items():
        assert device.instance == matching[position._replace(tensor=0)].instance


def most_bytes(change: Change, needs) -> int:
    """Brute force over all ways to put positions on devices, groups inside instances."""
    devices = [device for host in change.hosts for device in host.devices]
    positions = list(change.shape.positions())
    weight = {(p, d): change.holdings.reusable_bytes(d, needs[p]) for p in positions for d in devices}
    best = 0
    for chosen in permutations(devices, len(positions)):
        groups: dict[tuple[int, int], set[str]] = {}
        for position, device in zip(positions, chosen, strict=True):
            groups.setdefault((position.data, position.stage), set()).add(device.instance)
        if all(len(names) == 1 for names in groups.values()):
            best = max(best, sum(weight[pair] for pair in zip(positions, chosen, strict=True)))
    return best


def small(change: Change) -> bool:
    return change.shape.devices <= 5 and sum(host.type.devices for host in change.hosts) <= 6


@settings(max_examples=150)
@given(st.sampled_from((1, 2)).flatmap(lambda size: changes(sizes=(size,))).filter(small))
def test_the_most_bytes_stay_in_place_on_instances_with_one_place(change: Change) -> None:
    needs, matching = matched(change)
    assert bytes_in_place(change, needs, matching) == most_bytes(change, needs)


@settings(max_examples=150)
@given(changes(sizes=(1, 2, 3, 4), most_instances=3, most=2).filter(small))
def test_the_most_bytes_stay_in_place_on_instances_with_several_places(change: Change) -> None:
    needs, matching = matched(change)
    assert bytes_in_place(change, needs, matching) == most_bytes(change, needs)


def test_an_instance_with_a_device_more_than_a_group_takes_gets_the_group_that_keeps_most_there() -> None:
    spec, instances, shape = llama(layers=2, vocab=2), fleet(3, 2), MeshShape(1, 2, 2)
    before = placed(spec, MeshShape(1, 1, 1), instances)
    holder = next(iter(before.devices.values()))
    needs = needs_of(spec, shape, split_layers(2, 2), ())
    holdings = Holdings.of(spec, before, (), instances)
    kept = {position: holdings.reusable_bytes(holder, needs[position]) for position in shape.positions()}
    matching = match(shape, needs, instances, holdings)
    assert sum(kept[position] for position, device in matching.items() if device == holder) == max(kept.values())


def test_nothing_held_keeps_the_order_of_positions_and_devices() -> None:
    devices = placed(llama(layers=4), MeshShape(2, 2, 2), fleet(4, 1, 2, 3, 4)).devices
    expected = ["i0/0", "i0/1", "i0/2", "i0/3", "i2/0", "i2/1", "i3/0", "i3/1"]
    assert [str(device) for device in devices.values()] == expected


@given(changes(with_gone=False))
def test_an_unchanged_mesh_stays_where_it_is(change: Change) -> None:
    before = change.before
    needs = needs_of(change.spec, before.shape, before.layers, ())
    holdings = Holdings.of(change.spec, before, (), ())
    alive = Holdings(holdings.devices, holdings.element_bytes, other_bytes=holdings.other_bytes)
    matching = match(before.shape, needs, change.instances, alive)
    everything = sum(alive.reusable_bytes(device, needs[position]) for position, device in before.devices.items())
    assert sum(alive.reusable_bytes(device, needs[position]) for position, device in matching.items()) == everything


def test_a_newcomer_takes_the_place_of_the_lost_instance_and_the_others_stay() -> None:
    spec, shape = llama(layers=3), MeshShape(1, 3, 1)
    instances = fleet(1, 1, 1, 1)
    before = placed(spec, shape, instances[:3])
    hosts = [instances[0], instances[2], instances[3]]
    needs = needs_of(spec, shape, before.layers, ())
    matching = match(shape, needs, hosts, Holdings.of(spec, before, (), hosts))
    assert [device.instance for device in matching.values()] == ["i0", "i3", "i2"]


def test_kv_decides_between_devices_with_equal_parameters() -> None:
    spec, instances = llama(layers=2), fleet(1, 1, 1)
    before = placed(spec, MeshShape(3, 1, 1), instances)
    live = {0: [LiveSequence(0, 1, 2)], 1: [LiveSequence(0, 2, 4)], 2: [LiveSequence(0, 3, 6)]}
    shape = MeshShape(2, 1, 1)
    cohorts = assign_cohorts(live, 2, 4, 2).cohorts
    needs = needs_of(spec, shape, split_layers(2, 1), cohorts)
    matching = match(shape, needs, instances, Holdings.of(spec, before, cohorts, instances))
    assert [device.instance for device in matching.values()] == ["i2", "i1"]


def test_too_few_places_are_counted_in_the_error() -> None:
    spec, shape = llama(layers=2), MeshShape(2, 2, 2)
    with pytest.raises(NotEnoughPlaces, match="4 stage groups need a place each, the instances offer 3"):
        placed(spec, shape, fleet(3, 4, 1))


def test_groups_change_instances_where_a_cut_into_places_would_part_what_they_hold() -> None:
    spec, instances = llama(heads=2, layers=2), fleet(2, 4)
    before = placed(spec, MeshShape(2, 2, 1), instances)
    cohorts = assign_cohorts({1: [LiveSequence(0, 4, 8)]}, 1, 8, 2).cohorts
    shape, holdings = MeshShape(1, 2, 2), Holdings.of(spec, before, cohorts, instances)
    needs = needs_of(spec, shape, before.layers, cohorts)
    matching = match(shape, needs, instances, holdings)
    # Replica 1 has its KV on both halves of i1: both stages go there, though each uses a device of its own.
    assert {device.instance for device in matching.values()} == {"i1"}


weights = st.integers(1, 4).flatmap(
    lambda rows: st.integers(rows, 5).flatmap(
        lambda columns: st.lists(
            st.lists(st.integers(0, 3), min_size=columns, max_size=columns), min_size=rows, max_size=rows
        )
    )
)


@given(weights)
def test_assignment_is_a_maximum_and_different_for_every_row(rows: list[list[int]]) -> None:
    table = np.array(rows, dtype=np.int64)
    chosen = assign(table)
    assert len(set(chosen)) == len(rows)
    best = max(
        sum(row[c] for row, c in zip(rows, columns, strict=True))
        for columns in permutations(range(len(rows[0])), len(rows))
    )
    assert sum(row[c] for row, c in zip(rows, chosen, strict=True)) == best


def test_assignment_ties_keep_order() -> None:
    assert assign(np.zeros((3, 5), dtype=np.int64)) == [0, 1, 2]
    assert assign(np.array([[0, 0, 7, 0], [0, 0, 0, 0], [0, 0, 0, 0]])) == [2, 0, 1]
    assert assign(np.array([[5, 5, 0], [5, 5, 0]])) == [0, 1]
