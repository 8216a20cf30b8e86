"""The directory of a commit log: where it is, what is in it, and that one process at a time writes there."""

from __future__ import annotations

import fcntl
import os
import re
from pathlib import Path

from spotjax.errors import CommitLogError

DATABASE = "commits.sqlite"
_LOCK = "lock"


def default_directory(address: str) -> Path:
    """Where a service that listens on an address keeps its log unless told otherwise: in the user's state directory."""
    state = os.environ.get("XDG_STATE_HOME", "")
    base = Path(state) if os.path.isabs(state) else Path.home() / ".local" / "state"
    return base / "spotjax" / (re.sub(r"[^A-Za-z0-9.-]+", "_", address).lstrip(".") or "_")


class WriterLock:
    """Held by the one process that writes a log. Ends with the process, however it ends."""

    def __init__(self, directory: Path) -> None:
        """Makes the directory, private to its user, if there is none, and takes the lock.

        Raises:
          CommitLogError: another process has it, or the directory cannot be used.
        """
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._file = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise CommitLogError(f"the commit log's directory {directory} cannot be used: {error}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, f"{os.getpid()}\n".encode(), 0)
        except OSError as error:
            holder = os.pread(self._file, 32, 0).decode("ascii", "replace").strip()
            os.close(self._file)
            if not isinstance(error, BlockingIOError):
                raise CommitLogError(f"the commit log {directory} cannot be locked: {error}") from error
            raise CommitLogError(
                f"the commit log {directory} is in use by process {holder or 'unknown'}; "
                "stop it, or use another directory"
            ) from None

    def release(self) -> None:
        """Lets another process write."""
        os.close(self._file)
