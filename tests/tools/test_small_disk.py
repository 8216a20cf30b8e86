"""A disk of our own is full when it is filled, and only then."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from spotjax.tools.small_disk import DISK_BYTES, DiskUnavailable, SmallDisk


def test_nothing_more_fits_until_it_is_freed_and_nothing_is_left_of_it(tmp_path: Path) -> None:
    directory = tmp_path / "disk"
    try:
        disk = SmallDisk(directory)
    except DiskUnavailable as problem:
        pytest.skip(str(problem))
    with disk:
        (directory / "before").write_bytes(bytes(DISK_BYTES // 2))
        disk.fill()
        with pytest.raises(OSError) as full:
            (directory / "more").write_bytes(bytes(1 << 16))
        assert full.value.errno == errno.ENOSPC
        disk.free()
        (directory / "more").write_bytes(bytes(1 << 16))
    assert not directory.exists()
