"""The directories of parameter stores: where they are, who has one, and how they go away. Not what is in their files.

A store's lock is ``flock`` on its directory. It ends with the process that has it, however that ends, unless a child
forked without exec lives on.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
import time
from contextlib import suppress
from pathlib import Path

import xxhash

SHARED_MEMORY = Path("/dev/shm")
SMALLEST_SHARED_MEMORY = 1 << 30
"""Bytes below which shared memory is a container's default rather than meant to be used."""

SHARD, UNFINISHED = ".shard", ".unfinished"
"""What the names of a store's files end in."""


def default_directory() -> Path:
    """Where stores are unless told otherwise: shared memory where there is some, else the user's cache directory.

    The same at every start on one machine, however full it is.
    """
    if SHARED_MEMORY.is_dir() and os.access(SHARED_MEMORY, os.W_OK | os.X_OK):
        system = os.statvfs(SHARED_MEMORY)
        if system.f_blocks * system.f_frsize >= SMALLEST_SHARED_MEMORY:
            return SHARED_MEMORY
    home = os.environ.get("SPOTJAX_CACHE") or Path(
        os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "spotjax"
    )
    return Path(home, "parameters")


def remove_of(directory: Path, instance: str) -> bool:
    """Removes the store of an instance whose process ended. Returns False where a live process has it."""
    return remove_abandoned(store_path(directory, instance))


def sweep(directory: Path, seconds: float) -> None:
    """Removes this user's stores that no live process has and in which nothing changed for that long."""
    for path in directory.glob(f"{store_prefix()}*"):
        with suppress(FileNotFoundError):
            status = path.lstat()
            ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
            if ours and time.time() - status.st_mtime >= seconds:
                remove_abandoned(path)


def remove_abandoned(path: Path) -> bool:
    """Removes a store unless a live process has it; whether it is gone."""
    try:
        lock = locked(path)
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False
    try:
        remove_store(path)
    finally:
        os.close(lock)
    return True


def remove_store(path: Path) -> None:
    """Removes our files and then the directory; the caller has the lock.

    Raises:
      OSError: somebody put other files into it.
    """
    for file in store_files(path):
        file.unlink(missing_ok=True)
    with suppress(FileNotFoundError):
        path.rmdir()


def store_files(path: Path) -> list[Path]:
    """All files that a store makes."""
    return [*path.glob(f"*{SHARD}"), *path.glob(f"*{UNFINISHED}")]


def store_path(directory: Path, instance: str) -> Path:
    """The directory of an instance's store: readable, with a digest that tells apart names that look alike in it."""
    readable = re.sub(r"[^A-Za-z0-9_.-]", "_", instance)[:64]
    return directory / f"{store_prefix()}{readable}-{xxhash.xxh3_128_hexdigest(instance.encode())}"


def store_prefix() -> str:
    """How the names of all stores of this user begin."""
    return f"spotjax-{os.geteuid()}-"


def acquire(path: Path, patience: float) -> int:
    """Makes and locks a store's directory. Raises BlockingIOError when another process has it beyond ``patience``."""
    deadline = time.monotonic() + patience
    while True:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            return locked(path)
        except FileNotFoundError:
            pass  # whoever had it removed it just now
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
        time.sleep(0.01)


def locked(path: Path) -> int:
    """A descriptor of the directory ``path`` with the exclusive lock on it.

    Raises:
      BlockingIOError: another process has the lock.
      FileNotFoundError: there is no such directory.
      PermissionError: it belongs to another user.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if os.fstat(descriptor).st_uid != os.geteuid():
            raise PermissionError(errno.EPERM, "belongs to another user", str(path))
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(descriptor), path.lstat()):
            raise FileNotFoundError(errno.ENOENT, "was replaced while it was locked", str(path))
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
