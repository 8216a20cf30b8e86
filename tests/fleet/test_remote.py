"""The cluster of fleet mode over workers that follow a script: who is told what, when, and who is at fault."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from remote_cases import (
    PAGES,
    Answer,
    Fleet,
    decode_step,
    dying,
    failing,
    first_plan,
    keeping,
    names,
    next_plan,
    result,
)

from spotjax.errors import InstanceLost
from spotjax.fleet import remote, remote_kv
from spotjax.meshes.instance import DeviceRef
from spotjax.planner.plan import MigrationPlan
from spotjax.protocol import control
from spotjax.reshard.transfer import Traffic


async def test_a_change_goes_through_all_workers_step_by_step() -> None:
    preparation = first_plan()
    fleet = Fleet(names(preparation))
    assert await fleet.cluster.prepare(preparation) == Traffic(4, 8)
    assert await fleet.cluster.copy_pages(PAGES) == Traffic(4, 8)
    pipelines, traffic = await fleet.cluster.switch(PAGES)
    assert traffic == Traffic(4, 8)
    assert [what for what, _ in fleet.order] == [
        kind for kind in ("Prepare", "CopyPages", "Switch", "Adopt") for _ in range(4)
    ]
    placement = preparation.placement
    for data, pipeline in enumerate(pipelines):
        assert pipeline.name == f"1.{data}"
        assert pipeline.instances == tuple(placement.group(data, n)[0].instance for n in range(2))
    for name, worker in fleet.workers.items():
        told = worker.last(control.Prepare)
        assert told.placement.placement() == placement
        assert told.current is None
        assert told.addresses == {name: f"{name}:1" for name in fleet.workers}
        needs = {DeviceRef(name, parts.device): parts.arrays for parts in told.needs}
        wanted = {d: dict(needs.parameters) for d, needs in preparation.needs.items() if d.instance == name}
        assert needs == wanted
        assert worker.last(control.CopyPages).transfers == worker.last(control.Switch).transfers == PAGES
        assert worker.last(control.Adopt).pipelines == ("1.0", "1.1")
    assert dict(fleet.cluster.held()) == dict(preparation.needs)
    ends = {placement.group(data, stage)[0].instance for data in range(2) for stage in (0, 1)}
    assert fleet.endpoint.connections.keys() == {f"{name}:1" for name in ends}, "for steps, and for masks"
    await fleet.close()


@settings(max_examples=40)
@given(st.integers(2, 6), st.integers(2, 6), st.data())
def test_every_slice_that_moves_is_told_to_its_target_and_to_nobody_else(
    before: int, after: int, data: st.DataObject
) -> None:
    lost = data.draw(st.sets(st.sampled_from(range(before)), max_size=max(0, min(before, after) - 2)))

    async def change() -> None:
        fleet = Fleet([f"i{n}" for n in range(max(before, after))])
        current = first_plan(before)
        await fleet.form(current)
        for number in lost:
            fleet.sessions.end(f"i{number}", "its connection closed")
        preparation = next_plan(fleet, current.placement, after, [f"i{n}" for n in lost])
        await fleet.cluster.prepare(preparation)
        told = []
        for name, worker in fleet.workers.items():
            if worker.heard and worker.last(control.Prepare).placement.epoch == 2:
                moves = list(MigrationPlan(worker.last(control.Prepare).transfers, (), 0, 0, 0).moves)
                assert all(move.target.instance == name for move in moves)
                assert all(move.source is None or move.source.instance in fleet.workers for move in moves)
                told += moves
        assert sorted(map(repr, told)) == sorted(map(repr, preparation.plan.moves))
        await fleet.close()

    asyncio.run(change())


async def test_replicas_that_stay_keep_their_pipeline_and_what_they_need_soon_is_told() -> None:
    fleet = Fleet([f"i{number}" for number in range(6)])
    current = first_plan(4)
    await fleet.form(current)
    before = fleet.cluster.pipelines
    running = asyncio.create_task(before[1].run(decode_step(0)))
    await asyncio.sleep(0)
    preparation = next_plan(fleet, current.placement, 6, running=(0, 1))
    assert preparation.carried == {0: 0, 1: 1}
    await fleet.form(preparation)
    after = fleet.cluster.pipelines
    assert after[:2] == before and after[2].name == "2.2"
    for name in names(preparation):
        assert fleet.workers[name].last(control.Adopt).pipelines == ("1.0", "1.1", "2.2")
        told = fleet.workers[name].last(control.Prepare)
        assert told.carried == {0: 0, 1: 1}
        assert told.steps == tuple(before[1].recent)
        assert told.current.placement() == current.placement
    fleet.cluster.receive(*result("1.1", 0, 9))
    assert (await running).sampled[5].token == 9
    await fleet.close()


async def test_functions_that_were_compiled_during_a_change_are_said(caplog: pytest.LogCaptureFixture) -> None:
    fleet = Fleet(["i0", "i1", "i2", "i3"])
    await fleet.form(first_plan())
    assert "compiled" not in caplog.text

    async def compiling(command: Any) -> Answer:
        return control.Done(command.id, compiled=3)

    fleet.workers["i1"].script = compiling
    await fleet.form(first_plan())
    assert "3 functions were compiled while the mesh changed" in caplog.text
    caplog.clear()
    await fleet.form(first_plan())
    assert "compiled" not in caplog.text, "those of earlier changes are not counted again"
    await fleet.close()


async def test_a_result_of_an_old_pipeline_is_dropped() -> None:
    fleet = Fleet([f"i{number}" for number in range(4)])
    current = first_plan(2)
    await fleet.form(current)
    old = fleet.cluster.pipelines[0]
    preparation = next_plan(fleet, current.placement, 4)
    await fleet.form(preparation)
    new = fleet.cluster.pipelines[0]
    assert (old.name, new.name) == ("1.0", "2.0")
    running = asyncio.create_task(new.run(decode_step(3)))
    await asyncio.sleep(0)
    fleet.cluster.receive(*result("1.0", 3, 7))
    fleet.cluster.receive(*result("never was", 3, 7))
    await asyncio.sleep(0)
    assert not running.done()
    fleet.cluster.receive(*result("2.0", 3, 8))
    assert (await running).sampled[5].token == 8
    await fleet.close()


async def test_a_worker_whose_peer_turns_out_dead_is_not_blamed() -> None:
    fleet = Fleet([f"i{number}" for number in range(4)])

    def peer_dies() -> None:
        asyncio.get_running_loop().call_later(0.01, fleet.sessions.end, "i1", "its connection closed")

    async def hang(command: Any) -> Answer:
        return None

    fleet.workers["i0"].script = failing(control.Prepare, "i1", peer_dies)
    fleet.workers["i1"].script = hang
    with pytest.raises(InstanceLost, match="i1"):
        await fleet.cluster.prepare(first_plan())
    assert fleet.ends == {"i1": "its connection closed"}
    assert fleet.may_come_back("i1")
    await fleet.close()


async def test_a_peer_that_cannot_be_reached_and_does_not_die_is_given_up() -> None:
    fleet = Fleet([f"i{number}" for number in range(4)], patience=0.02)
    fleet.workers["i0"].script = failing(control.Prepare, "i1")
    with pytest.raises(InstanceLost, match="instance i1 is gone"):
        await fleet.cluster.prepare(first_plan())
    assert fleet.ends == {"i1": "it does not work"}
    assert not fleet.may_come_back("i1") and fleet.may_come_back("i0")
    await fleet.close()


async def test_a_worker_that_fails_by_itself_is_given_up_at_once() -> None:
    fleet = Fleet([f"i{number}" for number in range(4)], patience=1000)
    fleet.workers["i2"].script = failing(control.Switch)
    await fleet.cluster.prepare(first_plan())
    with pytest.raises(InstanceLost, match="i2"):
        await fleet.cluster.switch(())
    assert fleet.ends == {"i2": "it does not work"}
    assert not fleet.may_come_back("i2")
    assert not fleet.cluster.pipelines and not fleet.cluster.held()
    await fleet.close()


@pytest.mark.parametrize("what", [control.Prepare, control.CopyPages, control.Switch])
@pytest.mark.parametrize("lost", [["i3"], ["i2", "i3"]])
async def test_a_loss_before_the_switch_leaves_the_old_mesh_and_another_change_can_follow(
    what: type, lost: list[str]
) -> None:
    fleet = Fleet([f"i{number}" for number in range(4)])
    current = first_plan(2)
    await fleet.form(current)
    before = fleet.cluster.pipelines
    for name in lost:
        fleet.workers[name].script = dying(fleet, name, what)
    with pytest.raises(InstanceLost):
        await fleet.cluster.prepare(next_plan(fleet, current.placement, 4))
        await fleet.cluster.copy_pages(PAGES)
        await fleet.cluster.switch(PAGES)
    assert fleet.cluster.pipelines == before
    assert fleet.ends.keys() <= set(lost)
    for name in lost:
        fleet.sessions.end(name, "its connection closed")
    left = 4 - len(lost)
    preparation = next_plan(fleet, current.placement, left, epoch=3)
    await fleet.form(preparation)
    assert {device.instance for device in fleet.cluster.held()} == set(names(preparation))
    assert [pipeline.name for pipeline in fleet.cluster.pipelines] == ["3.0"]
    assert not any(name in pipeline.instances for pipeline in fleet.cluster.pipelines for name in lost)
    await fleet.close()


async def test_a_loss_while_the_mesh_is_adopted_is_a_loss_on_the_new_mesh() -> None:
    fleet = Fleet([f"i{number}" for number in range(4)])
    preparation = first_plan()
    lost, other = (preparation.placement.group(data, 1)[0].instance for data in range(2))
    fleet.workers[lost].script = dying(fleet, lost, control.Adopt)
    await fleet.cluster.prepare(preparation)
    (hurt, whole), _ = await fleet.cluster.switch(())
    with pytest.raises(InstanceLost, match=lost):
        await hurt.run(decode_step(0))
    running = asyncio.create_task(whole.run(decode_step(0)))
    await asyncio.sleep(0)
    fleet.cluster.receive(*result("1.1", 0, 4))
    assert (await running).sampled[5].token == 4
    assert {device.instance for device in fleet.cluster.held()} == set(fleet.workers) - {lost}
    assert other not in fleet.ends
    await fleet.close()


@pytest.mark.parametrize("back", [False, True])
async def test_a_loss_between_switch_and_adoption_does_not_leave_a_pipeline_that_waits_for_ever(back: bool) -> None:
    fleet = Fleet([f"i{number}" for number in range(4)])
    preparation = first_plan()
    lost = preparation.placement.group(0, 1)[0].instance

    def lose() -> None:
        fleet.endpoint.connecting = lambda: None
        fleet.sessions.end(lost, "its connection closed")
        if back:
            fleet.add(lost, "2")

    await fleet.cluster.prepare(preparation)
    fleet.endpoint.connecting = lose
    (hurt, _), _ = await fleet.cluster.switch(())
    with pytest.raises(InstanceLost, match=lost):
        await hurt.run(decode_step(0))
    assert lost not in {device.instance for device in fleet.cluster.held()}
    assert not (back and fleet.workers[lost].heard), "a newcomer has nothing to adopt"
    await fleet.close()


async def test_who_registers_anew_in_the_middle_of_a_change_is_not_asked_to_go_on_with_it() -> None:
    fleet = Fleet([f"i{number}" for number in range(4)])
    current = first_plan(4)
    await fleet.form(current)
    leaving = sorted(set(names(current)) - set(names(next_plan(fleet, current.placement, 4, gone=["i2", "i3"]))))
    assert leaving == ["i2", "i3"]
    preparation = next_plan(fleet, current.placement, 2)  # the two that leave are sources still
    await fleet.cluster.prepare(preparation)
    fleet.sessions.end("i3", "its connection closed")
    fleet.add("i3", "2")
    await fleet.cluster.copy_pages(())
    await fleet.cluster.switch(())
    assert fleet.workers["i3"].commands() == []
    assert fleet.workers["i2"].commands()[-3:] == ["CopyPages", "Switch", "Adopt"]

    grown = next_plan(fleet, preparation.placement, 4, epoch=3)
    await fleet.cluster.prepare(grown)
    fleet.sessions.end("i3", "its connection closed")
    fleet.add("i3", "3")
    with pytest.raises(InstanceLost, match="i3"):
        await fleet.cluster.switch(())
    assert fleet.workers["i3"].commands() == []
    await fleet.close()


async def test_whoever_cannot_be_reached_by_a_stage_that_adopts_is_at_fault_and_not_the_stage() -> None:
    fleet = Fleet([f"i{number}" for number in range(4)], patience=0.02)
    preparation = first_plan()
    first, second = (preparation.placement.group(0, number)[0].instance for number in range(2))
    fleet.workers[first].script = failing(control.Adopt, second)
    await fleet.form(preparation)
    assert fleet.ends == {second: "it does not work"}
    with pytest.raises(InstanceLost, match=second):
        await fleet.cluster.pipelines[0].run(decode_step(0))
    await fleet.close()


async def test_a_first_stage_that_the_controller_cannot_reach_is_given_up_before_anybody_adopts() -> None:
    fleet = Fleet([f"i{number}" for number in range(4)])
    preparation = first_plan()
    first = preparation.placement.group(1, 0)[0].instance
    fleet.endpoint.deaf.add(f"{first}:1")
    with pytest.raises(InstanceLost, match=first):
        await fleet.form(preparation)
    assert fleet.ends.keys() == {first} and not fleet.may_come_back(first)
    assert "Adopt" not in {what for what, _ in fleet.order}
    assert fleet.cluster.pipelines == ()
    await fleet.close()


async def test_a_plan_on_an_instance_that_is_gone_already_is_told_to_nobody() -> None:
    fleet = Fleet(["i0", "i1", "i2"])
    with pytest.raises(InstanceLost, match="i3"):
        await fleet.cluster.prepare(first_plan())
    assert fleet.order == []
    await fleet.close()


@pytest.mark.parametrize("how", ["closes", "is closed"])
async def test_steps_that_may_be_lost_with_their_connection_end_the_instance(how: str) -> None:
    fleet = Fleet([f"i{number}" for number in range(2)])
    preparation = first_plan(2)
    await fleet.form(preparation)
    first = preparation.placement.group(0, 0)[0].instance
    connection, pipeline = fleet.endpoint.connections[f"{first}:1"], fleet.cluster.pipelines[0]
    if how == "is closed":
        connection.closed.set_result(None)
    running = asyncio.create_task(pipeline.run(decode_step(0)))
    await asyncio.sleep(0)
    if how == "closes":
        assert [header.step for header, _ in connection.sent] == [0]
        connection.closed.set_result(None)
    with pytest.raises(InstanceLost, match=first):
        await running
    assert fleet.ends.keys() == {first}
    await fleet.close()


async def test_connections_that_were_replaced_or_end_with_the_service_end_nobody() -> None:
    fleet = Fleet([f"i{number}" for number in range(2)])
    preparation = first_plan(2)
    await fleet.form(preparation)
    address = f"{preparation.placement.group(0, 0)[0].instance}:1"
    old = fleet.endpoint.connections.pop(address)
    await fleet.form(next_plan(fleet, preparation.placement, 2))
    old.closed.set_result(None)
    await asyncio.sleep(0)
    await fleet.cluster.close()
    fleet.endpoint.connections[address].closed.set_result(None)
    await asyncio.sleep(0)
    assert fleet.ends == {}
    await fleet.close()


async def test_what_a_newcomer_holds_counts_until_it_is_lost() -> None:
    fleet = Fleet([])
    held = (control.Parts(0, {"embed": ((0, 4), (0, 16))}), control.Parts(1, {"norm": ((0, 16),)}))
    assert not fleet.cluster.joinable("i0")
    worker = fleet.add("i0", held=held)
    assert fleet.cluster.joinable("i0")
    fleet.cluster.join("i0")
    assert fleet.cluster.held() == {DeviceRef("i0", parts.device): parts.arrays for parts in held}
    fleet.cluster.evict("i0", at_once=True)
    fleet.cluster.lose("i0")
    assert fleet.cluster.held() == {}
    await asyncio.gather(*fleet._running)
    assert worker.heard == [control.Clear(remote.NOBODY_WAITS), control.Release(at_once=True)]
    worker = fleet.add("i1")
    worker.session.offer = None
    assert not fleet.cluster.joinable("i1")
    fleet.cluster.evict("nobody", at_once=True)
    fleet.cluster.lose("nobody")
    await fleet.close()


@pytest.mark.parametrize("back", [False, True])
async def test_what_is_left_of_a_lost_stage_is_what_the_best_keeper_has(back: bool) -> None:
    fleet = Fleet([f"i{number}" for number in range(4)], backup=True)
    preparation = first_plan()
    await fleet.form(preparation)
    for name in fleet.workers:
        fleet.cluster.join(name)
    lost, keeper = (preparation.placement.group(data, 1)[0].instance for data in range(2))
    fleet.workers[keeper].script = keeping(backups={1: 8, 2: 4})
    fleet.workers[preparation.placement.group(1, 0)[0].instance].script = keeping(backups={1: 5})
    fleet.sessions.end(lost, "its connection closed")
    if back:
        fleet.add(lost, "2")  # without its KV
    left = await fleet.cluster.survivors({0: {1: 7, 2: 9, 3: 3}})
    assert left.positions == {0: {1: 7, 2: 4, 3: 0}}
    assert left.backups == {(0, 1): keeper}
    await fleet.close()


async def test_kv_is_kept_by_another_instance_and_if_possible_in_another_zone() -> None:
    fleet = Fleet([], backup=True)
    for number, zone in enumerate(("here", "here", "there", "there")):
        fleet.add(f"i{number}", zone=zone)
    await fleet.form(first_plan())
    keepers = {name: worker.last(control.Adopt).keeper for name, worker in fleet.workers.items()}
    assert keepers == {"i0": "i2", "i1": "i2", "i2": "i0", "i3": "i0"}
    assert {worker.last(control.Adopt).bandwidth for worker in fleet.workers.values()} == {7}
    await fleet.close()


async def test_of_many_sequences_that_end_workers_are_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_kv, "FORGET_SECONDS", 0.0)
    fleet = Fleet(["i0"], backup=True)
    fleet.cluster.forget([1, 2])
    fleet.cluster.forget([])
    fleet.cluster.forget([3])
    while not fleet.workers["i0"].heard:
        await asyncio.sleep(0)
    fleet.cluster.forget([4])
    while len(fleet.workers["i0"].heard) < 2:
        await asyncio.sleep(0)
    assert fleet.workers["i0"].heard == [control.Forget((1, 2, 3)), control.Forget((4,))]
    await fleet.close()
