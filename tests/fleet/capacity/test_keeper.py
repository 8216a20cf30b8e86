"""What a controller does about its machines, one situation each, against a cloud in memory."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import msgspec
from capacity_cases import KIND, ON_DEMAND, SETTINGS, SPOT_A, SPOT_B, Simulated

from spotjax.errors import OutOfCapacity, ProviderRefused, ProviderUnavailable
from spotjax.fleet.capacity.file import CapacitySettings
from spotjax.fleet.capacity.ledger import DAY, HOUR
from spotjax.fleet.capacity.next_action import Release, Request, Wait
from spotjax.fleet.providers.provider import MachineState
from spotjax.meshes.instance import Instance


def with_settings(**changes: object) -> CapacitySettings:
    return msgspec.structs.replace(SETTINGS, **changes)


def asked(simulated: Simulated) -> list[str]:
    return [f"{a.offer.price_class}/{a.offer.zone}" for a in simulated.done if isinstance(a, Request)]


def released(simulated: Simulated) -> list[str]:
    return [action.name for action in simulated.done if isinstance(action, Release)]


def test_what_is_missing_is_asked_for_as_spot_and_on_demand_and_on_demand_goes_when_spot_has_come() -> None:
    simulated = Simulated()
    simulated.want(3)
    simulated.run(6)
    assert sorted(asked(simulated)) == ["on_demand/a"] * 3 + ["spot/a"] * 3
    simulated.run(120)
    assert (simulated.up("spot"), simulated.up("on_demand")) == (3, 0)
    assert len(simulated.machines) == 3 and len(asked(simulated)) == 6
    assert isinstance(simulated.last, Wait) and simulated.last.why == ""


def test_on_demand_waits_for_spot_as_long_as_it_is_told_to() -> None:
    simulated = Simulated(with_settings(fallback_seconds=60.0))
    simulated.cloud.set_capacity(SPOT_A, 1)
    simulated.cloud.set_capacity(SPOT_B, 0)
    simulated.want(2)
    simulated.run(55)
    assert (simulated.up("spot"), simulated.up("on_demand")) == (1, 0)
    simulated.run(60)
    assert (simulated.up("spot"), simulated.up("on_demand")) == (1, 1)


def test_without_a_fallback_nothing_is_asked_for_on_demand_and_some_always_are_if_told_so() -> None:
    never = Simulated(with_settings(on_demand="never"))
    never.want(2)
    never.run(100)
    assert set(asked(never)) == {"spot/a"} and never.up("spot") == 2
    some = Simulated(with_settings(least_on_demand=1))
    some.want(3)
    some.run(200)
    assert (some.up("spot"), some.up("on_demand")) == (2, 1)
    always = Simulated(with_settings(on_demand="always"))
    always.want(2)
    always.run(100)
    assert (always.up("spot"), always.up("on_demand")) == (0, 2) and set(asked(always)) == {"on_demand/a"}


def test_an_offer_that_is_refused_is_left_alone_and_the_next_cheapest_is_taken() -> None:
    simulated = Simulated(with_settings(on_demand="never", retry_seconds=1000.0, most_retry_seconds=1000.0))
    simulated.cloud.set_capacity(SPOT_A, 1)
    simulated.want(3)
    simulated.run(200)
    assert asked(simulated) == ["spot/a", "spot/a", "spot/b", "spot/b"]
    simulated.cloud.set_capacity(SPOT_B, 2)
    simulated.want(4)
    simulated.run(60)
    assert isinstance(simulated.last, Wait) and simulated.last.kind == "stockout"


def test_refusals_are_asked_again_later_and_later() -> None:
    simulated = Simulated(with_settings(on_demand="never", most=1))
    for offer in (SPOT_A, SPOT_B):
        simulated.cloud.set_capacity(offer, 0)
    simulated.run(400)
    times = [asked.seconds for asked in simulated.cloud.asked if asked.offer == SPOT_A]
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert all(2.5 <= gap <= 22 for gap in gaps) and max(gaps[3:]) > 2 * gaps[0] - 2 and len(times) > 10
    simulated.cloud.set_capacity(SPOT_B, 1)
    simulated.run(60)
    assert simulated.up("spot") == 1


def test_what_the_provider_does_not_allow_is_not_asked_again_soon() -> None:
    simulated = Simulated(with_settings(on_demand="never", most_retry_seconds=1000.0))
    for offer in (SPOT_A, SPOT_B):
        simulated.cloud.fail("request", ProviderRefused(f"no rights to {offer}"))
    simulated.run(500)
    assert asked(simulated) == ["spot/a", "spot/b"] and not simulated.machines


def test_a_preempted_machine_is_replaced_at_once_and_what_is_left_of_it_is_released() -> None:
    simulated = Simulated()
    simulated.want(2)
    simulated.run(100)
    first = simulated.machines[0].name
    simulated.cloud.preempt(first, "f")
    simulated.run(3)
    assert first in released(simulated) and first not in [machine.name for machine in simulated.machines]
    simulated.run(100)
    assert simulated.up("spot") == 2 and len(simulated.machines) == 2


def test_a_machine_that_failed_is_released_and_its_offer_left_alone() -> None:
    simulated = Simulated(with_settings(on_demand="never"))
    simulated.run(2)
    simulated.cloud.break_down(simulated.machines[0].name, OutOfCapacity, "f")
    simulated.run(3)
    assert asked(simulated) == ["spot/a", "spot/b"] and [m.offer.zone for m in simulated.machines] == ["b"]


def test_one_that_advice_is_about_is_released_when_another_one_is_there() -> None:
    simulated = Simulated(with_settings(on_demand="never"))
    simulated.want(2)
    simulated.run(60)
    going = simulated.machines[0].name
    simulated.advised = frozenset({going})
    simulated.run(3)
    assert len(asked(simulated)) == 3 and released(simulated) == []
    simulated.run(100)
    assert released(simulated) == [going] and simulated.up("spot") == 2


def test_what_joins_but_is_never_ready_is_given_back_and_another_tried() -> None:
    simulated = Simulated(with_settings(on_demand="never", ready_seconds=200.0))
    simulated.hung = {"f-0"}
    simulated.run(215)
    assert released(simulated) == [], "it loads, for longer than a machine may take to join"
    simulated.run(60)
    assert released(simulated) == ["f-0"] and asked(simulated) == ["spot/a", "spot/b"] and simulated.up("spot") == 1


def test_what_runs_but_never_joins_is_given_back_and_another_tried() -> None:
    simulated = Simulated(with_settings(on_demand="never"))
    simulated.deaf = {"f-0"}
    simulated.run(115)
    assert released(simulated) == []
    simulated.run(60)
    assert released(simulated) == ["f-0"] and asked(simulated) == ["spot/a", "spot/b"] and simulated.up("spot") == 1


def test_a_machine_whose_worker_is_gone_is_replaced_at_once_and_kept_a_while_for_it() -> None:
    simulated = Simulated(with_settings(on_demand="never"))
    simulated.run(60)
    simulated.left.add("f-0")
    simulated.run(3)
    assert len(asked(simulated)) == 2 and released(simulated) == []
    simulated.left.discard("f-0")  # it comes back: the other one is too much
    simulated.run(60)
    assert simulated.up("spot") == 1 and len(simulated.machines) == 1
    name = simulated.machines[0].name
    simulated.left.add(name)
    simulated.run(60)
    assert released(simulated)[-1] == name and simulated.up("spot") == 1


def test_members_started_by_hand_count_and_are_never_given_back() -> None:
    simulated = Simulated(others=[Instance("mine-1", KIND), Instance("mine-2", KIND, on_demand=True)])
    simulated.want(3)
    simulated.run(100)
    assert len(simulated.machines) == 1 and simulated.up("spot") == 2
    simulated.want(1)
    simulated.run(100)
    assert len(simulated.machines) == 0 and len(simulated.members()) == 2


def test_one_that_no_mesh_can_do_without_is_kept() -> None:
    simulated = Simulated(with_settings(on_demand="never"))
    simulated.want(3)
    simulated.run(60)
    simulated.refuse_drain = True
    simulated.want(1)
    simulated.run(100)
    assert simulated.up("spot") == 3
    simulated.refuse_drain = False
    simulated.run(60)
    assert simulated.up("spot") == 1


def test_a_request_whose_answer_was_lost_is_not_made_twice() -> None:
    simulated = Simulated(with_settings(on_demand="never"))
    simulated.cloud.lose_answer("request")
    simulated.run(100)
    assert len(simulated.machines) == 1 and simulated.up("spot") == 1 and len(asked(simulated)) == 1


def test_a_request_that_never_arrived_is_made_again_under_another_name() -> None:
    simulated = Simulated(with_settings(on_demand="never"))
    simulated.cloud.fail("request", ProviderUnavailable("lost on the way"))
    simulated.run(150)
    assert [machine.name for machine in simulated.machines] == ["f-1"] and simulated.up("spot") == 1
    assert list(simulated.keeper.ledger.entries) == ["f-1"]


def test_machines_that_nobody_knows_are_taken_up_if_they_join_and_released_if_not() -> None:
    simulated = Simulated(with_settings(on_demand="never"))
    simulated.cloud.request("f", "f-7", SPOT_A)
    simulated.cloud.request("f", "stray", SPOT_A)
    simulated.deaf = {"stray"}
    simulated.want(2)
    simulated.run(200)
    assert released(simulated) == ["stray"]
    assert [machine.name for machine in simulated.machines] == ["f-7", "f-8"], "no name is used again"


def test_a_restarted_controller_waits_for_the_members_of_before() -> None:
    simulated = Simulated(with_settings(on_demand="never"))
    simulated.want(3)
    simulated.run(60)
    simulated.restart()
    simulated.left = {machine.name for machine in simulated.machines}
    simulated.run(10)
    simulated.left = set()
    simulated.run(100)
    assert len(asked(simulated)) == 3 and released(simulated) == []


def test_requests_that_wait_where_there_is_none_are_given_up_for_others() -> None:
    simulated = Simulated(with_settings(on_demand="never"), waits=True)
    simulated.cloud.set_capacity(SPOT_A, 0)
    simulated.run(90)
    assert [machine.state for machine in simulated.machines] == [MachineState.WAITING]
    simulated.run(60)
    assert [machine.offer.zone for machine in simulated.machines] == ["b"] and simulated.up("spot") == 1


def test_what_is_no_longer_offered_does_not_count_as_free() -> None:
    simulated = Simulated(with_settings(cost_per_hour=3.5))
    simulated.want(3)
    simulated.run(100)
    rate = simulated.keeper.ledger.rate
    unpriced = [replace(machine, offer=replace(machine.offer, price=0.0)) for machine in simulated.machines]
    simulated.keeper.offers = ()
    for _ in range(2):
        simulated.keeper.listed(unpriced, simulated.now, simulated.now, simulated.now)
    assert simulated.keeper.ledger.rate == rate > 0


def test_the_cap_on_an_hour_counts_what_may_exist() -> None:
    simulated = Simulated(with_settings(cost_per_hour=3.5))
    simulated.want(5)
    simulated.run(100)
    assert simulated.up("spot") == 3 and simulated.rate <= 3.5
    assert isinstance(simulated.last, Wait) and simulated.last.kind == "cap"
    simulated.cloud.set_price(SPOT_A, 1.5)
    simulated.run(60)
    assert simulated.rate <= 3.5 and simulated.up("spot") == 2


def test_what_stands_in_leaves_the_money_for_what_it_stands_in_for() -> None:
    simulated = Simulated(with_settings(cost_per_hour=5.9))
    simulated.cloud.set_capacity(SPOT_A, 1)
    simulated.cloud.set_capacity(SPOT_B, 0)
    simulated.want(3)
    simulated.run(100)
    assert (simulated.up("spot"), simulated.up("on_demand")) == (1, 0), "3.0 beside 3 x 1.0 is too much"
    tight = Simulated(with_settings(cost_per_hour=6.1))
    tight.cloud.set_capacity(SPOT_A, 1)
    tight.cloud.set_capacity(SPOT_B, 0)
    tight.want(3)
    tight.run(100)
    assert (tight.up("spot"), tight.up("on_demand")) == (1, 1)
    tight.cloud.set_capacity(SPOT_A, 5)
    tight.run(200)
    assert (tight.up("spot"), tight.up("on_demand")) == (3, 0)


def test_the_cap_on_a_day_leaves_enough_to_stop_and_ends_at_midnight() -> None:
    simulated = Simulated(
        with_settings(on_demand="never", cost_per_hour=0.0, cost_per_day=2.0, add_seconds=DAY),
        start=10 * DAY + 20 * HOUR,
    )
    simulated.want(2)
    simulated.run(3 * HOUR, 10)
    assert 1.5 < simulated.by_day[10] <= 2.0 and simulated.machines == ()
    simulated.run(1.1 * HOUR, 10)
    assert simulated.up("spot") == 2, "a new day"


def test_what_waits_costs_nothing_and_time_that_nobody_saw_counts_as_running() -> None:
    simulated = Simulated(with_settings(on_demand="never", join_seconds=DAY), waits=True)
    simulated.cloud.set_capacity(SPOT_A, 0)
    simulated.cloud.set_capacity(SPOT_B, 0)
    simulated.run(2 * HOUR, 10)
    assert simulated.keeper.ledger.total < 0.02
    simulated.cloud.set_capacity(SPOT_A, 1)
    simulated.run(60)
    before = simulated.keeper.ledger.total
    simulated.cloud.preempt(simulated.machines[-1].name, "f")
    simulated.advance(HOUR)
    simulated.restart()
    simulated.run(5)
    assert simulated.keeper.ledger.total >= before + 1.0


def test_nothing_is_done_before_the_provider_has_said_what_there_is() -> None:
    simulated = Simulated()
    for _ in range(3):
        simulated.cloud.fail("list", ProviderUnavailable("down"))
    simulated.look()
    assert simulated.last is None and simulated.done == []
    simulated.run(60)
    assert simulated.up("spot") == 1
    assert ON_DEMAND.price > SPOT_B.price > SPOT_A.price
