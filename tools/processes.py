"""A process and everything that it spawns: started, signalled and ended as a whole, and what they hold is counted.

Knows nothing of what they are for; fleets of them are in ``tools.local_fleet``.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import psutil

PORTS = range(20_000, 32_000)
"""Below those that connections are given by chance: a server that is started again finds its own still free."""


@dataclass(frozen=True)
class Usage:
    """What a process and everything it spawned hold.

    Attributes:
      processes: how many there are.
      files: open file descriptors that are no sockets.
      sockets: open sockets.
      threads: threads.
      memory: resident bytes.
    """

    processes: int
    files: int
    sockets: int
    threads: int
    memory: int


class Process:
    """A process in a session of its own, whose standard error is a log of JSON lines.

    Args:
      name: for people; its files are named after it.
      command: what it runs.
      directory: where its logs and its temporary files go.
      environment: variables on top of ours, of which those of jax and Spotjax are left out.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        directory: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.temporary = directory / "temporary"
        self.temporary.mkdir(parents=True, exist_ok=True)
        number = len(list(directory.glob(f"{name}.*.log")))
        self._output, self._log = directory / f"{name}.{number}.out", directory / f"{name}.{number}.log"
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("JAX_", "SPOTJAX_"))}
        with self._output.open("wb") as output, self._log.open("wb") as errors:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, start_new_session=True,
                env={**inherited, "JAX_PLATFORMS": "cpu", "TMPDIR": str(self.temporary), **(environment or {})},
            )  # fmt: skip
        self.ever = {self._process.pid: psutil.Process(self._process.pid)}
        """The process and all that were ever seen below it, by id."""

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """How it ended, negative for a signal; None while it runs."""
        return self._process.poll()

    def tree(self) -> list[psutil.Process]:
        """The process and everything below it that lives, itself first."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in self.ever[self.pid].children(recursive=True):
                self.ever.setdefault(child.pid, child)
        return [process for process in self.ever.values() if _lives(process)]

    def signal(self, number: signal.Signals, whole: bool = True) -> None:
        """Sends a signal to the whole tree, as something that happens to the machine; or to the process alone.

        Signals that ask for something, such as SIGTERM, are for the process alone.
        """
        tree = self.tree() if whole else [process for process in self.tree() if process.pid == self.pid]
        for process in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def kill(self) -> None:
        """Ends the whole tree at once and waits until the kernel has."""
        self.signal(signal.SIGKILL)
        self._process.wait()

    def wait(self, seconds: float) -> int:
        """Waits for the end; returns the exit code.

        Raises:
          subprocess.TimeoutExpired: it still runs.
        """
        return self._process.wait(seconds)

    def usage(self) -> Usage:
        """What the tree holds now."""
        files = sockets = threads = memory = count = 0
        for process in self.tree():
            with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError):
                kinds = list(_descriptors(process.pid))
                sockets += sum(kind.startswith("socket:") for kind in kinds)
                files += sum(not kind.startswith("socket:") for kind in kinds)
                threads += process.num_threads()
                memory += process.memory_info().rss
                count += 1
        return Usage(count, files, sockets, threads, memory)

    def maps(self, text: str) -> bool:
        """Whether the process has a file mapped whose path contains ``text``."""
        return text in Path(f"/proc/{self.pid}/maps").read_text()

    def output(self) -> str:
        """Standard output so far."""
        return self._output.read_text()

    def records(self) -> Iterator[dict[str, Any]]:
        """Its log so far, one dict for each line with at least ``message``; lines of others come without ``time``."""
        for line in self._log.read_text(errors="replace").splitlines():
            try:
                record = msgspec.json.decode(line)
            except msgspec.DecodeError:
                record = None
            yield record if isinstance(record, dict) and "message" in record else {"message": line}

    def tail(self, lines: int = 30) -> str:
        """The end of its log, for people."""
        shown = []
        for record in list(self.records())[-lines:]:
            text = f"{record.get('time', '')} {record.get('level', '')} {record.get('logger', '')} {record['message']}"
            shown.append(text.strip() + (f"\n{record['error']}" if "error" in record else ""))
        return "\n".join(shown)


def free_port(host: str) -> int:
    """A port that nobody listens on."""
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port := random.choice(PORTS)))
            return port


def _descriptors(pid: int) -> Iterator[str]:
    """What the open descriptors of a process are: paths, ``socket:[...]``, ``pipe:[...]`` ..."""
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            yield os.readlink(entry)


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
