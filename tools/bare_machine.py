"""A directory that looks like a machine that has just booted to what runs in it: Linux, as root.

A root of its own with the programs of this machine, nothing installed for Spotjax, no users but root, its own process
ids, and this machine's network. There is no init system: ``systemctl`` starts the process of a unit, as its user and
with its environment, and again when it fails, and knows nothing else of it; ``shutdown`` only takes notes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import TracebackType
from typing import Self

UNIT = "spotjax-worker.service"
SYSTEMCTL = """\
#!/bin/bash
# Enough of systemctl for one unit.
echo "systemctl $*" >>/run/said
unit=/etc/systemd/system/spotjax-worker.service
[[ $1 == start || $1 == restart ]] || exit 0
if [[ -f /run/unit.pid ]] && kill -0 "$(cat /run/unit.pid)" 2>/dev/null; then
  [[ $1 == restart ]] || exit 0
  kill "$(cat /run/unit.pid)"; kill "$(cat /run/worker.pid)"
fi
value() { sed -n "s/^$1=//p" "$unit"; }
user=$(value User) command=$(value ExecStart) environment=$(value Environment)
install -d -o "$user" /var/lib/spotjax /var/cache/spotjax
export user command environment
setsid bash -c '
  echo $$ >/run/unit.pid
  while :; do
    env -i PATH="$PATH" $environment setpriv --reuid="$user" --regid="$user" --init-groups --no-new-privs $command &
    echo $! >/run/worker.pid
    if wait $!; then echo "the worker has ended in order" >>/run/said; exit; fi
    sleep 1
  done' </dev/null >>/var/log/worker 2>&1 &
"""
SHUTDOWN = """\
#!/bin/bash
echo "shutdown $*" >>/run/said
"""
BOOT = """\
set -eu
root=$1 base=$2 packages=$3 stubs=$4 shared=$6
mount --make-rprivate /
mount --rbind /usr "$root/usr"
mount --bind "$stubs" "$root/usr/local/bin"
mount --bind "$base" "$root$base"
mount --bind "$packages" "$root/packages"
mount --bind "$root/farm" "$root$base/$5"
mount --bind "$shared" "$root/shared"
mount --rbind /dev "$root/dev"
mount -t tmpfs tmpfs "$root/dev/shm"
mount -t proc proc "$root/proc"
exec env -i PATH=/usr/local/bin:/usr/sbin:/usr/bin LANG=C.UTF-8 chroot "$root" /bin/bash -c '
  while IFS= read -r command; do
    bash -c "$command" </dev/null >&2 && echo 0 || echo "$?"
  done'
"""


class MachineUnavailable(Exception):
    """No such directory can be made here."""


class BareMachine:
    """The machine. A context manager: all of its processes end with it.

    Args:
      directory: for its files.
      shared: a directory of this machine that is ``/shared`` there, for everybody to write.

    Attributes:
      root: its root directory.
      python: a Python on it, which has our packages, but not Spotjax.
    """

    def __init__(self, directory: Path, shared: Path) -> None:
        """Makes its files.

        Raises:
          MachineUnavailable: we may not, or the programs are not there.
        """
        if sys.platform != "linux" or os.geteuid() != 0:
            raise MachineUnavailable("a root of its own needs Linux and root")
        if missing := [name for name in ("unshare", "chroot", "setpriv", "useradd", "curl") if not shutil.which(name)]:
            raise MachineUnavailable(f"there is no {', '.join(missing)}")
        self.root, self._stubs = directory / "root", directory / "stubs"
        base = Path(sys.base_prefix)
        self.python = base / f"bin/python3.{sys.version_info.minor}"
        self._lay_out(base)
        within = Path(sysconfig.get_path("purelib", vars={"base": str(base)})).relative_to(base)
        given = (self.root, base, sysconfig.get_path("purelib"), self._stubs, within, shared)
        self._boot = ("bash", "-c", BOOT, "boot", *given)

    def _lay_out(self, base: Path) -> None:
        root = self.root
        mounted = ("usr", "proc", "dev", "packages", "farm", "shared")
        for name in (*mounted, "etc/systemd/system", "run", "tmp", "var/log", "opt", "root"):
            (root / name).mkdir(parents=True)
        (root / base.relative_to("/")).mkdir(parents=True, exist_ok=True)
        for name in ("bin", "sbin", "lib", "lib64"):
            if (there := Path("/") / name).is_symlink():
                (root / name).symlink_to(os.readlink(there))
        (root / "tmp").chmod(0o1777)
        for each in Path("/etc").glob("ld.so.*"):
            if each.is_file():
                shutil.copy(each, root / "etc")
        (root / "etc/passwd").write_text("root:x:0:0::/root:/bin/bash\n")
        (root / "etc/group").write_text("root:x:0:\n")
        (root / "etc/hosts").write_text("127.0.0.1 localhost\n")
        for package in Path(sysconfig.get_path("purelib")).iterdir():
            if not package.name.lower().startswith(("spotjax", "__editable__")):
                (root / "farm" / package.name).symlink_to(f"/packages/{package.name}")
        self._stubs.mkdir()
        for name, text in (("systemctl", SYSTEMCTL), ("shutdown", SHUTDOWN)):
            (self._stubs / name).write_text(text)
            (self._stubs / name).chmod(0o755)

    def __enter__(self) -> Self:
        """Boots it.

        Raises:
          MachineUnavailable: the kernel does not let us.
        """
        with (self.root / "var/log/boot").open("wb") as log:
            self._process = subprocess.Popen(
                ("unshare", "--mount", "--pid", "--fork", "--kill-child", *self._boot),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip
        try:
            self.run("true")
        except MachineUnavailable:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._process:  # closes the pipes, at which its first process ends, and all others with it
            pass

    def run(self, command: str) -> int:
        """Runs a command of one line on it; returns its exit code. What it says goes to the log."""
        assert "\n" not in command
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(command + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # said below
        if not (code := self._process.stdout.readline()):
            raise MachineUnavailable(f"it does not run: {self.log('boot')}")
        return int(code)

    def log(self, name: str) -> str:
        """``boot``, what commands have said; ``worker``, the same of the unit's process."""
        file = self.root / "var/log" / name
        return file.read_text(errors="replace") if file.exists() else ""

    @property
    def said(self) -> list[str]:
        """What was asked of the init system, in order."""
        file = self.root / "run/said"
        return file.read_text().splitlines() if file.exists() else []
