"""Saving a worker's KV: all there is if there is time, else what is complete by then; and never a hang."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from etils import epath
from ledger_cases import Row, arrays, step
from serving_cases import PAGE_SIZE, SHARED_HEADS, build_stage, shared_heads

from spotjax.checkpoint.kv_format import KvFormat
from spotjax.checkpoint.kv_units import UnitBuffer
from spotjax.checkpoint.saved_kv import SavedKv
from spotjax.checkpoint.unit_saver import UnitSaver
from spotjax.protocol import control
from spotjax.reshard.kv import KvMover
from spotjax.runtime.kv import LayerPages
from spotjax.worker.backup_store import BackupStore
from spotjax.worker.copies import Copies
from spotjax.worker.kv_keeping import KvKeeping
from spotjax.worker.ledger import StageLedger
from spotjax.worker.saving import KvSave

C = SHARED_HEADS
FORM = KvFormat("service", "weights", C.layers, C.kv_heads, C.head_size, PAGE_SIZE, "float32")
LAYERS = (0, C.layers)
LONG = 100.0
SOON = 20.0
"""Seconds after which something hangs; a busy machine takes some."""


class Kv:
    """A stage with KV of three sequences.

    Attributes:
      positions: of each.
    """

    def __init__(self) -> None:
        model, weights = shared_heads()
        self.stage = build_stage(model, weights, jax.devices()[:2], stages=1, number=0)
        self.mover = KvMover(model)
        self.ledger = StageLedger(self.stage, PAGE_SIZE)
        self.positions: dict[int, int] = {}
        self._content: dict[tuple[int, int], int] = {}
        self.write(1, 0, 3 * PAGE_SIZE - 2, [5, 3, 20])
        self.write(2, 0, 2 * PAGE_SIZE, [8, 9])
        self.write(3, 0, 1, [30])

    def write(self, key: int, start: int, count: int, pages: list[int]) -> None:
        """A step that fills pages with the number of the page."""
        rows: list[Row] = [(key, start, count, pages)]
        self.ledger.begin([key], *arrays(rows))
        for number, page in enumerate(pages):
            for layer in range(*LAYERS):
                mark = np.float32(1000 * key + 10 * number + layer)
                keys = np.full((1, C.kv_heads, C.head_size, PAGE_SIZE), mark)
                self.mover.write(self.stage, layer, [page], LayerPages(keys, np.swapaxes(-keys, 2, 3)))
        self.ledger.written([key], arrays(rows)[0])
        self.positions[key] = start + count

    def save(self, directory: Path) -> KvSave:
        """A save that has begun."""
        saving = KvSave(self.mover, str(directory), "w", FORM)
        saving.install([self.ledger])
        return saving

    def check(self, directory: Path) -> None:
        """All of it was saved, each page under its owner's name."""
        saved = SavedKv(directory, FORM, self.positions)
        assert saved.positions(LAYERS, list(self.positions)) == tuple(self.positions.values())
        owners = [(key, n) for key, count in self.positions.items() for n in range(-(-count // PAGE_SIZE))]
        found = saved.read(LAYERS, owners).view(np.float32).reshape(C.layers, 2, len(owners), -1)
        for place, (key, number) in enumerate(owners):
            marks = np.arange(*LAYERS) + 1000 * key + 10 * number
            assert (found[:, 0, place] == marks[:, None]).all() and (found[:, 1, place] == -marks[:, None]).all()


class Disk:
    """Stands still until it is released, or is full."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stands, self.released, self.full = threading.Event(), threading.Event(), False
        save = UnitSaver.save

        def slow(saver: UnitSaver, path: epath.Path, unit: UnitBuffer) -> None:
            self.stands.set()
            assert self.released.wait(LONG)
            if self.full:
                raise OSError(28, "No space left on device")
            save(saver, path, unit)

        monkeypatch.setattr(UnitSaver, "save", slow)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    disk = Disk(monkeypatch)
    yield disk
    disk.released.set()


@pytest.fixture(scope="module")
def kv() -> Kv:
    return Kv()


def test_all_there_is_is_saved(kv: Kv, tmp_path: Path) -> None:
    saving = kv.save(tmp_path)
    assert saving.finish(LONG) == ""
    kv.check(tmp_path)
    pages = sum(-(-count // PAGE_SIZE) for count in kv.positions.values())
    assert saving.bytes == pages * C.layers * FORM.row_bytes


def test_what_is_written_while_it_goes_on_is_saved_too(tmp_path: Path) -> None:
    kv = Kv()
    saving = kv.save(tmp_path)
    kv.write(3, 1, PAGE_SIZE, [30, 31])
    kv.write(4, 0, PAGE_SIZE, [9])  # which sequence 2 loses
    del kv.positions[2]
    assert saving.finish(LONG) == ""
    kv.check(tmp_path)


def test_pages_that_change_hands_at_the_end_are_looked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kv = Kv()
    taken, take = 0, KvMover.take

    def steal(mover: KvMover, *what: Any) -> Any:
        nonlocal taken
        taken += 1
        if taken == 2:  # in the middle of the only round
            lock, kv.ledger.lock = kv.ledger.lock, threading.Lock()
            step(kv.ledger, [(1, 0, PAGE_SIZE, [9])], width=4)
            kv.ledger.lock = lock
        return take(mover, *what)

    saving = KvSave(kv.mover, str(tmp_path), "w", FORM)
    monkeypatch.setattr(KvMover, "take", steal)
    saving.install([kv.ledger])
    assert saving.finish(LONG) == ""
    saved = SavedKv(tmp_path, FORM)
    assert saved.positions(LAYERS, [1, 3]) == (PAGE_SIZE, 1)


def test_at_the_deadline_it_ends_even_if_the_disk_hangs_and_what_comes_later_counts(
    kv: Kv, tmp_path: Path, disk: Disk
) -> None:
    saving, begun = kv.save(tmp_path), time.monotonic()
    assert saving.finish(0.2) == "there was no time for the rest"
    assert time.monotonic() - begun < SOON and saving.bytes == 0
    assert SavedKv(tmp_path, FORM).positions(LAYERS, [1]) == (0,)
    disk.released.set()
    saving._writer.close()
    kv.check(tmp_path)


def test_who_has_something_better_to_do_is_not_kept_waiting(kv: Kv, tmp_path: Path, disk: Disk) -> None:
    saving = kv.save(tmp_path)
    saving.hurry()  # it has not been asked to end
    said: list[str] = []
    finishing = threading.Thread(target=lambda: said.append(saving.finish(LONG)))
    finishing.start()
    assert disk.stands.wait(SOON) and not said
    saving.hurry()
    finishing.join(SOON)
    assert said == ["there was no time for the rest"]


def test_what_was_given_up_ends_at_once(kv: Kv, tmp_path: Path, disk: Disk) -> None:
    begun = time.monotonic()
    assert kv.save(tmp_path).finish(0)
    assert time.monotonic() - begun < SOON


def test_a_full_disk_is_said(kv: Kv, tmp_path: Path, disk: Disk) -> None:
    disk.full = True
    disk.released.set()
    assert "No space left" in kv.save(tmp_path).finish(LONG)


# -- what a worker is told


def make_keeping(kv: Kv) -> KvKeeping:
    keeping = KvKeeping("w", kv.mover, FORM, Copies(BackupStore()), links=None)  # type: ignore[arg-type]
    keeping.ledgers[0, 0] = kv.ledger
    return keeping


def tell(keeping: KvKeeping, path: Path, *, last: bool, seconds: float = LONG) -> tuple[int, str]:
    keeping.expect_save(str(path))
    return keeping.save(control.SaveKv(1, str(path), seconds, last))


def test_a_save_begins_goes_on_and_ends(kv: Kv, tmp_path: Path) -> None:
    keeping = make_keeping(kv)
    assert tell(keeping, tmp_path, last=False) == (0, "")
    keeping.hurry()  # a new mesh is prepared meanwhile
    count, left_out = tell(keeping, tmp_path, last=True)
    assert count and not left_out
    kv.check(tmp_path)


def test_who_was_not_there_at_the_beginning_saves_at_the_end(kv: Kv, tmp_path: Path) -> None:
    assert tell(make_keeping(kv), tmp_path, last=True)[1] == ""
    kv.check(tmp_path)


def test_a_save_into_another_directory_puts_an_end_to_the_one_before(kv: Kv, tmp_path: Path, disk: Disk) -> None:
    keeping, said = make_keeping(kv), list[tuple[int, str]]()
    first = threading.Thread(target=lambda: said.append(tell(keeping, tmp_path / "1", last=True)))
    first.start()
    assert disk.stands.wait(SOON)
    keeping.expect_save(str(tmp_path / "2"))
    first.join(SOON)
    assert said == [(0, "there was no time for the rest")]
    assert keeping.save(control.SaveKv(2, str(tmp_path / "1"), LONG, True)) == (0, "something else was more urgent")
    disk.released.set()
    assert tell(keeping, tmp_path / "2", last=True)[1] == ""
    kv.check(tmp_path / "2")


def test_after_its_controller_a_worker_saves_no_more_and_begins_anew_for_the_next(kv: Kv, tmp_path: Path) -> None:
    keeping = make_keeping(kv)
    tell(keeping, tmp_path, last=False)
    keeping.rest()
    assert keeping._save is None
    assert tell(keeping, tmp_path, last=True)[1] == ""
    kv.check(tmp_path)
