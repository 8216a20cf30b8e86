"""Copies in memory and on disk as one: of each sequence what goes further, and never what is not there."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spotjax.checkpoint.kv import KvWriter
from spotjax.checkpoint.kv_format import KvFormat
from spotjax.errors import SliceUnavailable
from spotjax.protocol.backup import BackedUpPage, BackupHeader
from spotjax.worker.backup_store import BackupStore
from spotjax.worker.copies import Copies

PAGE_SIZE = 4
FORM = KvFormat("service", "weights", layers=3, kv_heads=1, head_size=64, page_size=PAGE_SIZE, dtype="float32")
LAYERS = (0, 3)


def pages_of(sequence: int, positions: int) -> list[BackedUpPage]:
    count = -(-positions // PAGE_SIZE)
    return [BackedUpPage(sequence, n, min(positions, (n + 1) * PAGE_SIZE)) for n in range(count)]


def content(pages: list[BackedUpPage], mark: int) -> np.ndarray:
    """Bytes that tell layer, sequence, page and origin apart, as ``KvMover.host_pages`` lays them out."""
    cells = np.empty((3, 2, len(pages), FORM.elements), np.float32)
    for layer in range(3):
        for place, page in enumerate(pages):
            generator = np.random.default_rng((mark, layer, page.sequence, page.number))
            cells[layer, :, place] = generator.normal(size=(2, FORM.elements))
    return cells.reshape(-1).view(np.uint8)


def frame(pages: list[BackedUpPage], mark: int) -> tuple[BackupHeader, np.ndarray]:
    return BackupHeader(LAYERS, tuple(pages), f"source {mark}", 1, FORM.service), content(pages, mark)


MEMORY, DISK = 1, 2


def make_copies(directory: Path, memory: Mapping[int, int], disk: Mapping[int, int]) -> Copies:
    """Copies of so many positions of each sequence."""
    copies = Copies(BackupStore())
    copies.store.service = FORM.service
    for sequence, positions in memory.items():
        copies.store.put(*frame(pages_of(sequence, positions), MEMORY))
    writer = KvWriter(directory, "w", FORM)
    for sequence, positions in disk.items():
        writer.put(*frame(pages_of(sequence, positions), DISK))
    writer.flush()
    writer.close()
    copies.use_save(str(directory), FORM, disk)
    return copies


def owners_of(positions: Mapping[int, int]) -> list[tuple[int, int]]:
    return [(page.sequence, page.number) for key, count in positions.items() for page in pages_of(key, count)]


@settings(max_examples=25, deadline=None)
@given(
    memory=st.dictionaries(st.integers(0, 4), st.integers(1, 11), max_size=4),
    disk=st.dictionaries(st.integers(0, 4), st.integers(1, 11), max_size=4),
    seed=st.integers(0, 2**32),
)
def test_each_sequence_is_read_from_where_there_is_more_of_it(
    tmp_path_factory: pytest.TempPathFactory, memory: dict[int, int], disk: dict[int, int], seed: int
) -> None:
    copies = make_copies(tmp_path_factory.mktemp("save"), memory, disk)
    most = {key: max(memory.get(key, 0), disk.get(key, 0)) for key in range(5)}
    assert copies.positions(LAYERS, range(5)) == tuple(most.values())
    owners = owners_of(most)
    Random(seed).shuffle(owners)
    mark = {key: DISK if disk.get(key, 0) > memory.get(key, 0) else MEMORY for key in range(5)}
    expected = [content([BackedUpPage(key, number, 0)], mark[key]).reshape(6, -1) for key, number in owners]
    if owners:
        found = copies.read(LAYERS, owners).reshape(6, len(owners), -1)
        np.testing.assert_array_equal(found, np.stack(expected, 1))
    assert copies.whole(LAYERS, owners) == [(number + 1) * PAGE_SIZE <= disk.get(key, 0) for key, number in owners]


def test_a_last_page_that_is_there_in_part_is_promised_as_far_as_it_goes(tmp_path: Path) -> None:
    copies = make_copies(tmp_path, {1: 5}, {1: 6})
    assert copies.positions(LAYERS, [1]) == (6,)
    assert copies.whole(LAYERS, [(1, 0), (1, 1)]) == [True, False]
    np.testing.assert_array_equal(copies.read(LAYERS, [(1, 1)]), content(pages_of(1, 8)[1:], DISK))


def test_no_more_counts_than_was_recorded(tmp_path: Path) -> None:
    copies = make_copies(tmp_path, {}, {1: 10, 2: 10})
    copies.use_save(str(tmp_path), FORM, {1: 5})
    assert copies.positions(LAYERS, [1, 2]) == (5, 0)
    copies.use_save(str(tmp_path), FORM, {2: 7})
    assert copies.positions(LAYERS, [1, 2]) == (0, 7), "of the same directory, but other sequences"
    copies.use_save("", FORM, {})
    assert copies.positions(LAYERS, [1, 2]) == (0, 0)


def test_damage_on_disk_is_found_before_anything_is_promised(tmp_path: Path) -> None:
    copies = make_copies(tmp_path, {1: 3, 2: 2}, {1: 9, 3: 9})
    for page in (*pages_of(1, 9), *pages_of(3, 9)):
        row = content([page], DISK)[: FORM.row_bytes].tobytes()
        (file,) = (path for path in tmp_path.rglob("*") if path.is_file() and row in path.read_bytes())
        file.write_bytes(file.read_bytes().replace(row, bytes(len(row))))
    assert copies.positions(LAYERS, [1, 2, 3]) == (3, 2, 0)
    np.testing.assert_array_equal(copies.read(LAYERS, [(1, 0)]), content(pages_of(1, 3), MEMORY))
    with pytest.raises(SliceUnavailable):
        copies.read(LAYERS, [(3, 0)])


def test_kv_of_another_service_or_of_other_weights_is_none(tmp_path: Path) -> None:
    make_copies(tmp_path, {}, {1: 9})
    for form in (
        KvFormat("another", "weights", 3, 1, 64, PAGE_SIZE, "float32"),
        KvFormat("service", "others", 3, 1, 64, PAGE_SIZE, "float32"),
    ):
        copies = Copies(BackupStore())
        copies.use_save(str(tmp_path), form, {1: 9})
        assert copies.positions(LAYERS, [1]) == (0,)


def test_a_save_that_is_not_there_is_none(tmp_path: Path) -> None:
    copies = Copies(BackupStore())
    copies.use_save(str(tmp_path / "nowhere"), FORM, {1: 9})
    assert copies.positions(LAYERS, [1]) == (0,)


def test_reading_saved_kv_needs_no_orbax() -> None:
    program = "import sys, spotjax.worker.copies, spotjax.checkpoint.saved_kv; sys.exit('orbax' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_save_that_could_not_be_opened_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copies = make_copies(tmp_path, {}, {1: 6})
    copies.use_save("", FORM, {})
    with monkeypatch.context() as broken:
        broken.setattr("spotjax.worker.copies.SavedKv", lambda *_: (_ for _ in ()).throw(OSError("no disk")))
        with pytest.raises(OSError, match="no disk"):
            copies.use_save(str(tmp_path), FORM, {1: 6})
    copies.use_save(str(tmp_path), FORM, {1: 6})
    assert copies.positions(LAYERS, [1]) == (6,)
