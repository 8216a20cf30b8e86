"""Backing KV up while steps go on: nothing is ever copied under a name that it does not belong to."""

from __future__ import annotations

from concurrent.futures import Future
from random import Random

import jax
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from ledger_cases import Row, arrays
from serving_cases import PAGE_SIZE, SHARED_HEADS, build_stage, shared_heads

from spotjax.protocol.backup import BackupHeader
from spotjax.reshard.kv import KvMover
from spotjax.runtime.kv import LayerPages
from spotjax.runtime.stage import Stage
from spotjax.worker.backup import Backup
from spotjax.worker.backup_store import BackupStore
from spotjax.worker.ledger import StageLedger


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

    ledger = StageLedger(stage, PAGE_SIZE)
    copying = Backup(mover, "", push, bandwidth=0)
    try:
        copying.install([ledger])
        owner: dict[int, int] = {}
        for _ in range(12):
            key, page = random.randrange(3), random.randrange(1, 5)
            rows: list[Row] = [(key, 0, PAGE_SIZE, [page])]
            ledger.begin([key], *arrays(rows))
            write(stage, mover, page, mark=100.0 * key)
            ledger.written([key], arrays(rows)[0])
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


def test_a_prefix_that_another_has_computed_is_backed_up_for_each_who_reads_it() -> None:
    store, (stage, mover) = BackupStore(), _stage()
    done: Future[None] = Future()
    done.set_result(None)

    def push(header: BackupHeader, payload: np.ndarray) -> Future[None]:
        store.put(header, payload)
        return done

    ledger = StageLedger(stage, PAGE_SIZE)
    copying = Backup(mover, "", push, bandwidth=0)
    copying.close()  # only rounds of our own
    copying.install([ledger])
    for page in (1, 2, 3, 4):
        write(stage, mover, page, mark=100.0 * page)

    def step(key: int, start: int, stop: int, pages: list[int]) -> None:
        rows: list[Row] = [(key, start, stop - start, pages)]
        ledger.begin([key], *arrays(rows))
        ledger.written([key], arrays(rows)[0])

    step(1, 0, 2 * PAGE_SIZE + 1, [1, 2, 3])
    assert copying.copy_now()
    step(2, 2 * PAGE_SIZE, 2 * PAGE_SIZE + 2, [1, 2, 4])  # it found what the first has computed
    step(1, 2 * PAGE_SIZE + 1, 2 * PAGE_SIZE + 2, [1, 2, 3])
    assert copying.copy_now()
    layers = (0, SHARED_HEADS.layers)
    assert store.positions(layers, [1, 2]) == (2 * PAGE_SIZE + 2, 2 * PAGE_SIZE + 2)
    for key, pages in ((1, [1, 2, 3]), (2, [1, 2, 4])):
        kept = store.read(layers, [(key, number) for number in range(3)]).view(np.float32)
        for layer, content in enumerate(kept.reshape(SHARED_HEADS.layers, 2, 3, -1)):
            for number, page in enumerate(pages):
                assert set(content[:, number].ravel().tolist()) == {100.0 * page + layer}


_built: list[tuple[Stage, KvMover]] = []


def _stage() -> tuple[Stage, KvMover]:
    if not _built:
        _built.append(filled_stage())
        stage, _ = _built[0]
        for layer in range(SHARED_HEADS.layers):
            stage.pages[layer] = stage.empty_pages()
    return _built[0]
