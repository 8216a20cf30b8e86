"""KV is saved when the whole fleet is to be taken, and only then; what counts is what was recorded before it was."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
from recording_log import RecordingLog
from saving_cases import SavingFleet, bring_back, busy, in_virtual_time, make_saving_fleet
from timed_cases import now

from spotjax.checkpoint.saves import Save
from spotjax.engine.commit_log import RecordedRequest
from spotjax.engine.generation import GenerationRequest
from spotjax.engine.request import FinishReason, RequestState, SamplingParams
from spotjax.fleet.saving import MARGIN_SECONDS, RESERVE_SECONDS, Saves, still_certain, tokens_digest
from spotjax.meshes.instance import DeviceRef
from spotjax.meshes.placement import Placement
from spotjax.meshes.shape import MeshShape, Position


async def take_all(fleet: SavingFleet, seconds: float) -> None:
    """Notice to everybody; returns when they are gone."""
    for name in ("i0", "i1"):
        fleet.notice(name, seconds)
    await asyncio.sleep(seconds + 1)
    assert fleet.service.controller.status().placement is None


@in_virtual_time
async def test_when_all_are_to_be_taken_kv_is_saved_from_the_notice_to_shortly_before_the_deadline() -> None:
    fleet = await busy()
    started = now()
    await take_all(fleet, 10)
    (began, path, _, first), (ended, again, seconds, last) = fleet.cluster.told
    assert (first, last) == (False, True) and path == again == "/checkpoint/1"
    assert began - started < 0.2
    assert 10 - RESERVE_SECONDS - 0.3 < ended - started < 10 - RESERVE_SECONDS + 0.1, (
        "it decodes as long as there is time"
    )
    assert seconds == pytest.approx(10 - (ended - started) - MARGIN_SECONDS, abs=0.05)
    (save,) = fleet.saves.made
    assert save.path == path and fleet.cluster.saves == [save], "whoever comes now can read it"
    assert fleet.saves.newest == [fleet.saves.used] == [path], "and it is not removed meanwhile"
    assert fleet.kinds().index("saving") < fleet.kinds().index("saved") < fleet.kinds().index("stop")
    await bring_back(fleet)


@in_virtual_time
async def test_little_notice_is_halved() -> None:
    fleet = await busy()
    started = now()
    await take_all(fleet, 1)
    assert 0.3 < fleet.cluster.told[-1][0] - started < 0.7
    await bring_back(fleet)


@in_virtual_time
async def test_positions_are_those_recorded_before_the_last_of_the_kv_was_written() -> None:
    fleet = await busy()
    recorded: dict[int, int] = {}

    def note() -> None:
        states = fleet.service.controller._requests.unfinished()
        recorded.update({key: len(state.prompt) + len(state.tokens) - 1 for key, state in states.items()})

    fleet.cluster.on_last = note
    await take_all(fleet, 10)
    assert fleet.saves.made[0].sequences == recorded
    assert any(positions > 3 for positions in recorded.values())
    await bring_back(fleet)


@in_virtual_time
async def test_with_nowhere_to_save_nothing_is_saved_and_nobody_waits() -> None:
    fleet = await busy(checkpoint="")
    fleet.notice("i0", 10)
    fleet.notice("i1", 10)
    await asyncio.sleep(9.3)
    assert fleet.service.controller.status().placement is not None
    await asyncio.sleep(2)
    assert not fleet.cluster.told and "saving" not in fleet.kinds()
    await bring_back(fleet)


@in_virtual_time
async def test_a_fleet_that_has_nothing_to_do_leaves_no_save_behind() -> None:
    fleet = await make_saving_fleet()
    await take_all(fleet, 10)
    assert fleet.told() == [("/checkpoint/1", False), ("/checkpoint/1", True)] and not fleet.saves.made
    assert fleet.saves.given_up == ["/checkpoint/1"]
    await bring_back(fleet)


@in_virtual_time
async def test_a_loss_without_notice_leaves_nothing_to_save() -> None:
    fleet = await busy()
    fleet.die("i0")
    await asyncio.sleep(5)
    assert not fleet.cluster.told
    fleet.register("i0")
    fleet.arrive("i0")
    await fleet.finish()


@in_virtual_time
async def test_a_newcomer_in_time_makes_the_save_unnecessary_and_the_next_one_begins_anew() -> None:
    fleet = await busy()
    fleet.notice("i0", 20)
    await asyncio.sleep(1)
    assert fleet.told() == [("/checkpoint/1", False)], "no mesh fits without it"
    fleet.register("i9")
    fleet.arrive("i9")
    await asyncio.sleep(2)
    assert fleet.service.controller.status().placement is not None
    assert fleet.told() == [("/checkpoint/1", False), ("/checkpoint/1", True)]
    assert fleet.cluster.told[-1][2] == 0 and fleet.saves.given_up == ["/checkpoint/1"] and not fleet.saves.made
    fleet.notice("i1", 10)
    fleet.notice("i9", 10)
    await asyncio.sleep(11)
    assert fleet.told()[2:] == [("/checkpoint/2", False), ("/checkpoint/2", True)]
    assert [save.path for save in fleet.saves.made] == ["/checkpoint/2"]
    await bring_back(fleet)


@in_virtual_time
async def test_a_newcomer_that_is_not_enough_changes_nothing_about_the_save() -> None:
    fleet = await busy()
    for name in ("i0", "i1"):
        fleet.notice(name, 10)
    await asyncio.sleep(1)
    fleet.register("i9")
    fleet.arrive("i9")
    await asyncio.sleep(10)
    assert fleet.told() == [("/checkpoint/1", False), ("/checkpoint/1", True)]
    assert len(fleet.saves.made) == 1 and not fleet.saves.given_up
    fleet.register("i0")
    fleet.arrive("i0")
    await fleet.finish()


@in_virtual_time
async def test_a_checkpoint_that_cannot_be_used_costs_the_kv_and_nothing_else() -> None:
    fleet = await busy()
    fleet.saves.problem = "no such bucket"
    await take_all(fleet, 10)
    assert fleet.events("saved") == ["nothing was saved: no such bucket"] and not fleet.cluster.told
    fleet.saves.problem = ""
    await bring_back(fleet)


@in_virtual_time
async def test_a_save_whose_end_hangs_keeps_nobody_from_another_mesh() -> None:
    fleet = await busy()
    fleet.saves.completing = 1e6
    await take_all(fleet, 10)
    assert fleet.events("saved") == ["nothing was saved: the checkpoint did not answer in time"]
    await bring_back(fleet)


@in_virtual_time
async def test_a_checkpoint_that_does_not_answer_is_not_waited_for() -> None:
    fleet = await busy()
    fleet.saves.seconds = 1e6
    await take_all(fleet, 10)
    assert fleet.events("saved") == ["nothing was saved: the checkpoint did not answer in time"]
    fleet.saves.seconds = 0.0
    await bring_back(fleet)


@in_virtual_time
async def test_what_was_left_out_is_said() -> None:
    fleet = await busy()
    fleet.cluster.takes = 5.0
    await take_all(fleet, 10)
    (said,) = fleet.events("saved")
    assert said.endswith("/checkpoint/1, in part: i0: no time") and len(fleet.saves.made) == 1
    await bring_back(fleet)


# -- what of a save counts later


def recorded(name: str, key: int, tokens: tuple[int, ...], *, ended: bool = False) -> RecordedRequest:
    state = RequestState(name, 0, (1, 2, 3), SamplingParams())
    state = replace(state, tokens=tokens, finish=FinishReason.STOP if ended else None)
    return RecordedRequest(GenerationRequest(name, (1, 2, 3), SamplingParams()), (state,), key)


def log_of(*requests: RecordedRequest) -> RecordingLog:
    log = RecordingLog()
    log._opened = requests
    return log


async def test_a_save_is_completed_with_what_tells_its_tokens_apart(tmp_path: Path) -> None:
    saves = Saves(str(tmp_path), "service")
    placement = Placement(4, MeshShape(1, 1, 1), ((0, 4),), {Position(0, 0, 0): DeviceRef("i0", 0)})
    (state,) = recorded("r", 7, (5, 6)).states
    path = await saves.next_path(str(tmp_path))
    save = await saves.complete(path, placement, {7: state})
    assert (save.sequences, save.digests) == ({7: 4}, {7: tokens_digest(state, 4)})
    assert still_certain(save, log_of(recorded("r", 7, (5, 6)))) == save
    await saves.discard(path)
    assert not Path(path).exists()
    assert await saves.next_path(str(tmp_path)) != path, "late units of the one must not get into the other"


async def test_saves_that_are_being_made_or_read_from_outlive_newer_ones(tmp_path: Path) -> None:
    saves = Saves(str(tmp_path), "service")
    placement = Placement(4, MeshShape(1, 1, 1), ((0, 4),), {Position(0, 0, 0): DeviceRef("i0", 0)})

    async def make() -> str:
        path = await saves.next_path(str(tmp_path))
        await saves.complete(path, placement, {7: recorded("r", 7, (5, 6)).states[0]})
        await saves.remove_older(path)
        return path

    saves.used = await make()
    begun = await saves.next_path(str(tmp_path))
    Path(begun, "worker-a").mkdir(parents=True)
    made = [await make() for _ in range(4)]
    assert [path for path in [saves.used, begun, *made] if Path(path).exists()] == [saves.used, begun, *made[2:]]
    await saves.complete(begun, placement, {})
    saves.used = await make()
    assert [path for path in [begun, *made] if Path(path).exists()] == made[3:], "neither is needed any more"


@pytest.mark.parametrize(
    ("request_", "counts"),
    [
        (recorded("r", 7, (5, 6)), True),
        (recorded("r", 7, (5, 6, 8, 9)), True),  # it went on
        (recorded("r", 7, (5, 9)), True),  # the last token's KV was not saved
        (recorded("r", 7, (5,)), False),  # the log has lost its end
        (recorded("r", 7, (6, 6, 8, 9)), False),  # and has gone on with others
        (recorded("r", 7, (5, 6), ended=True), False),
        (recorded("another", 8, (5, 6)), False),
    ],
)
def test_saved_kv_counts_only_for_the_tokens_that_the_log_has(request_: RecordedRequest, counts: bool) -> None:
    (state,) = recorded("r", 7, (5, 6)).states
    save = Save("/1", "service", 4, 1, {7: 4, 9: 2}, {7: tokens_digest(state, 4)})
    found = still_certain(save, log_of(request_))
    assert (found.sequences if found is not None else {}) == ({7: 4} if counts else {})
