"""A disk of a few megabytes, to fill: a file system in memory. Needs root and the command ``mount``."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Self

DISK_BYTES = 64 << 20
BLOCK_BYTES = 4096


class DiskUnavailable(Exception):
    """No disk of our own can be made here."""


class SmallDisk:
    """A file system of its own. A context manager: nothing is left of it afterwards.

    Args:
      directory: where it is mounted; made.

    Raises:
      DiskUnavailable: we may not, or cannot.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._filler = directory / "filler"
        if os.geteuid() != 0 or shutil.which("mount") is None:
            raise DiskUnavailable("a disk of our own needs root and the command mount")
        directory.mkdir(parents=True)
        try:
            _run("mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(directory))
        except subprocess.CalledProcessError as error:
            directory.rmdir()
            raise DiskUnavailable(error.stderr.decode().strip()) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _run("umount", "--lazy", str(self.directory))
        self.directory.rmdir()

    def fill(self) -> None:
        """From now on there is no room for anything more."""
        with self._filler.open("ab", buffering=0) as filler:
            try:
                while filler.write(bytes(BLOCK_BYTES)):
                    pass
            except OSError:
                return

    def free(self) -> None:
        """There is room again."""
        self._filler.unlink(missing_ok=True)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
