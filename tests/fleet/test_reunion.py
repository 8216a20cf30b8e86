"""Workers of an earlier controller: whose stages count, what is asked of them, and who has to give up what it has."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from fleet_cases import TIGHT, instances
from remote_cases import PLANNING, Answer, Fleet, failing, keeping, names, obey

from spotjax.fleet.change import plan_change
from spotjax.meshes.placement import Placement
from spotjax.protocol import control
from spotjax.reshard.transfer import Remains

SEQUENCES = {1: 7, 2: 4}


def earlier(epoch: int = 5, count: int = 4) -> Placement:
    """2x2x1: a replica has two instances."""
    return plan_change(PLANNING, None, instances(count, memory=TIGHT), {}, epoch).placement


def stages_of(placement: Placement, instance: str) -> list[tuple[int, int]]:
    return [(at.data, at.stage) for at, device in placement.devices.items() if device.instance == instance]


def home(placement: Placement, data: int, stage: int) -> str:
    return placement.group(data, stage)[0].instance


def rejoin(fleet: Fleet, placement: Placement, *, but: str = "") -> None:
    """Everybody of an earlier mesh is back; sequence ``data + 1`` is on replica ``data``, with 7 positions."""
    for name in sorted({device.instance for device in placement.devices.values()} - {but}):
        worker = fleet.add(name, placement=placement)
        remains = {(data, stage): [(data + 1, (3, 5), 7)] for data, stage in stages_of(placement, name)}
        worker.script = keeping(placement.epoch, remains)


async def test_what_is_left_of_a_mesh_is_what_all_its_stages_have() -> None:
    fleet, placement = Fleet([]), earlier()
    rejoin(fleet, placement)
    fleet.workers[home(placement, 1, 1)].script = keeping(5, {(1, 1): [(2, (3, 5, 6), 9), (8, (1,), 2)]})
    remains = await fleet.cluster.reunite(SEQUENCES)
    assert remains == Remains(placement, frozenset(fleet.workers), {0: {1: ((3, 5), 7)}, 1: {2: ((3, 5), 7)}})
    for worker in fleet.workers.values():
        assert worker.commands() == ["Reunite"]
        asked = worker.last(control.Reunite)
        assert (asked.epoch, dict(asked.sequences)) == (5, SEQUENCES)
    for name in fleet.workers:
        fleet.cluster.join(name)
    await asyncio.sleep(0)
    assert all(worker.commands() == ["Reunite"] for worker in fleet.workers.values()), "what they have counts"
    await fleet.close()


async def test_without_anybody_who_has_stages_nobody_is_asked() -> None:
    fleet = Fleet(["i0", "i1"])
    assert await fleet.cluster.reunite(SEQUENCES) is None
    assert fleet.order == []
    await fleet.close()


async def test_the_newest_mesh_counts_and_those_of_an_older_one_hold_nothing() -> None:
    fleet, newest = Fleet([]), earlier(6, 2)
    old = earlier(5, 4)
    assert {"i2", "i3"} <= {device.instance for device in old.devices.values()}
    for name in ("i2", "i3"):
        fleet.add(name, placement=old).script = keeping(5, {(0, 0): [(1, (3, 5), 7)]})
    rejoin(fleet, newest)
    fleet.add("i4")  # and somebody new
    remains = await fleet.cluster.reunite(SEQUENCES)
    assert remains == Remains(newest, frozenset({"i0", "i1"}), {0: {1: ((3, 5), 7)}})
    assert {worker.last(control.Reunite).epoch for worker in fleet.workers.values()} == {6}
    for name in fleet.workers:
        fleet.cluster.join(name)
    await asyncio.sleep(0)
    assert all(worker.commands() == ["Reunite"] for worker in fleet.workers.values()), "which gave up what is older"
    await fleet.close()


async def test_who_cannot_say_what_it_has_holds_nothing_and_gives_it_up() -> None:
    fleet, placement = Fleet([]), earlier()
    rejoin(fleet, placement)
    unable, dead = home(placement, 0, 1), home(placement, 1, 0)
    fleet.workers[unable].script = failing(control.Reunite)

    async def dies(command: Any) -> Answer:
        fleet.sessions.end(dead, "its connection closed")
        return None

    fleet.workers[dead].script = dies
    remains = await fleet.cluster.reunite(SEQUENCES)
    assert remains is not None and remains.holders == fleet.workers.keys() - {unable, dead}
    assert remains.sequences == {0: {1: ((3, 5), 7)}, 1: {2: ((3, 5), 7)}}, "by those who are left"
    fleet.cluster.join(unable)
    await asyncio.sleep(0)
    assert fleet.workers[unable].commands() == ["Reunite", "Clear"]
    await fleet.close()


async def test_who_dies_after_it_answered_and_before_the_others_did_holds_nothing() -> None:
    fleet, placement = Fleet([]), earlier()
    rejoin(fleet, placement)
    quick, slow = home(placement, 0, 0), home(placement, 0, 1)
    may_answer, script = asyncio.Event(), fleet.workers[slow].script

    async def slowly(command: Any) -> Answer:
        await may_answer.wait()
        return await script(command)

    fleet.workers[slow].script = slowly
    reunion = asyncio.create_task(fleet.cluster.reunite(SEQUENCES))
    while len(fleet.order) < 4:
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    fleet.sessions.end(quick, "its connection closed")
    fleet.add(quick, "2", placement=placement)  # and is back at once
    may_answer.set()
    remains = await reunion
    assert remains is not None and remains.holders == fleet.workers.keys() - {quick}
    fleet.cluster.join(quick)
    await asyncio.sleep(0)
    assert fleet.workers[quick].commands() == ["Clear"]
    await fleet.close()


@pytest.mark.parametrize("stages", [True, False])
@pytest.mark.parametrize("others", [True, False])
async def test_who_comes_too_late_gives_up_what_it_has_of_its_own_and_of_others(*, stages: bool, others: bool) -> None:
    fleet, placement = Fleet([]), earlier()
    if others:
        rejoin(fleet, placement, but="i2")
    remains = await fleet.cluster.reunite(SEQUENCES)
    assert remains is None or "i2" not in remains.holders
    fleet.add("i2", placement=placement if stages else None)
    fleet.cluster.join("i2")
    await asyncio.sleep(0)
    assert fleet.workers["i2"].commands() == ["Clear"]
    await fleet.close()


async def test_copies_of_stages_that_nobody_brought_back_are_asked_for() -> None:
    fleet, placement = Fleet([], backup=True), earlier()
    lost = home(placement, 0, 1)
    rejoin(fleet, placement, but=lost)
    keeper = fleet.add("i9")
    keeper.script = keeping(5, backups={1: 5, 2: 4})
    remains = await fleet.cluster.reunite(SEQUENCES)
    assert remains is not None and remains.holders == fleet.workers.keys() - {"i9"}
    survivors = await fleet.cluster.survivors({0: {1: 6, 3: 2}})
    assert keeper.last(control.Coverage).layers == placement.layers[1]
    assert survivors.backups == {(0, 1): "i9"} and survivors.positions == {0: {1: 5, 3: 0}}
    again = fleet.add(lost, "2")  # it is back, with nothing
    fleet.cluster.join(lost)
    assert (await fleet.cluster.survivors({0: {1: 6}})).backups == {(0, 1): "i9"}
    assert again.commands() == ["Clear", "Coverage"]
    await fleet.close()


async def test_a_change_of_the_mesh_follows_with_it_as_the_one_that_kv_comes_from() -> None:
    fleet, placement = Fleet([]), earlier()
    rejoin(fleet, placement)
    await fleet.cluster.reunite(SEQUENCES)
    preparation = plan_change(PLANNING, placement, instances(4, memory=TIGHT), {0: [], 1: []}, 6)
    await fleet.form(preparation)
    for name in names(preparation):
        told = fleet.workers[name].last(control.Prepare)
        assert told.current is not None and told.current.placement() == placement
    assert [pipeline.name for pipeline in fleet.cluster.pipelines] == ["6.0", "6.1"]
    await fleet.close()


async def test_whoever_obeys_without_anything_left_holds_nothing() -> None:
    fleet, placement = Fleet([]), earlier()
    rejoin(fleet, placement)
    for worker in fleet.workers.values():
        worker.script = obey
    remains = await fleet.cluster.reunite({})
    assert remains == Remains(placement, frozenset(), {})
    await fleet.close()


async def test_copies_count_though_nobody_is_left_who_had_a_stage() -> None:
    fleet = Fleet([])
    spare, other = fleet.add("spare", copies=True), fleet.add("other")
    spare.script = keeping(backups={1: 6, 2: 4})
    remains = await fleet.cluster.reunite(SEQUENCES)
    assert remains is not None and not remains.holders and remains.sequences == {}
    assert [worker.commands() for worker in (spare, other)] == [["Reunite"], ["Reunite"]], "what is not certain goes"
    left = await fleet.cluster.survivors({0: SEQUENCES})
    assert left.positions == {0: {1: 6, 2: 4}} and left.backups == {(0, 0): "spare"}
    await fleet.close()


async def test_who_comes_between_is_not_asked_for_copies_before_it_has_joined() -> None:
    fleet, placement = Fleet([]), earlier()
    rejoin(fleet, placement, but=home(placement, 0, 1))
    assert await fleet.cluster.reunite(SEQUENCES) is not None
    late = fleet.add("late", copies=True)
    late.script = keeping(backups={1: 99})
    left = await fleet.cluster.survivors({0: SEQUENCES})
    assert left.positions == {0: {1: 0, 2: 0}} and late.commands() == []
    await fleet.close()
