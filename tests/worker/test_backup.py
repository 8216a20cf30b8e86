"""Backing KV up while steps go on: nothing is ever copied under a name that it does not belong to."""

from __future__ import annotations

from concurrent.futures import Future
from random import Random

import jax
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from serving_cases import PAGE_SIZE, SHARED_HEADS, build_stage, shared_heads

from spotjax.protocol.backup import BackupHeader
from spotjax.reshard.kv import KvMover
from spotjax.runtime.kv import LayerPages
from spotjax.runtime.stage import Stage
from spotjax.worker.backup import Backup, StageBackup
from spotjax.worker.backup_store import BackupStore

Row = tuple[int, int, int, list[int]]
"""Key, first position, positions and pages of one row of a step."""


def step(backup: StageBackup, rows: list[Row], width: int = 32) -> None:
    """What a stage tells of a step, without running one."""
    keys, (told, pages) = [key for key, *_ in rows], arrays(rows, width)
    backup.begin(keys, told, pages)
    backup.written(keys, told)


def arrays(rows: list[Row], width: int = 32) -> tuple[np.ndarray, np.ndarray]:
    told, pages = np.zeros((len(rows), 3), np.int32), np.zeros((len(rows), width), np.int32)
    for number, (_, start, length, owned) in enumerate(rows):
        told[number, :2] = start, length
        pages[number, : len(owned)] = owned
    return told, pages


def stage_backup(page_size: int = 4) -> StageBackup:
    return StageBackup(stage=None, page_size=page_size)  # type: ignore[arg-type]  # its bookkeeping needs none


def test_full_pages_and_the_latest_positions_are_due() -> None:
    backup = stage_backup()
    step(backup, [(1, 0, 10, [5, 3, 8])])
    assert backup.due(10) == [(1, 0, 5, 4), (1, 1, 3, 8), (1, 2, 8, 10)]
    backup.copied(backup.due(10))
    assert backup.due(10) == []
    step(backup, [(1, 10, 1, [5, 3, 8])])
    assert backup.due(10) == [(1, 2, 8, 11)], "only the page that has grown"


def test_what_is_copied_in_parts_comes_in_order() -> None:
    backup = stage_backup()
    step(backup, [(1, 0, 10, [5, 3, 8])])
    backup.copied(backup.due(2))
    assert backup.due(10) == [(1, 2, 8, 10)]


def test_pages_that_change_hands_take_the_old_owner_with_them() -> None:
    backup = stage_backup()
    step(backup, [(1, 0, 8, [5, 3])])
    due = backup.due(10)
    backup.begin([2], *arrays([(2, 0, 4, [3])]))  # before the step that writes page 3 is dispatched
    with backup.lock:
        assert not backup.still_owned(due), "page 3 is another's from now on"
    assert backup.due(10) == []


def test_a_sequence_that_got_other_pages_begins_anew() -> None:
    backup = stage_backup()
    step(backup, [(1, 0, 8, [5, 3])])
    backup.copied(backup.due(10))
    step(backup, [(1, 0, 8, [7, 9])])
    assert backup.due(10) == [(1, 0, 7, 4), (1, 1, 9, 8)]


def test_what_was_sent_to_somebody_who_is_gone_is_due_again() -> None:
    backup = stage_backup()
    step(backup, [(1, 0, 8, [5, 3])])
    backup.copied(backup.due(10))
    backup.restart()
    assert len(backup.due(10)) == 2
    backup.forget([1])
    assert backup.due(10) == []


def filled_stage() -> tuple[Stage, KvMover]:
    model, weights = shared_heads()
    stage = build_stage(model, weights, jax.devices()[:2], stages=1, number=0)
    return stage, KvMover(model)


def write(stage: Stage, mover: KvMover, page: int, mark: float) -> None:
    """Fills a page of every layer."""
    c = SHARED_HEADS
    for layer in range(c.layers):
        content = LayerPages(
            np.full((1, c.kv_heads, c.head_size, PAGE_SIZE), mark + layer, np.float32),
            np.full((1, c.kv_heads, PAGE_SIZE, c.head_size), mark + layer, np.float32),
        )
        mover.write(stage, layer, [page], content)


@given(seed=st.integers(0, 2**32))
def test_no_backup_ever_holds_the_kv_of_another_sequence(seed: int) -> None:
    """Sequences lose pages to each other at random while copying goes on in its own thread."""
    random, store = Random(seed), BackupStore()
    stage, mover = _stage()
    sent: list[BackupHeader] = []

    def push(header: BackupHeader, payload: np.ndarray) -> Future[None]:
        store.put(header, payload)
        sent.append(header)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    backup = StageBackup(stage, PAGE_SIZE)
    copying = Backup(mover, PAGE_SIZE, push, bandwidth=0)
    try:
        copying.install([backup], 1, "")
        owner: dict[int, int] = {}
        for _ in range(12):
            key, page = random.randrange(3), random.randrange(1, 5)
            rows: list[Row] = [(key, 0, PAGE_SIZE, [page])]
            backup.begin([key], *arrays(rows))
            write(stage, mover, page, mark=100.0 * key)
            backup.written([key], arrays(rows)[0])
            owner = {k: p for k, p in owner.items() if p != page} | {key: page}
            if random.random() < 0.5:
                copying.copy_now()
    finally:
        copying.close()
    copying.copy_now()
    for key in owner:
        layers = (0, SHARED_HEADS.layers)
        if store.positions(layers, [key]) == (PAGE_SIZE,):
            kept = store.read(layers, [(key, 0)]).view(np.float32).reshape(SHARED_HEADS.layers, -1)
            for layer in range(SHARED_HEADS.layers):
                assert set(kept[layer].tolist()) == {100.0 * key + layer}
    assert {key for key in owner if store.positions((0, SHARED_HEADS.layers), [key]) == (PAGE_SIZE,)} == set(owner)


_built: list[tuple[Stage, KvMover]] = []


def _stage() -> tuple[Stage, KvMover]:
    if not _built:
        _built.append(filled_stage())
        stage, _ = _built[0]
        for layer in range(SHARED_HEADS.layers):
            stage.pages[layer] = stage.empty_pages()
    return _built[0]
