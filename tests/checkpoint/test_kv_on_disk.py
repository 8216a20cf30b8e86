"""KV on disk: what is read is what was saved, as much as was finished, and never anything else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from random import Random

import msgspec
import numpy as np
import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_cases import FORM, PAGE_SIZE, content, frame, pages_of, save

from spotjax.checkpoint.kv import KvWriter
from spotjax.checkpoint.kv_units import UnitBuffer
from spotjax.checkpoint.saved_kv import SavedKv
from spotjax.checkpoint.unit_saver import UnitSaver
from spotjax.errors import CheckpointError, ConfigError, SliceUnavailable
from spotjax.protocol.backup import BackedUpPage
from spotjax.worker.backup_store import BackupStore

LAYERS = (0, FORM.layers)


def everything(kv: SavedKv | BackupStore, sequence: int, layers: tuple[int, int] = LAYERS) -> np.ndarray:
    """All pages that a watermark promises of one sequence."""
    positions = kv.positions(layers, [sequence])[0]
    return kv.read(layers, [(sequence, number) for number in range(-(-positions // PAGE_SIZE))])


@settings(max_examples=15)
@given(seed=st.integers(0, 2**32))
def test_what_is_read_is_what_a_backup_store_would_have(seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Sequences grow, lose all and begin anew, and change to other sources, in frames of some pages and layers."""
    random, store, directory = Random(seed), BackupStore(), tmp_path_factory.mktemp("kv")
    store.service = FORM.service
    writer = KvWriter(directory, "w", FORM, unit_bytes=random.choice([1, 10, 100]) * FORM.row_bytes)
    progress, epoch = dict.fromkeys(range(4), 0), 1
    cut = random.randrange(1, FORM.layers)
    for mark in range(random.randrange(1, 12)):
        sequence = random.randrange(4)
        before, event = progress[sequence], random.random()
        if event < 0.15:
            before = 0
        elif event < 0.25:
            epoch, progress, before = epoch + 1, dict.fromkeys(progress, 0), 0
        progress[sequence] = before + random.randrange(1, 10)
        due = pages_of(sequence, progress[sequence])[before // PAGE_SIZE :]
        for layers in ((0, cut), (cut, FORM.layers)):
            for pages in filter(None, (due[:2], due[2:])):
                header, bytes_ = frame(layers, pages, mark, f"source of {epoch}", epoch)
                store.put(header, bytes_)
                writer.put(header, bytes_)
    writer.flush()
    writer.close()
    saved = SavedKv(directory, FORM)
    for layers in ((0, FORM.layers), (0, cut), (2, 5)):
        assert saved.positions(layers, range(5)) == store.positions(layers, range(5))
        for sequence in (key for key in range(4) if saved.positions(layers, [key])[0]):
            np.testing.assert_array_equal(everything(saved, sequence, layers), everything(store, sequence, layers))


def test_pages_are_read_in_any_order_and_over_any_layers(tmp_path: Path) -> None:
    frames = [frame(layers, pages_of(key, 11)) for key in (1, 2) for layers in ((0, 4), (4, 6))]
    save(tmp_path, *frames, unit_bytes=5 * FORM.row_bytes)
    wanted = [BackedUpPage(2, 1, 8), BackedUpPage(1, 2, 11), BackedUpPage(2, 0, 4)]
    read = SavedKv(tmp_path, FORM).read((3, 5), [(page.sequence, page.number) for page in wanted])
    np.testing.assert_array_equal(read, content((3, 5), wanted))


def test_a_page_that_comes_again_replaces_what_it_was(tmp_path: Path) -> None:
    grown = [BackedUpPage(1, 1, 7)]
    save(tmp_path, frame(LAYERS, pages_of(1, 5)), frame(LAYERS, grown, mark=9), unit_bytes=1)
    saved = SavedKv(tmp_path, FORM)
    assert saved.positions(LAYERS, [1]) == (7,)
    np.testing.assert_array_equal(saved.read(LAYERS, [(1, 1)]), content(LAYERS, grown, mark=9))


def test_what_the_commit_log_does_not_know_is_not_trusted(tmp_path: Path) -> None:
    save(tmp_path, *(frame(LAYERS, pages_of(key, 11)) for key in (1, 2)))
    saved = SavedKv(tmp_path, FORM, limit={1: 6, 3: 9})
    assert saved.positions(LAYERS, [1, 2, 3]) == (6, 0, 0)
    for owner in ((1, 2), (2, 0), (3, 0)):
        with pytest.raises(SliceUnavailable):
            saved.read(LAYERS, [owner])


def test_workers_save_into_one_directory_without_knowing_of_each_other(tmp_path: Path) -> None:
    save(tmp_path, frame((0, 3), pages_of(1, 9)), name="a")
    save(tmp_path, frame((3, 6), pages_of(1, 7), source="b"), frame(LAYERS, pages_of(2, 5), source="b"), name="b")
    saved = SavedKv(tmp_path, FORM)
    assert saved.positions(LAYERS, [1, 2]) == (7, 5)
    assert saved.positions((0, 3), [1]) == (9,)
    np.testing.assert_array_equal(saved.read(LAYERS, [(1, 0)]), content(LAYERS, pages_of(1, 4)))


@pytest.mark.parametrize("names", [("a", "b"), ("b", "a")])
def test_late_frames_of_a_worker_that_was_lost_are_not_mixed_with_its_successors(
    tmp_path: Path, names: tuple[str, str]
) -> None:
    """Whichever of the two is read first."""
    lost, successor = names
    late = frame(LAYERS, [BackedUpPage(1, 1, 8), BackedUpPage(1, 2, 11)], source=lost)
    save(tmp_path, frame(LAYERS, pages_of(1, 6), source=lost), late, name=lost)
    save(tmp_path, frame(LAYERS, pages_of(1, 6), mark=5, source=successor, epoch=2), name=successor)
    saved = SavedKv(tmp_path, FORM)
    assert saved.positions(LAYERS, [1]) == (6,)
    np.testing.assert_array_equal(everything(saved, 1), content(LAYERS, pages_of(1, 6), mark=5))


def test_a_worker_that_begins_anew_takes_nothing_away_until_it_is_as_far(tmp_path: Path) -> None:
    anew = [frame(LAYERS, [page], mark=5, source="anew") for page in pages_of(1, 11)]
    save(tmp_path, frame(LAYERS, pages_of(1, 10)), *anew[:2])
    saved = SavedKv(tmp_path, FORM)
    assert saved.positions(LAYERS, [1]) == (10,)
    np.testing.assert_array_equal(everything(saved, 1), content(LAYERS, pages_of(1, 10)))
    save(tmp_path, anew[2])
    np.testing.assert_array_equal(everything(SavedKv(tmp_path, FORM), 1), content(LAYERS, pages_of(1, 11), mark=5))


def test_frames_of_another_controller_are_dropped(tmp_path: Path) -> None:
    save(tmp_path, frame(LAYERS, pages_of(1, 4), service="old", epoch=99))
    assert SavedKv(tmp_path, FORM).positions(LAYERS, [1]) == (0,)


@pytest.mark.parametrize(
    "other", [{"service": "another"}, {"model": "other weights"}, {"page_size": 2}, {"dtype": "float16"}]
)
def test_kv_of_another_service_model_or_layout_is_refused(
    tmp_path: Path, other: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, frame(LAYERS, pages_of(1, 4)))
    saved = SavedKv(tmp_path, msgspec.structs.replace(FORM, **other))
    assert saved.positions(LAYERS, [1]) == (0,)
    assert "1 units of saved KV" in caplog.text


def test_a_directory_without_any_kv_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert SavedKv(tmp_path / "none", FORM).positions(LAYERS, [1]) == (0,)
    assert "no saved KV" in caplog.text


# -- damage


def units(directory: Path) -> list[Path]:
    return sorted(path for path in directory.glob("*/*") if path.name.isdigit())


def files(unit: Path) -> list[Path]:
    """All that have something in them."""
    return sorted(path for path in unit.rglob("*") if path.is_file() and path.stat().st_size)


def content_file(unit: Path, page: BackedUpPage) -> tuple[Path, int]:
    """Where a page of the first layer is."""
    keys = content((0, 1), [page]).tobytes()
    file = next(file for file in files(unit) if keys in file.read_bytes())
    return file, file.read_bytes().index(keys)


def flip(file: Path, place: int) -> None:
    damaged = bytearray(file.read_bytes())
    damaged[place] ^= 0x10
    file.write_bytes(damaged)


def three_units(directory: Path) -> None:
    """Three pages, each in a unit of its own."""
    save(directory, *(frame(LAYERS, [page]) for page in pages_of(1, 10)), unit_bytes=1)
    assert len(units(directory)) == 3


def test_a_damaged_page_is_never_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    three_units(tmp_path)
    flip(*content_file(units(tmp_path)[1], pages_of(1, 8)[1]))
    saved = SavedKv(tmp_path, FORM)
    with pytest.raises(SliceUnavailable):
        saved.read(LAYERS, [(1, 0), (1, 1)])
    assert f"{units(tmp_path)[1]} is damaged" in caplog.text
    assert saved.positions(LAYERS, [1]) == (4,)
    np.testing.assert_array_equal(everything(saved, 1), content(LAYERS, pages_of(1, 4)))


def test_damage_can_be_looked_for_before_anything_is_promised(tmp_path: Path) -> None:
    three_units(tmp_path)
    os.truncate(content_file(units(tmp_path)[2], pages_of(1, 10)[2])[0], 0)
    saved = SavedKv(tmp_path, FORM)
    saved.check(LAYERS, [1, 2])
    assert saved.positions(LAYERS, [1]) == (8,)
    everything(saved, 1)


@settings(max_examples=20)
@given(data=st.data())
def test_whatever_is_damaged_what_is_read_is_right(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("damaged")
    three_units(directory)
    there = files(units(directory)[1])
    file = there[data.draw(st.integers(0, 2**16)) % len(there)]
    place = data.draw(st.integers(0, 2**16)) % file.stat().st_size
    flip(file, place) if data.draw(st.booleans()) else os.truncate(file, place)
    saved = SavedKv(directory, FORM)
    saved.check(LAYERS, [1])
    positions = saved.positions(LAYERS, [1])[0]
    assert positions in (4, 10), "either it is noticed, or it does not matter"
    np.testing.assert_array_equal(everything(saved, 1), content(LAYERS, pages_of(1, positions)))


def test_a_lost_unit_leaves_no_hole_behind_the_watermark(tmp_path: Path) -> None:
    """The last page was saved while it was not full; the unit in which it was full is gone, the next is not."""
    grown = [BackedUpPage(1, 1, 8), BackedUpPage(1, 2, 9)]
    frames = [frame(LAYERS, pages_of(1, 6)), frame(LAYERS, grown), frame(LAYERS, [BackedUpPage(1, 2, 11)])]
    save(tmp_path, *frames, unit_bytes=1)
    content_file(units(tmp_path)[1], grown[0])[0].unlink()
    saved = SavedKv(tmp_path, FORM)
    saved.check(LAYERS, [1])
    assert saved.positions(LAYERS, [1]) == (6,)


# -- time


class SlowDisk:
    """Saves as many units as it is let, then stands still."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, units: int) -> None:
        self._left, self.stands, self.released = units, threading.Event(), threading.Event()
        save = UnitSaver.save

        def slow(saver: UnitSaver, path: epath.Path, unit: UnitBuffer) -> None:
            if not self._left:
                self.stands.set()
                assert self.released.wait(60)
            else:
                self._left -= 1
            save(saver, path, unit)

        monkeypatch.setattr(UnitSaver, "save", slow)


def test_what_is_finished_when_time_is_up_is_complete_and_usable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = SlowDisk(monkeypatch, units=2)
    writer = KvWriter(tmp_path, "w", FORM, unit_bytes=1)
    for page in pages_of(1, 18):
        writer.put(*frame(LAYERS, [page]))
    assert disk.stands.wait(60)
    begun = time.monotonic()
    threading.Timer(0.05, writer.stop).start()
    with pytest.raises(CheckpointError, match="is closed"):
        writer.flush()
    assert time.monotonic() - begun < 5
    saved = SavedKv(tmp_path, FORM)
    assert saved.positions(LAYERS, [1]) == (8,)
    np.testing.assert_array_equal(everything(saved, 1), content(LAYERS, pages_of(1, 8)))
    disk.released.set()
    writer.close()
    assert SavedKv(tmp_path, FORM).positions(LAYERS, [1]) == (12,), "the unit that was being saved is, too"


def test_callers_are_held_up_when_the_disk_does_not_keep_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = SlowDisk(monkeypatch, units=0)
    writer = KvWriter(tmp_path, "w", FORM, unit_bytes=1)
    rooms = [writer.put(*frame(LAYERS, [page])) for page in pages_of(1, 16)]
    assert [room.done() for room in rooms] == [True, True, False, False], "one is being gathered, one saved"
    disk.released.set()
    for room in rooms:
        room.result(60)
    writer.close()


def test_a_closed_writer_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = SlowDisk(monkeypatch, units=0)
    writer = KvWriter(tmp_path, "w", FORM, unit_bytes=1)
    rooms = [writer.put(*frame(LAYERS, [page])) for page in pages_of(1, 16)]
    assert disk.stands.wait(60)
    closing = threading.Thread(target=writer.close)
    closing.start()
    disk.released.set()
    closing.join()
    assert rooms[-1].cancelled()
    with pytest.raises(CheckpointError):
        writer.put(*frame(LAYERS, pages_of(2, 4)))


def test_a_disk_that_is_full_is_said_and_nothing_more_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(saver: UnitSaver, path: epath.Path, unit: UnitBuffer) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(UnitSaver, "save", full)
    writer = KvWriter(tmp_path, "w", FORM)
    writer.put(*frame(LAYERS, pages_of(1, 4))).result(60)
    with pytest.raises(CheckpointError, match="No space left"):
        writer.flush()
    with pytest.raises(CheckpointError, match="No space left"):
        writer.put(*frame(LAYERS, pages_of(1, 8)))
    assert "No space left" in caplog.text
    writer.close()


def test_a_later_writer_of_the_same_name_goes_on_behind_what_is_there(tmp_path: Path) -> None:
    save(tmp_path, frame(LAYERS, pages_of(1, 4)))
    (tmp_path / "w" / "000002.orbax-checkpoint-tmp").mkdir()
    save(tmp_path, frame(LAYERS, pages_of(1, 8)[1:]))
    assert [unit.name for unit in units(tmp_path)] == ["000001", "000003"]
    assert SavedKv(tmp_path, FORM).positions(LAYERS, [1]) == (8,)


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        KvWriter(tmp_path, "../elsewhere", FORM)
    writer = KvWriter(tmp_path, "w", FORM)
    with pytest.raises(ValueError):
        writer.put(*frame((4, 7), pages_of(1, 4)))
    with pytest.raises(ValueError):
        writer.put(frame(LAYERS, pages_of(1, 4))[0], np.zeros(7 * 2, np.uint8))
    writer.close()


# -- death

SAVE_UNTIL_KILLED = """
import sys
from itertools import count
from kv_cases import FORM, PAGE_SIZE, frame
from spotjax.checkpoint.kv import KvWriter
from spotjax.protocol.backup import BackedUpPage
writer = KvWriter(sys.argv[1], "w", FORM, unit_bytes=1)
for number in count():
    page = BackedUpPage(1, number, (number + 1) * PAGE_SIZE)
    writer.put(*frame((0, FORM.layers), [page])).result()
    if number > 2:  # so many at least are on disk
        print(number, flush=True)
"""


@pytest.mark.parametrize("after", [0, 1, 2])
def test_after_a_kill_exactly_what_was_complete_is_used(tmp_path: Path, after: int) -> None:
    """The child is killed somewhere while it saves; each of its units has one page."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    child = subprocess.Popen(
        [sys.executable, "-c", SAVE_UNTIL_KILLED, str(tmp_path)], stdout=subprocess.PIPE, env=environment, text=True
    )
    assert child.stdout is not None
    for _ in range(after + 1):
        told = int(child.stdout.readline())
    threading.Event().wait(Random(after).uniform(0, 0.03))  # anywhere within a unit
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    complete = len(units(tmp_path))
    assert complete >= told - 1
    saved = SavedKv(tmp_path, FORM)
    saved.check(LAYERS, [1])
    assert saved.positions(LAYERS, [1]) == (complete * PAGE_SIZE,)
    np.testing.assert_array_equal(everything(saved, 1), content(LAYERS, pages_of(1, complete * PAGE_SIZE)))
