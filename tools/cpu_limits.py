"""How much processor an instance has: processes in control groups of their own, as if each were a small machine.

Without that, all instances of one machine share its cores, and losing one costs no computing power. Takes root on
Linux; version 1 and 2 of control groups.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

CONTROLLERS = Path("/sys/fs/cgroup")
PERIOD_MICROSECONDS = 20_000
"""Short, so that a limit slows steps down evenly and does not stop them now and then."""


class CpuLimits:
    """Groups of processes that may use so many cores each; ``cpu_limits`` makes them."""

    def __init__(self, root: Path, cores: float) -> None:
        self._root, self._quota = root, int(cores * PERIOD_MICROSECONDS)
        self._version1 = (root / "cpu.cfs_quota_us").exists()

    def admit(self, name: str, pid: int) -> None:
        """Puts a process, and all that it will start, into the group of that name."""
        group = self._root / name
        group.mkdir(exist_ok=True)
        if self._version1:
            (group / "cpu.cfs_period_us").write_text(str(PERIOD_MICROSECONDS))
            (group / "cpu.cfs_quota_us").write_text(str(self._quota))
        else:
            (group / "cpu.max").write_text(f"{self._quota} {PERIOD_MICROSECONDS}")
        (group / "cgroup.procs").write_text(str(pid))


@contextlib.contextmanager
def cpu_limits(cores: float) -> Iterator[CpuLimits | None]:
    """Limits for as many groups as are named; None where this machine does not let us make any, or for 0 cores."""
    root = _made(CONTROLLERS / "cpu") or _made(CONTROLLERS) if cores else None
    if root is None:
        yield None
        return
    try:
        yield CpuLimits(root, cores)
    finally:
        for group in [*root.iterdir(), root]:
            if group.is_dir():
                with contextlib.suppress(OSError):  # a process that still ends
                    group.rmdir()


def _made(parent: Path) -> Path | None:
    """A group of ours whose processor time can be limited."""
    if not parent.is_dir():
        return None
    try:
        root = Path(tempfile.mkdtemp(prefix="spotjax-", dir=parent))
    except OSError:
        return None
    with contextlib.suppress(OSError):
        (root / "cgroup.subtree_control").write_text("+cpu")
    limited = (root / "cpu.cfs_quota_us").exists() or (root / "cpu.max").exists()
    if not limited:
        os.rmdir(root)
    return root if limited else None
