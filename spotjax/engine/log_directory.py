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
    """Held by the one process that writes a log. Ends with the process, however it ends.

    Args:
      directory: made, private to its user, if there is none.

    Attributes:
      identity: of the service whose log is in the directory, empty if there was none so far.

    Raises:
      CommitLogError: another process has it, or the directory cannot be used.
    """

    def __init__(self, directory: Path) -> None:
        try:
            _make(directory)
            self._file = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise CommitLogError(f"the commit log's directory {directory} cannot be used: {error}") from error
        holder, _, self.identity = os.pread(self._file, 200, 0).decode("ascii", "replace").rstrip().partition("\n")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.mark(self.identity)
        except OSError as error:
            os.close(self._file)
            problem = f"cannot be locked: {error}"
            if isinstance(error, BlockingIOError):
                problem = (
                    f"is in use by process {holder or 'unknown'}; stop it, or use another directory (--commit-log)"
                )
            raise CommitLogError(f"the commit log {directory} {problem}") from error

    def mark(self, identity: str) -> None:
        """Writes down who holds the lock and whose log this is."""
        self.identity = identity
        line = f"{os.getpid()}\n{identity}\n".encode()
        os.pwrite(self._file, line, 0)
        os.ftruncate(self._file, len(line))

    def release(self) -> None:
        """Lets another process write."""
        os.close(self._file)


def user_of(directory: Path) -> str:
    """The process that writes the log in a directory now, empty if none does. Changes nothing there."""
    try:
        file = os.open(directory / _LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.pread(file, 200, 0).decode("ascii", "replace").partition("\n")[0] or "unknown"
    finally:
        os.close(file)
    return ""


def _make(directory: Path) -> None:
    """A directory that is there even if power is lost."""
    if not directory.is_dir():
        directory.parent.mkdir(parents=True, exist_ok=True)
        directory.mkdir(mode=0o700, exist_ok=True)
        sync_directory(directory.parent)


def sync_directory(directory: Path) -> None:
    """Names that were made or replaced in a directory survive the loss of power from now on."""
    opened = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
