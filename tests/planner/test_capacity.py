from dataclasses import replace

import pytest
from planner_cases import kind, llama

from spotjax.errors import NoFeasibleShape
from spotjax.meshes.instance import Instance, InstanceState
from spotjax.planner.capacity import SPARES, Capacity, plan_capacity
from spotjax.planner.demand import Demand
from spotjax.planner.goal import Goal
from spotjax.planner.load import Load
from spotjax.planner.optimizer import choose_shape

SPEC = llama(layers=4, width=256, mlp=1024, head_size=32, vocab=64)
DEMAND = Demand(batch=4, prompt=8, output=8, page_size=4)
OFFERED = replace(kind(1), spot_price=1.0, on_demand_price=3.0)


def fleet_of(count: int, **changes) -> list[Instance]:
    return [Instance(f"i{n}", OFFERED, **changes) for n in range(count)]


ONE = choose_shape(SPEC, fleet_of(1), DEMAND).rate


def planned(instances, rate: float, most_more: int = 8, **arguments) -> Capacity:
    return plan_capacity(SPEC, instances, DEMAND, Goal(load=Load(rate), near_tie=10.0), OFFERED, most_more, **arguments)


def test_what_is_missing_is_requested_as_spot_and_on_demand_at_once() -> None:
    capacity = planned(fleet_of(1), 2.5 * ONE)
    assert capacity.request_spot == capacity.request_on_demand == capacity.target.instances - 1 >= 2
    assert capacity.release == ()
    assert planned(fleet_of(1), 2.5 * ONE, on_demand=False).request_on_demand == 0


def test_surplus_is_released_on_demand_first_and_spares_are_kept() -> None:
    instances = [*fleet_of(5), Instance("dear", OFFERED, on_demand=True)]
    capacity = planned(instances, 0.1 * ONE)
    kept = capacity.target.instances + SPARES
    assert capacity.request_spot == 0 and capacity.spares == SPARES
    assert capacity.release[0] == "dear" and len(capacity.release) == 6 - kept
    assert capacity.release[1:] == tuple(f"i{n}" for n in range(4, 4 - len(capacity.release) + 1, -1))


def test_instances_with_a_notice_are_replaced_and_joining_ones_are_not_requested_twice() -> None:
    enough = planned(fleet_of(8), 2.5 * ONE).target.instances
    going = [replace(instance, state=InstanceState.NOTICED) for instance in fleet_of(enough)]
    assert planned(going, 2.5 * ONE).request_spot == enough
    joining = fleet_of(enough, state=InstanceState.JOINING)
    assert planned(joining, 2.5 * ONE).request_spot == 0


def test_nothing_within_reach_is_refused() -> None:
    with pytest.raises(NoFeasibleShape):
        planned([], ONE, most_more=0)
