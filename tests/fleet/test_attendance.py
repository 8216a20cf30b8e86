"""Instances come and go at any time, also while the mesh changes: who waits for one is told, no state is mixed up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import wraps
from random import Random
from typing import Any

import pytest
from fleet_cases import TIGHT, instances, make_service
from pure_model import turns
from timed_cases import Fleet, TimedCluster, make_fleet, now
from virtual_time import run

from spotjax.errors import InstanceLost, NoFeasibleShape, UnknownInstance
from spotjax.meshes.instance import InstanceState

Scenario = Callable[..., Coroutine[Any, Any, None]]


def in_virtual_time(scenario: Scenario) -> Callable[..., None]:
    @wraps(scenario)
    def test(**arguments: object) -> None:
        run(scenario(**arguments))

    return test


def states(fleet: Fleet) -> dict[str, InstanceState]:
    return {instance.name: instance.state for instance in fleet.service.members.all()}


def mesh(fleet: Fleet) -> set[str]:
    placement = fleet.service.controller.status().placement
    return {device.instance for device in placement.devices.values()} if placement is not None else set()


async def finish(fleet: Fleet) -> None:
    await fleet.finish()
    fleet.service.check_complete()


@in_virtual_time
async def test_who_registers_joins_when_it_has_arrived_and_not_before() -> None:
    fleet = await make_fleet(1)
    fleet.register("i1")
    await asyncio.sleep(5)
    assert states(fleet)["i1"] is InstanceState.JOINING and mesh(fleet) == {"i0"}
    fleet.arrive("i1")
    await asyncio.sleep(5)
    assert states(fleet)["i1"] is InstanceState.READY and mesh(fleet) == {"i0", "i1"}
    await finish(fleet)


@in_virtual_time
async def test_add_reports_when_all_that_it_asked_for_have_arrived() -> None:
    async def supply(count: int) -> list[str]:
        names = [f"new{n}" for n in range(count)]
        for delay, name in enumerate(names, 1):
            asyncio.get_running_loop().call_later(delay, fleet.register, name)
            asyncio.get_running_loop().call_later(10 * delay, fleet.arrive, name)
        fleet.cluster.absent.update(names)
        return names

    fleet = await make_fleet(1, supply=supply)
    fleet.service.submit("r", max_tokens=30, ignore_eos=True)
    started = now()
    report = await fleet.service.controller.add(2)
    assert 20 < now() - started < 22 and report.after is not None
    assert mesh(fleet) == {"i0", "new0", "new1"}
    await finish(fleet)


@pytest.mark.parametrize("registered", [False, True])
@in_virtual_time
async def test_add_is_told_of_a_machine_that_dies_before_it_arrives(registered: bool) -> None:
    async def supply(count: int) -> list[str]:
        if registered:
            asyncio.get_running_loop().call_later(1, fleet.register, "new")
        asyncio.get_running_loop().call_later(2, fleet.die, "new")
        fleet.cluster.absent.add("new")
        return ["new"]

    fleet = await make_fleet(1, supply=supply)
    with pytest.raises(InstanceLost, match="instance new is gone before it joined"):
        await fleet.service.controller.add(1)
    await asyncio.sleep(1)
    assert mesh(fleet) == {"i0"} and states(fleet).get("new", InstanceState.GONE) is InstanceState.GONE
    await finish(fleet)


@in_virtual_time
async def test_the_next_life_of_a_machine_that_died_before_it_arrived_is_waited_for_by_itself() -> None:
    async def supply(count: int) -> list[str]:
        fleet.cluster.absent.add("new")
        return ["new"]

    fleet = await make_fleet(1, supply=supply)
    first = asyncio.create_task(fleet.service.controller.add(1))
    await asyncio.sleep(1)
    fleet.die("new")
    second = asyncio.create_task(fleet.service.controller.add(1))
    await asyncio.sleep(1)
    assert isinstance(first.exception(), InstanceLost) and not second.done()
    fleet.register("new")
    fleet.arrive("new")
    assert (await second).after is not None and mesh(fleet) == {"i0", "new"}
    await finish(fleet)


@in_virtual_time
async def test_add_does_not_outlive_the_service() -> None:
    async def supply(count: int) -> list[str]:
        fleet.cluster.absent.add("new")
        return ["new"]

    fleet = await make_fleet(1, supply=supply)
    adding = asyncio.create_task(fleet.service.controller.add(1))
    await asyncio.sleep(1)
    await finish(fleet)
    with pytest.raises(InstanceLost, match="has not arrived, and the service ends"):
        await adding


@in_virtual_time
async def test_a_worker_that_registers_again_joins_only_when_the_mesh_has_left_its_old_self() -> None:
    """The cluster itself refuses to let it join before."""
    fleet = await make_fleet(2)
    for n in range(4):
        fleet.service.submit(f"r{n}", max_tokens=30, ignore_eos=True, seed=n)
    await asyncio.sleep(0.3)
    fleet.die("i1")
    fleet.register("i1")
    fleet.arrive("i1")
    assert states(fleet)["i1"] is InstanceState.JOINING and mesh(fleet) == {"i0", "i1"}
    await asyncio.sleep(5)
    assert states(fleet)["i1"] is InstanceState.READY and mesh(fleet) == {"i0", "i1"}
    changes = [event.message for event in fleet.service.controller.recent() if event.kind == "switch"]
    assert len(changes) == 3, "one to leave the old self, one to take in the new one"
    await finish(fleet)


@in_virtual_time
async def test_the_deadline_of_an_old_self_means_nothing_to_its_successor() -> None:
    fleet = await make_fleet(2, memory=TIGHT)  # no mesh without i1, so that its notice is waited out
    fleet.notice("i1", 20, in_time=False)
    await asyncio.sleep(5)
    fleet.die("i1")
    fleet.register("i1")
    fleet.arrive("i1")
    await asyncio.sleep(5)
    assert mesh(fleet) == {"i0", "i1"}
    fleet.notice("i1", 60)
    await asyncio.sleep(30)
    assert states(fleet)["i1"] is InstanceState.NOTICED and mesh(fleet) == {"i0", "i1"}
    await asyncio.sleep(30)
    assert states(fleet)["i1"] is InstanceState.GONE and mesh(fleet) == set()
    await fleet.service.controller.close()


@in_virtual_time
async def test_a_notice_that_still_waits_for_a_change_does_not_end_the_next_life_of_its_instance() -> None:
    fleet = await make_fleet(5, memory=TIGHT, leave="late")
    for n in range(600):
        fleet.service.submit(f"r{n}", max_tokens=30, ignore_eos=True, seed=n)
    await asyncio.sleep(0.3)
    spare = ({f"i{n}" for n in range(5)} - mesh(fleet)).pop()
    fleet.notice(min(mesh(fleet)), 60)  # this change lasts until its deadline
    await asyncio.sleep(1)
    fleet.notice(spare, 20, in_time=False)
    await asyncio.sleep(1)
    fleet.die(spare)
    fleet.register(spare)
    fleet.arrive(spare)
    await asyncio.sleep(1)
    fleet.notice(spare, 100)
    await asyncio.sleep(22)
    assert states(fleet)[spare] is InstanceState.NOTICED, "the first deadline was not its own"
    await fleet.service.controller.close()


@in_virtual_time
async def test_who_dies_right_after_its_notice_stays_dead() -> None:
    fleet = await make_fleet(3)
    fleet.notice("i2", 30, in_time=False)
    fleet.die("i2")
    await asyncio.sleep(10)
    assert states(fleet)["i2"] is InstanceState.GONE and mesh(fleet) == {"i0", "i1"}
    await finish(fleet)


@in_virtual_time
async def test_of_two_notices_the_earlier_deadline_counts() -> None:
    fleet = await make_fleet(3, leave="late")
    for n in range(30):
        fleet.service.submit(f"r{n}", max_tokens=30, ignore_eos=True)
    fleet.notice("i2", 30)
    await asyncio.sleep(0.1)
    fleet.notice("i2", 50, source="another")
    assert fleet.service.members.deadline("i2") == pytest.approx(now() + 29.9)
    fleet.notice("i2", 0.11, in_time=False)  # two steps, which may be in flight, take 0.1 s at most
    await asyncio.sleep(2)
    assert states(fleet)["i2"] is InstanceState.GONE
    await finish(fleet)


@in_virtual_time
async def test_a_notice_before_it_joined_is_its_end() -> None:
    fleet = await make_fleet(1)
    fleet.register("i1")
    fleet.notice("i1", 30, in_time=False)
    assert states(fleet)["i1"] is InstanceState.GONE
    fleet.notice("unheard-of", 30, in_time=False)
    await asyncio.sleep(1)
    assert mesh(fleet) == {"i0"}
    await finish(fleet)


@in_virtual_time
async def test_release_moves_off_and_lets_go() -> None:
    fleet = await make_fleet(2)
    for n in range(3):
        fleet.service.submit(f"r{n}", max_tokens=30, ignore_eos=True, seed=n)
    await asyncio.sleep(0.3)
    report = await fleet.service.controller.release("i0")
    assert report.requests_recomputed == 0 and report.requests_kept
    assert states(fleet)["i0"] is InstanceState.GONE and mesh(fleet) == {"i1"}
    with pytest.raises(UnknownInstance):
        await fleet.service.controller.release("i0")
    await finish(fleet)


@in_virtual_time
async def test_release_of_what_cannot_be_spared_is_refused_and_changes_nothing() -> None:
    fleet = await make_fleet(2, memory=TIGHT)
    with pytest.raises(NoFeasibleShape):
        await fleet.service.controller.release("i0")
    assert states(fleet)["i0"] is InstanceState.READY and mesh(fleet) == {"i0", "i1"}
    await finish(fleet)


@in_virtual_time
async def test_release_of_who_has_not_joined_ends_it() -> None:
    fleet = await make_fleet(1)
    fleet.register("i1")
    await fleet.service.controller.release("i1")
    assert states(fleet)["i1"] is InstanceState.GONE and mesh(fleet) == {"i0"}
    await finish(fleet)


@in_virtual_time
async def test_a_drained_instance_serves_on_while_what_was_to_replace_it_is_gone() -> None:
    fleet = await make_fleet(3, memory=TIGHT)
    for n in range(3):
        fleet.service.submit(f"r{n}", max_tokens=30, ignore_eos=True, seed=n)
    spare = ({"i0", "i1", "i2"} - mesh(fleet)).pop()
    leaving = min(mesh(fleet))
    releasing = asyncio.create_task(fleet.service.controller.release(leaving))
    await turns(1)
    fleet.die(spare)
    await asyncio.sleep(100)
    assert not releasing.done() and states(fleet)[leaving] is InstanceState.DRAINING
    assert fleet.service.controller.status().requests_finished == 3, "it served on"
    fleet.register(spare)
    fleet.arrive(spare)
    report = await releasing
    assert report.after is not None and states(fleet)[leaving] is InstanceState.GONE and spare in mesh(fleet)
    await finish(fleet)


@in_virtual_time
async def test_a_change_during_a_change_leads_to_the_mesh_of_those_that_are_left() -> None:
    fleet = await make_fleet(4)
    for n in range(6):
        fleet.service.submit(f"r{n}", max_tokens=30, ignore_eos=True, seed=n)
    await asyncio.sleep(0.2)
    releasing = asyncio.create_task(fleet.service.controller.release("i0"))
    await asyncio.sleep(0.01)
    fleet.notice("i1", 10)
    await asyncio.sleep(0.01)
    fleet.die("i2")
    report = await releasing
    assert report.after is not None
    await asyncio.sleep(5)
    assert mesh(fleet) == {"i3"} and [i.name for i in fleet.service.members.alive()] == ["i3"]
    await finish(fleet)


@in_virtual_time
async def test_a_loss_while_the_first_mesh_is_formed_is_not_missed() -> None:
    cluster = TimedCluster(Random(0))
    service = make_service(Random(0), instances(2), cluster=cluster)
    switch = cluster.switch

    async def lost_at_the_end(transfers):  # type: ignore[no-untyped-def]
        outcome = await switch(transfers)
        if cluster.switches == 1:
            service.controller.gone("i1", "(its connection closed)")
        return outcome

    cluster.switch = lost_at_the_end  # type: ignore[method-assign]
    await service.controller.start()
    await asyncio.sleep(5)
    assert mesh(Fleet(service, cluster)) == {"i0"}
    await finish(Fleet(service, cluster))


@in_virtual_time
async def test_who_goes_when_the_service_closes_is_noted_and_nothing_changes_for_it() -> None:
    """When a server stops, all connections end: nobody is to plan with instances that are gone, without end."""
    fleet = await make_fleet(3)
    controller = fleet.service.controller
    closing = asyncio.create_task(controller.close())
    await turns(1)
    before = [event.kind for event in controller.recent()]
    fleet.die("i0")
    fleet.notice("i1", 20, in_time=False)
    await closing
    fleet.die("i2")
    await asyncio.sleep(30)
    assert set(states(fleet).values()) == {InstanceState.GONE}
    assert [event.kind for event in controller.recent()] == [*before, "lost", "notice", "lost", "lost"]
