"""Tensor groups across instances, where the instance type says that they may."""

from dataclasses import replace
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planner_cases import fleet, kind, llama

from spotjax.errors import NoFeasibleShape, NotEnoughPlaces
from spotjax.meshes.instance import Instance
from spotjax.meshes.layout import split_layers
from spotjax.meshes.placement import Placement
from spotjax.meshes.shape import MeshShape, Position
from spotjax.planner.cost import memory_need, step_seconds
from spotjax.planner.demand import Demand
from spotjax.planner.goal import Goal
from spotjax.planner.holdings import Holdings
from spotjax.planner.matcher import match
from spotjax.planner.needs import needs_of
from spotjax.planner.optimizer import choose_shape, places_offered

SPEC = llama(heads=8, kv_heads=4, layers=1, width=64, mlp=512, head_size=8, vocab=64)
DEMAND = Demand(batch=2, prompt=8, output=8, page_size=4)


def need(tensor: int) -> int:
    return memory_need(SPEC, MeshShape(1, 1, tensor), ((0, 1),), DEMAND).total


PAIRED = replace(kind(2), tensor_instances=2)


def paired(count: int, **changes: int) -> list[Instance]:
    return [Instance(f"p{n}", replace(PAIRED, **changes)) for n in range(count)]


def test_a_group_takes_part_of_an_instance_or_as_many_whole_ones_as_the_type_allows() -> None:
    assert [kind(2).span(m) for m in (1, 2, 3, 4)] == [1, 1, 0, 0]
    assert [PAIRED.span(m) for m in (1, 2, 3, 4, 6)] == [1, 1, 0, 2, 0]
    assert places_offered(paired(5), 4) == 2 and places_offered(fleet(2, 2, 2, 2), 4) == 0
    assert places_offered([*paired(3), *fleet(8)], 4) == 3


def test_a_model_that_one_instance_cannot_split_far_enough_fits_across_two_only_if_the_type_says_so() -> None:
    memory = need(4)
    assert memory < need(2)
    with pytest.raises(NoFeasibleShape):
        choose_shape(SPEC, fleet(2, 2, 2, 2, 2, memory=memory), DEMAND)
    decision = choose_shape(SPEC, paired(5, memory_bytes=memory), DEMAND)
    assert decision.shape == MeshShape(2, 1, 4) and decision.instances == 4
    with pytest.raises(NoFeasibleShape):
        choose_shape(SPEC, paired(1, memory_bytes=memory), DEMAND)


def test_collectives_across_instances_are_as_slow_as_the_network() -> None:
    def step(type_, tensor: int) -> float:
        return step_seconds(SPEC, MeshShape(1, 1, tensor), ((0, 1),), type_, 2, 16)

    assert step(PAIRED, 4) > step(kind(4), 4) and step(PAIRED, 2) == step(kind(2), 2)


def test_a_mesh_with_groups_across_instances_stands_on_one_type() -> None:
    memory = need(4)
    mixed = [*paired(2, memory_bytes=memory), *fleet(4, 4, memory=memory)]
    decision = choose_shape(SPEC, mixed, DEMAND)
    for candidate in (decision, *decision.runner_ups):
        if any(host.type.span(candidate.shape.tensor) > 1 for host in candidate.hosts):
            assert len({host.type for host in candidate.hosts}) == 1
    assert {host.type.devices for host in decision.hosts} == {4}, "two groups inside instances beat one across two"


def test_a_replica_goes_with_any_instance_that_its_groups_span() -> None:
    goal = Goal(loss_probability=1.0)
    decision = choose_shape(SPEC, paired(4, memory_bytes=need(4)), DEMAND, goal=goal)
    assert decision.shape == MeshShape(2, 1, 4)
    assert decision.expected_rate == pytest.approx(decision.rate / 2)


@given(st.permutations(range(5)), st.sets(st.integers(0, 4), max_size=2), st.sampled_from((1, 2)))
def test_parts_stay_where_the_most_bytes_are_whatever_instances_they_were_on(order, lost, stage) -> None:
    spec, layers = llama(heads=4, kv_heads=2, layers=3), split_layers(3, stage)
    before_shape, shape = MeshShape(1, 2, 4), MeshShape(1, stage, 4)
    everybody = paired(5)
    old = [device for n in order[:4] for device in everybody[n].devices]
    before = Placement(0, before_shape, split_layers(3, 2), dict(zip(before_shape.positions(), old, strict=True)))
    hosts = [instance for n, instance in enumerate(everybody) if n not in lost]
    holdings = Holdings.of(spec, before, (), hosts)
    needs = needs_of(spec, shape, layers, ())
    if len(hosts) < 2 * stage:
        with pytest.raises(NotEnoughPlaces):
            match(shape, needs, hosts, holdings)
        return
    matching = match(shape, needs, hosts, holdings)
    parts = [(p, m) for p in range(stage) for m in (0, 2)]
    for p, m in parts:
        pair = [matching[Position(0, p, m + i)] for i in range(2)]
        assert pair[0].instance == pair[1].instance and pair[0] != pair[1]
    assert len({matching[Position(0, p, m)].instance for p, m in parts}) == len(parts)

    def worth(p: int, m: int, host: Instance) -> int:
        return max(
            sum(holdings.reusable_bytes(device, needs[Position(0, p, m + i)]) for i, device in enumerate(devices))
            for devices in permutations(host.devices)
        )

    best = max(
        sum(worth(p, m, host) for (p, m), host in zip(parts, chosen, strict=True))
        for chosen in permutations(hosts, len(parts))
    )
    assert sum(holdings.reusable_bytes(matching[at], mine) for at, mine in needs.items()) == best
