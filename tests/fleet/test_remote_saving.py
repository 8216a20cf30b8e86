"""Saving with workers that follow a script: what one of them does or does not do is said, and nobody waits for ever."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from remote_cases import Answer, Fleet, dying, failing, first_plan, keeping, names, obey

from spotjax.checkpoint.saves import Save
from spotjax.errors import CheckpointError
from spotjax.fleet.cluster import SavedKv
from spotjax.protocol import control
from spotjax.reshard.transfer import Survivors


async def serving() -> tuple[Fleet, list[str]]:
    """Four workers with a mesh, and one that has none of it."""
    preparation = first_plan()
    fleet, members = Fleet([*names(preparation), "spare"]), names(preparation)
    await fleet.form(preparation)
    return fleet, members


async def hang(command: Any) -> Answer:
    return None


async def test_everybody_of_the_mesh_saves_and_what_they_saved_is_summed() -> None:
    fleet, members = await serving()
    assert await fleet.cluster.save_kv("/here", 0.0, last=False) == SavedKv(4)
    assert await fleet.cluster.save_kv("/here", 3.0, last=True) == SavedKv(4)
    for name in members:
        told = [message for message in fleet.workers[name].heard if isinstance(message, control.SaveKv)]
        assert [(one.path, one.seconds, one.last) for one in told] == [("/here", 0.0, False), ("/here", 3.0, True)]
    assert "SaveKv" not in fleet.workers["spare"].commands()
    await fleet.close()


async def test_who_fails_dies_or_does_not_answer_is_left_out_with_the_reason() -> None:
    fleet, members = await serving()

    async def in_part(command: Any) -> Answer:
        return control.Done(command.id, 5, left_out="there was no time") if command else None

    scripts = [in_part, failing(control.SaveKv), dying(fleet, members[2], control.SaveKv), hang]
    for name, script in zip(members, scripts, strict=True):
        fleet.workers[name].script = script
    async with asyncio.timeout(5):
        saved = await fleet.cluster.save_kv("/here", 0.2, last=True)
    assert saved.bytes == 5
    reasons = ["there was no time", "it does not work", f"instance {members[2]} is gone", "no answer in time"]
    for name, reason in zip(members, reasons, strict=True):
        assert reason in saved.left_out[name]
    again = await fleet.cluster.save_kv("/here", 0.0, last=True)
    assert f"instance {members[2]} is gone" in again.left_out[members[2]]
    await fleet.close()


async def test_parameters_are_those_of_the_whole_mesh_or_an_error() -> None:
    fleet, members = await serving()
    assert await fleet.cluster.save_parameters("/here") == 4
    for script, said in (
        (failing(control.SaveParameters), "save them again: it does not work"),
        (dying(fleet, members[1], control.SaveParameters), "is gone"),
        (obey, "is gone"),
    ):
        fleet.workers[members[1]].script = script
        fleet.workers[members[2]].script = hang  # who asked does not wait for the others
        with pytest.raises(CheckpointError, match=said):
            await fleet.cluster.save_parameters("/here")
    await fleet.close()


async def test_who_was_there_before_the_save_is_told_of_it_when_copies_are_looked_for() -> None:
    fleet, members = await serving()
    fleet.cluster.join("spare")
    fleet.cluster.use_save(Save("/here/1", "service", 1, 2, {5: 9, 6: 3}))
    for name in members:
        fleet.sessions.end(name, "its connection closed")
    fleet.workers["spare"].script = keeping(backups={5: 9})
    survivors = await fleet.cluster.survivors({0: {5: 9, 6: 4}})
    assert survivors == Survivors({0: {5: 9, 6: 0}}, {(0, 0): "spare", (0, 1): "spare"})
    told = fleet.workers["spare"].last(control.Coverage)
    assert (told.save, dict(told.saved)) == ("/here/1", {5: 9, 6: 3})
    await fleet.close()
