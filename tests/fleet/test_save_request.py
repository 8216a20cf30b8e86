"""Saves on request: what operators are told of them, one at a time, and whatever happens meanwhile has a clear end."""

from __future__ import annotations

import asyncio

import pytest
from saving_cases import SavingFleet, bring_back, busy, in_virtual_time, make_saving_fleet

from spotjax.errors import CheckpointError
from spotjax.fleet.status import Saved


def save(fleet: SavingFleet, *, parameters: bool = True, state: bool = True) -> asyncio.Task[Saved]:
    """Asks for one."""
    asked = fleet.service.controller.save("/here", parameters=parameters, state=state, seconds=10)
    return asyncio.create_task(asked)  # type: ignore[arg-type]


@in_virtual_time
async def test_parameters_then_kv_then_tokens_are_saved_while_requests_run() -> None:
    fleet = await busy()
    before = fleet.service.controller.status().tokens_committed
    saved = await save(fleet)
    assert fleet.service.controller.status().tokens_committed > before
    (made,) = fleet.saves.made
    assert made.path == "/here/1" and fleet.files.states == ["/here/1"] and fleet.files.complete_in == ["/here"]
    assert fleet.told() == [("/here/1", True)] and fleet.cluster.told[0][2] == 10
    assert not fleet.cluster.saves, "it is the operators', who may remove it at any time"
    positions = sum(made.sequences.values())
    assert saved == Saved("/here", 100, 3, len(made.sequences), positions, 7, (), saved.seconds)
    assert made.sequences and saved.seconds == pytest.approx(0.7, abs=0.05)
    await fleet.finish()


@in_virtual_time
async def test_either_is_saved_without_the_other() -> None:
    fleet = await busy()
    saved = await save(fleet, state=False)
    assert (saved.parameter_bytes, saved.requests, saved.kv_bytes) == (100, 0, 0) and not fleet.cluster.told
    saved = await save(fleet, parameters=False)
    assert (saved.parameter_bytes, saved.requests, saved.kv_bytes) == (0, 3, 7)
    assert fleet.files.complete_in == ["/here"], "there may well be a checkpoint that is complete"
    await fleet.finish()


@in_virtual_time
async def test_what_cannot_be_saved_is_refused_first() -> None:
    fleet = await make_saving_fleet(log=None)
    with pytest.raises(CheckpointError, match="durability none"):
        await save(fleet)
    await save(fleet, state=False)
    with pytest.raises(CheckpointError, match="complete already"):
        await save(fleet, state=False)
    assert fleet.files.complete_in == ["/here"] and not fleet.cluster.told
    await fleet.finish()


@in_virtual_time
async def test_a_second_save_is_refused_while_one_goes_on() -> None:
    fleet = await busy()
    first = save(fleet)
    await asyncio.sleep(0.05)
    with pytest.raises(CheckpointError, match="a save to /here is under way; try again when it is done"):
        await save(fleet)
    await first
    await save(fleet, parameters=False)
    await fleet.finish()


@in_virtual_time
async def test_it_goes_on_when_who_asked_for_it_goes_away() -> None:
    fleet = await busy()
    asking = save(fleet)
    await asyncio.sleep(0.05)
    asking.cancel()
    await asyncio.sleep(2)
    assert asking.cancelled() and len(fleet.saves.made) == len(fleet.files.states) == 1
    await fleet.finish()


@in_virtual_time
async def test_it_ends_with_the_service_and_says_so() -> None:
    fleet = await busy()
    asking = save(fleet)
    await asyncio.sleep(0.05)
    await fleet.service.controller.close()
    with pytest.raises(CheckpointError, match="the service ended"):
        await asking
    fleet.service.controller.failure.cancel()


@in_virtual_time
async def test_a_failure_says_what_there_is_all_the_same() -> None:
    fleet = await busy()
    fleet.files.problem = "the disk is full"
    with pytest.raises(CheckpointError, match="the disk is full; the parameters are saved, ask for the state alone"):
        await save(fleet)
    with pytest.raises(CheckpointError, match=r"^the disk is full$"):
        await save(fleet, parameters=False)
    fleet.files.complete_in.clear()

    def lost() -> int:
        raise CheckpointError("parameters are not all saved")

    fleet.cluster.parameters = lost
    with pytest.raises(CheckpointError, match=r"^parameters are not all saved$"):
        await save(fleet)
    assert not fleet.files.complete_in, "half of it is no checkpoint"
    assert "not all was saved to /here: parameters are not all saved" in fleet.events("saved")
    await fleet.finish()


@in_virtual_time
async def test_without_a_mesh_only_tokens_can_be_saved() -> None:
    fleet = await busy(checkpoint="")
    fleet.die("i0")
    await asyncio.sleep(5)
    with pytest.raises(CheckpointError, match="there is no mesh"):
        await save(fleet)
    saved = await save(fleet, parameters=False)
    assert (saved.requests, saved.sequences, saved.kv_bytes) == (3, 0, 0)
    assert not fleet.saves.made and fleet.files.states == ["/here/1"]
    fleet.register("i0")
    fleet.arrive("i0")
    await fleet.finish()


@in_virtual_time
async def test_the_mesh_changes_and_the_fleet_is_saved_while_a_save_goes_on() -> None:
    fleet = await busy()
    fleet.cluster.takes = 4.0
    asking = save(fleet, parameters=False)
    await asyncio.sleep(0.5)
    for name in ("i0", "i1"):
        fleet.notice(name, 5)
    saved = await asking
    assert saved.sequences
    await asyncio.sleep(6)
    assert {save.path for save in fleet.saves.made} == {"/here/1", "/checkpoint/2"}
    assert [save.path for save in fleet.cluster.saves] == ["/checkpoint/2"]
    await bring_back(fleet)
