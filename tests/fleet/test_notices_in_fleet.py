"""What the fleet makes of notices: advice, maintenance far away, ends without a time, and those that are taken back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import wraps
from typing import Any

import pytest
from fleet_cases import TIGHT
from timed_cases import Fleet, make_fleet, now
from virtual_time import run

from spotjax.fleet.notices.intervals import NoticeRecord
from spotjax.fleet.notices.notice import NoticeKind
from spotjax.fleet.notices.standing import ASSUMED_SECONDS, LEAD_SECONDS
from spotjax.fleet.status import FleetEvent
from spotjax.meshes.instance import InstanceState

Scenario = Callable[..., Coroutine[Any, Any, None]]
READY, NOTICED, DRAINING, GONE = (
    InstanceState.READY, InstanceState.NOTICED, InstanceState.DRAINING, InstanceState.GONE
)  # fmt: skip


def in_virtual_time(scenario: Scenario) -> Callable[..., None]:
    @wraps(scenario)
    def test(**arguments: object) -> None:
        run(scenario(**arguments))

    return test


def state(fleet: Fleet, name: str) -> InstanceState:
    return {instance.name: instance.state for instance in fleet.service.members.all()}[name]


def mesh(fleet: Fleet) -> set[str]:
    placement = fleet.service.controller.status().placement
    return {device.instance for device in placement.devices.values()} if placement is not None else set()


def advised(fleet: Fleet) -> set[str]:
    return {instance.name for instance in fleet.service.controller.status().instances if instance.advised}


def events(fleet: Fleet, kind: str) -> list[FleetEvent]:
    return [event for event in fleet.service.controller.recent() if event.kind == kind]


async def finish(fleet: Fleet) -> None:
    await fleet.finish()
    fleet.service.check_complete()


@in_virtual_time
async def test_advice_changes_nothing_but_that_the_fleet_knows() -> None:
    fleet = await make_fleet(2)
    fleet.notice("i1", None, kind=NoticeKind.REBALANCE, source="aws-rebalance")
    await asyncio.sleep(1000)
    assert mesh(fleet) == {"i0", "i1"} and state(fleet, "i1") is READY
    assert advised(fleet) == fleet.service.members.advised == {"i1"}
    (event,) = events(fleet, "notice")
    assert event.fields == {"instance": "i1", "source": "aws-rebalance", "kind": "rebalance"}
    fleet.notice("i1", 30, source="aws")
    await asyncio.sleep(10)
    assert mesh(fleet) == {"i0"} and state(fleet, "i1") is GONE and not advised(fleet)
    assert events(fleet, "lost")[0].fields["notice_seconds"] == pytest.approx(1000, abs=5)
    await finish(fleet)


@in_virtual_time
async def test_an_instance_serves_on_until_shortly_before_its_maintenance() -> None:
    fleet = await make_fleet(2)
    fleet.notice("i1", 4000, kind=NoticeKind.MAINTENANCE, in_time=False)
    await asyncio.sleep(4000 - LEAD_SECONDS - 1)
    assert mesh(fleet) == {"i0", "i1"} and state(fleet, "i1") is READY and advised(fleet) == {"i1"}
    await asyncio.sleep(10)
    assert mesh(fleet) == {"i0"} and state(fleet, "i1") is GONE
    await finish(fleet)


@in_virtual_time
async def test_maintenance_that_is_called_off_is_none() -> None:
    fleet = await make_fleet(2)
    fleet.notice("i1", 4000, kind=NoticeKind.MAINTENANCE, in_time=False)
    await asyncio.sleep(100)
    fleet.withdraw("i1")
    assert not advised(fleet) and events(fleet, "withdrawn")[0].fields == {"instance": "i1", "source": "cloud"}
    await asyncio.sleep(10_000)
    assert mesh(fleet) == {"i0", "i1"} and state(fleet, "i1") is READY
    await finish(fleet)


@in_virtual_time
async def test_who_is_to_end_at_an_unknown_time_is_taken_to_have_little() -> None:
    fleet = await make_fleet(2, memory=TIGHT)  # no mesh without it, so that its time is used
    fleet.notice("i1", None)
    assert events(fleet, "notice")[0].fields["seconds"] == ASSUMED_SECONDS
    await asyncio.sleep(ASSUMED_SECONDS - 0.5)
    assert state(fleet, "i1") is NOTICED and mesh(fleet) == {"i0", "i1"}
    await asyncio.sleep(1)
    assert state(fleet, "i1") is GONE
    await fleet.service.controller.close()


@pytest.mark.parametrize("after", [0.0, 0.01, 0.1, 0.2, 0.3])
@in_virtual_time
async def test_who_may_stay_after_all_is_ready_again_whatever_was_under_way(after: float) -> None:
    fleet = await make_fleet(3, seed=int(100 * after))
    for n in range(6):
        fleet.service.submit(f"r{n}", max_tokens=36, ignore_eos=True, seed=n)
    await asyncio.sleep(0.5)
    fleet.notice("i1", 60)
    await asyncio.sleep(after)
    gone = state(fleet, "i1") is GONE
    fleet.withdraw("i1")
    await asyncio.sleep(100)
    if gone:
        assert state(fleet, "i1") is GONE and mesh(fleet) == {"i0", "i2"}
    else:
        assert state(fleet, "i1") is READY and mesh(fleet) == {"i0", "i1", "i2"}
    await finish(fleet)


@in_virtual_time
async def test_who_waits_for_its_end_without_another_mesh_goes_on_when_it_may_stay() -> None:
    fleet = await make_fleet(2, memory=TIGHT)
    for n in range(3):
        fleet.service.submit(f"r{n}", max_tokens=36, ignore_eos=True, seed=n)
    fleet.notice("i1", 60, in_time=False)
    await asyncio.sleep(1)
    fleet.withdraw("i1")
    await asyncio.sleep(100)
    assert state(fleet, "i1") is READY and mesh(fleet) == {"i0", "i1"} and not events(fleet, "stop")
    fleet.notice("i1", 60, in_time=False)  # that it was noticed once is no reason to let it go at its first deadline
    await asyncio.sleep(50)
    assert state(fleet, "i1") is NOTICED
    await asyncio.sleep(11)
    assert state(fleet, "i1") is GONE
    await fleet.service.controller.close()


@in_virtual_time
async def test_what_one_source_takes_back_another_one_still_holds() -> None:
    fleet = await make_fleet(2, memory=TIGHT)
    fleet.notice("i1", 20, source="gce", in_time=False)
    fleet.notice("i1", 60, source="signal", in_time=False)
    fleet.withdraw("i1", source="gce")
    assert fleet.service.members.deadline("i1") == pytest.approx(now() + 60)
    await asyncio.sleep(40)
    assert state(fleet, "i1") is NOTICED
    await asyncio.sleep(21)
    assert state(fleet, "i1") is GONE
    await fleet.service.controller.close()


@in_virtual_time
async def test_a_drain_outlives_a_notice_that_is_taken_back() -> None:
    fleet = await make_fleet(3, memory=TIGHT)
    spare = ({"i0", "i1", "i2"} - mesh(fleet)).pop()
    leaving = min(mesh(fleet))
    releasing = asyncio.create_task(fleet.service.controller.release(leaving))
    await asyncio.sleep(0)
    fleet.die(spare)
    fleet.notice(leaving, 60, in_time=False)
    await asyncio.sleep(1)
    assert state(fleet, leaving) is NOTICED
    fleet.withdraw(leaving)
    assert state(fleet, leaving) is DRAINING
    await asyncio.sleep(100)
    assert not releasing.done() and state(fleet, leaving) is DRAINING
    fleet.register(spare)
    fleet.arrive(spare)
    assert (await releasing).after is not None and state(fleet, leaving) is GONE
    await finish(fleet)


@in_virtual_time
async def test_advice_to_one_that_is_still_joining_is_kept_and_maintenance_of_it_is_acted_on_later() -> None:
    fleet = await make_fleet(1)
    fleet.register("i1")
    fleet.notice("i1", None, kind=NoticeKind.REBALANCE, source="aws-rebalance")
    fleet.notice("i1", 4000, kind=NoticeKind.MAINTENANCE, in_time=False)
    fleet.arrive("i1")
    await asyncio.sleep(100)
    assert mesh(fleet) == {"i0", "i1"} and advised(fleet) == {"i1"}
    await asyncio.sleep(4000)
    assert state(fleet, "i1") is GONE
    fleet.register("i1")
    assert not advised(fleet), "that was said of its former life"
    fleet.arrive("i1")
    await asyncio.sleep(10_000)
    assert state(fleet, "i1") is READY
    await finish(fleet)


@in_virtual_time
async def test_how_long_instances_really_lived_after_their_notices_is_kept_by_source() -> None:
    fleet = await make_fleet(4)
    first, second, third, _ = sorted(mesh(fleet))
    fleet.notice(first, 60, source="gce", in_time=False)
    fleet.notice(first, 60, source="gce", in_time=False)  # said again
    fleet.notice(second, 60, source="gce", in_time=False)
    fleet.withdraw(second, source="gce")
    fleet.notice(second, None, source="aws-rebalance", kind=NoticeKind.REBALANCE)
    await asyncio.sleep(20)
    assert state(fleet, first) is GONE
    fleet.notice(third, 60, source="aws", in_time=False)
    fleet.die(third)
    await asyncio.sleep(10)
    fleet.die(second)
    await asyncio.sleep(1)
    lost = {str(event.fields["instance"]): event.fields["notice_seconds"] for event in events(fleet, "lost")}
    assert lost[second] == pytest.approx(30) and lost[third] == 0
    aws, rebalance, gce = fleet.service.controller.status().notices
    assert aws == NoticeRecord("aws", given=1, taken=1)
    assert gce == NoticeRecord("gce", given=2, withdrawn=1, left=1)
    assert (rebalance.source, rebalance.given, rebalance.taken) == ("aws-rebalance", 1, 1)
    assert rebalance.shortest_seconds == rebalance.longest_seconds == pytest.approx(30)
    await fleet.service.controller.close()
