from dataclasses import replace

import pytest
from planner_cases import fleet, kind, llama

from spotjax.errors import NoFeasibleShape
from spotjax.meshes.instance import Instance
from spotjax.meshes.shape import MeshShape
from spotjax.planner.demand import Demand
from spotjax.planner.goal import Goal, Running
from spotjax.planner.load import Load
from spotjax.planner.optimizer import Decision, choose_shape

DEMAND = Demand(batch=8, prompt=8, output=8, page_size=4)
SPEC = llama(layers=4, width=256, mlp=1024, head_size=32, vocab=64)
PRICED = [Instance(f"i{n}", replace(kind(2), spot_price=1.0, on_demand_price=3.0)) for n in range(6)]


def choose(instances=PRICED, **arguments) -> Decision:
    return choose_shape(SPEC, instances, DEMAND, **arguments)


def test_a_small_load_takes_the_least_latency_and_not_the_most_throughput() -> None:
    most = choose()
    light = choose(goal=Goal(load=Load(most.rate / 1000)))
    assert light.batch < DEMAND.batch and light.latency < most.latency
    assert light.rate > most.rate / 1000


def test_near_ties_go_to_the_cheapest() -> None:
    rate = choose().rate / 100
    exact = choose(goal=Goal(load=Load(rate), near_tie=0.0))
    frugal = choose(goal=Goal(load=Load(rate), near_tie=0.5))
    assert frugal.cost_per_hour < exact.cost_per_hour
    assert frugal.seconds <= 1.5 * exact.seconds


def test_waiting_makes_a_larger_mesh_worth_it() -> None:
    rate = choose().rate
    calm = choose(goal=Goal(load=Load(rate / 3, arrival_scv=0.0, service_scv=0.0), near_tie=0.1))
    bursty = choose(goal=Goal(load=Load(rate / 3, arrival_scv=40.0), near_tie=0.1))
    assert bursty.rate > calm.rate


def test_overload_takes_the_most_requests_per_second_and_says_so() -> None:
    most = choose()
    swamped = choose(goal=Goal(load=Load(100 * most.rate)))
    assert swamped.seconds == float("inf") and "nothing keeps up" in swamped.reason
    assert swamped.rate >= most.rate * 0.999
    assert all("serves less" in loser.reason for loser in swamped.runner_ups)


def test_a_latency_target_is_met_at_the_least_cost() -> None:
    load = Load(choose().rate / 50)
    fastest = choose(goal=Goal(load=load, near_tie=0.0))
    target = 3 * fastest.percentile_seconds
    frugal = choose(goal=Goal(load=load, latency_seconds=target))
    assert frugal.percentile_seconds <= target and frugal.cost_per_hour < fastest.cost_per_hour
    assert "cheapest that keeps 0.99 of requests under" in frugal.reason
    assert "nothing meets" in choose(goal=Goal(load=load, latency_seconds=1e-9)).reason


def test_the_cost_ceiling_holds_or_the_refusal_names_the_cheapest() -> None:
    assert choose(goal=Goal(cost_per_hour=2.0)).cost_per_hour <= 2.0
    with pytest.raises(NoFeasibleShape, match=r"cheapest configuration costs 1\.00 USD per hour, the ceiling is 0\.50"):
        choose(goal=Goal(cost_per_hour=0.5))


def test_on_demand_instances_cost_more_and_are_left_out_of_a_tie() -> None:
    mixed = [replace(PRICED[0], on_demand=True), *PRICED[1:3]]
    load = Load(choose().rate / 1000)
    chosen = choose(mixed, goal=Goal(load=load, near_tie=10.0))
    assert chosen.cost_per_hour == pytest.approx(1.0)


def test_where_an_instance_may_go_a_shape_is_preferred_that_loses_less() -> None:
    spec, demand = llama(layers=6, heads=2, kv_heads=2, mlp=64, width=64, head_size=32), Demand(batch=4)
    fast = [Instance(f"i{n}", kind(1, flops=1e10)) for n in range(6)]
    shapes = {
        chance: choose_shape(spec, fast, demand, goal=Goal(loss_probability=chance)) for chance in (0.0, 0.5, 1.0)
    }
    assert shapes[1.0].expected_rate >= shapes[0.0].rate * 0.5
    deep = choose_shape(spec, fast, demand, MeshShape(1, 6, 1), goal=Goal(loss_probability=0.5))
    assert deep.expected_rate == pytest.approx(0.5 * deep.rate)
    wide = choose_shape(spec, fast, demand, MeshShape(6, 1, 1), goal=Goal(loss_probability=0.5))
    assert wide.expected_rate == pytest.approx(wide.rate * (1 - 0.5 / 6))


def test_a_replica_on_several_instances_goes_with_any_of_them() -> None:
    spec = llama(layers=4)
    pairs = choose_shape(spec, fleet(1, 1, 1, 1), DEMAND, MeshShape(2, 2, 1), goal=Goal(loss_probability=1.0))
    assert pairs.expected_rate == pytest.approx(pairs.rate / 2)


def test_the_running_mesh_is_kept_unless_changing_it_pays_back() -> None:
    best = choose()
    other = min(best.runner_ups, key=lambda candidate: candidate.throughput)
    hurried = choose(running=Running(other.shape, stall_seconds=10, horizon_seconds=5))
    assert hurried.shape == other.shape and "does not pay back within 5 s" in hurried.reason
    patient = choose(running=Running(other.shape, stall_seconds=10, horizon_seconds=1e6))
    assert patient.shape == best.shape


def test_the_running_mesh_is_left_under_overload_if_another_keeps_up() -> None:
    rate = choose().rate * 0.9
    slow = MeshShape(1, 1, 1)
    goal = Goal(load=Load(rate))
    stay = choose(goal=goal, running=Running(slow, stall_seconds=100, horizon_seconds=10))
    assert stay.shape == slow
    assert choose(goal=goal, running=Running(slow, stall_seconds=1, horizon_seconds=600)).shape != slow


def test_a_running_mesh_that_no_longer_fits_is_changed() -> None:
    gone = Running(MeshShape(7, 2, 1), stall_seconds=1e9, horizon_seconds=1)
    assert choose(running=gone).shape == choose().shape


def test_runner_ups_are_of_different_kinds_and_say_why_they_lost() -> None:
    decision = choose(goal=Goal(load=Load(choose().rate / 10)))
    kinds = [(loser.shape.stage, loser.shape.tensor) for loser in decision.runner_ups]
    assert len(set(kinds)) == len(kinds) and all(loser.reason for loser in decision.runner_ups)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"percentile": 1.0}, "percentile must be between 0 and 1"),
        ({"loss_probability": 2.0}, "loss_probability must be in"),
        ({"latency_seconds": 1.0}, "a latency target needs a load"),
    ],
)
def test_goals_out_of_range_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Goal(**wrong)
