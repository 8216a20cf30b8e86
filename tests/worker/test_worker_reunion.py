"""A worker without its controller keeps what it has; whether that counts is the next one's to say."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from ledger_cases import step
from step_cases import frame, prefill
from worker_cases import SETUP, Case, two_replicas

from spotjax.errors import PeerUnreachable, SliceUnavailable
from spotjax.protocol import control, reads
from spotjax.protocol.backup import BackedUpPage, BackupHeader
from spotjax.reshard.transfer import PageTransfer
from spotjax.worker.ledger import StageLedger

PIPELINES = ("1.0", "1.1")
LAYERS = (0, 1)


def welcome(service: str = "ours", *, reunion: bool = True) -> control.Welcome:
    return control.Welcome(SETUP, 1, 2.0, service, 0, reunion)


def ledger(case: Case, pipeline: str, stage: int) -> StageLedger:
    found = case.worker.executor._posts[pipeline, stage].role.ledger
    assert found is not None
    return found


async def at_work(case: Case) -> None:
    """It has stages with KV of sequences 1 and 2, and copies of 7 and 8."""
    case.worker.serve(welcome(reunion=False))
    await case.adopt(two_replicas(), PIPELINES)
    step(ledger(case, "1.0", 0), [(1, 0, 12, [5, 3]), (2, 0, 4, [4])])
    step(ledger(case, "1.1", 1), [(3, 0, 9, [1, 2])])
    pages = tuple(BackedUpPage(key, 0, 6) for key in (7, 8))
    case.copies.store.put(BackupHeader(LAYERS, pages, "b", 1, "ours"), np.ones(2 * 2 * 4, np.uint8))
    assert case.copies.store.positions(LAYERS, (7, 8)) == (6, 6)


def offer(case: Case) -> object:
    kept = case.worker.ready().placement
    return kept.placement() if kept is not None else None


async def test_a_worker_that_lost_its_controller_keeps_everything_and_tells_nobody(case: Case) -> None:
    await at_work(case)
    assert offer(case) == two_replicas()
    held = case.worker.ready().held
    await asyncio.to_thread(case.worker.pause)
    assert not case.links.onward
    assert offer(case) == two_replicas() and case.worker.ready().held == held
    assert case.copies.store.positions(LAYERS, (7, 8)) == (6, 6)


async def test_the_next_controller_of_a_service_finds_what_there_was(case: Case) -> None:
    await at_work(case)
    await asyncio.to_thread(case.worker.pause)
    await asyncio.to_thread(case.worker.serve, welcome())
    assert offer(case) == two_replicas()
    assert case.copies.store.positions(LAYERS, (7, 8)) == (6, 6)


@pytest.mark.parametrize("other", [welcome("another's"), welcome(reunion=False)])
async def test_kv_is_given_up_for_another_service_and_where_it_is_of_no_use(case: Case, other: control.Welcome) -> None:
    await at_work(case)
    held = case.worker.ready().held
    await asyncio.to_thread(case.worker.pause)
    await asyncio.to_thread(case.worker.serve, other)
    assert offer(case) is None and case.worker.ready().held == held
    assert case.copies.store.nbytes == 0 and not case.host.stages and not case.worker.executor._posts
    late = BackupHeader(LAYERS, (BackedUpPage(9, 0, 3),), "b", 1, "ours")
    case.copies.store.put(late, np.ones(8, np.uint8))
    assert (case.copies.store.nbytes == 0) is (other.service != "ours"), "frames of another service are dropped"


async def reunite(case: Case, epoch: int, sequences: dict[int, int]) -> dict[tuple[int, int], object]:
    command = control.decode_from_controller(control.encode(control.Reunite(5, epoch, tuple(sequences.items()))))
    done = await case.worker.carry_out(command)  # type: ignore[arg-type]
    assert done.id == 5
    return {(stage.replica, stage.stage): stage.sequences for stage in done.remains}


async def test_of_what_there_is_only_what_is_certain_counts(case: Case) -> None:
    await at_work(case)
    await asyncio.to_thread(case.worker.pause)
    remains = await reunite(case, 1, {1: 9, 3: 20, 7: 4, 99: 5})
    assert remains == {(0, 0): ((1, (5, 3), 9),), (1, 1): ((3, (1, 2), 9),)}
    assert case.copies.store.positions(LAYERS, (7, 8)) == (4, 0)
    assert offer(case) == two_replicas()
    layers = case.host.stages[0, 0].layers
    case.worker.provide(reads.encode(reads.ReadPages(1, 0, layers, (5, 3))))  # others can read it


async def test_stages_of_another_mesh_are_given_up_and_copies_are_not(case: Case) -> None:
    await at_work(case)
    await asyncio.to_thread(case.worker.pause)
    held = case.worker.ready().held
    assert await reunite(case, 2, {1: 9, 7: 4}) == {}
    assert offer(case) is None and not case.host.stages and case.worker.ready().held == held
    assert case.copies.store.positions(LAYERS, (7, 8)) == (4, 0)
    with pytest.raises(SliceUnavailable):
        case.worker.provide(reads.encode(reads.ReadPages(1, 0, (0, 1), (5,))))


async def test_a_worker_without_stages_has_nothing_left_but_copies(case: Case) -> None:
    case.worker.serve(welcome(reunion=False))
    assert await reunite(case, 1, {1: 9}) == {}


async def test_late_frames_of_the_old_pipeline_change_nothing(case: Case) -> None:
    await at_work(case)
    layers = case.host.stages[0, 0].layers
    read = reads.encode(reads.ReadPages(1, 0, layers, (1,)))
    case.worker.executor.receive(*frame("1.0", prefill(1)))
    async with asyncio.timeout(60):
        while not case.links.sent:
            await asyncio.sleep(0.001)
    await asyncio.to_thread(case.worker.pause)
    before = await reunite(case, 1, {1: 12, 2: 4, 3: 4})
    assert before[0, 0] == ((1, (5, 3), 12), (2, (4,), 4), (3, (1,), 4)), "the step of before counts"
    (content,) = case.worker.provide(read)
    kept = bytes(content)
    assert any(kept)
    case.links.sent.clear()
    case.worker.executor.receive(*frame("1.0", prefill(2, (9, 8, 7, 6, 5))))
    await asyncio.to_thread(case.worker.executor.close)
    assert not case.links.sent
    assert await reunite(case, 1, {1: 12, 2: 4, 3: 4}) == before
    (content,) = case.worker.provide(read)
    assert bytes(content) == kept


async def test_the_next_mesh_goes_on_with_pages_where_they_are(case: Case) -> None:
    await at_work(case)
    case.worker.executor.receive(*frame("1.0", prefill(1)))
    async with asyncio.timeout(60):
        while not case.links.sent:
            await asyncio.sleep(0.001)
    await asyncio.to_thread(case.worker.pause)
    await reunite(case, 1, {3: 4})
    stage = case.host.stages[0, 0]
    pages = {layer: [np.asarray(part) for part in stage.pages[layer]] for layer in range(*stage.layers)}
    assert any(part.any() for parts in pages.values() for part in parts)
    await case.worker.carry_out(case.prepare(6, two_replicas(2), two_replicas(), {0: 0, 1: 1}))
    await case.worker.carry_out(control.Switch(7, (PageTransfer(0, 0, ((1, 1),)),)))
    await case.worker.carry_out(control.Adopt(8, ("2.0", "2.1"), "", 0))
    after = case.host.stages[0, 0]
    assert after is not stage and after.devices == stage.devices
    for layer, parts in pages.items():
        for before, now in zip(parts, after.pages[layer], strict=True):
            np.testing.assert_array_equal(np.asarray(now), before)
    assert offer(case) == two_replicas(2)


async def test_pages_that_others_are_brought_into_have_no_owner_of_before(case: Case) -> None:
    await at_work(case)
    await case.worker.carry_out(case.prepare(4, two_replicas(2), two_replicas(), {0: 0, 1: 1}))
    in_place, brought = PageTransfer(0, 0, ((4, 4),)), PageTransfer(1, 0, ((1, 3), (2, 6)))
    with pytest.raises(PeerUnreachable):  # which comes after the page is nobody's
        await case.worker.carry_out(control.Switch(5, (in_place, brought)))
    await asyncio.to_thread(case.worker.pause)
    remains = await reunite(case, 1, {1: 12, 2: 4, 3: 9})
    assert remains == {(0, 0): ((2, (4,), 4),), (1, 1): ((3, (1, 2), 9),)}, "3 may be computed, or half brought"
