"""Workers as child processes of the controller: ``spotjax serve --workers N``, or for a provider of machines.

Starts, ends and reaps them. What a worker does is in ``spotjax.worker``; whether the fleet goes on without one is the
controller's business. A child is always a fresh program (fork and exec), in a session of its own, so that Ctrl-C on the
terminal reaches the parent only, which drains. It dies with its parent, however that ends (``die_with_parent``, Linux
only).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import itertools
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from spotjax.config import ServeConfig, is_any
from spotjax.errors import ConfigError, Draining, UnknownInstance
from spotjax.settings import OTHER_VARIABLES, PARENT, PREFIX, flag_of

log = logging.getLogger(__name__)

HANDED_ON = (
    "devices_per_instance", "instance_memory_bytes", "attention", "cpu_kernels", "compilation_cache",
    "parameter_store", "read_bandwidth", "grace_seconds", "notices", "notice_seconds", "notice_file", "notice_command",
    "metadata_url", "join_token", "insecure", "tls_certificate", "tls_key", "tls_authority", "log_level", "log_format",
)  # fmt: skip
"""Settings that the children get; the others they have from their controller, or have no use for."""
STOP_SECONDS = 10.0
ABANDONED_SECONDS = 600.0
"""After which parameters that no process has are not kept for one that might come back."""
PR_SET_PDEATHSIG = 1
"""Of prctl(2)."""
CUDA = "CUDA_VISIBLE_DEVICES"

Command = Callable[[ServeConfig, str, str], Sequence[str]]


@dataclass
class Child:
    """A running worker.

    Attributes:
      process: its process, which leads a process group.
      place: which of this machine's devices it has: the first few, the next few and so on.
      reaping: ends when the process has ended and is accounted for.
      told: whether its end was asked for.
    """

    process: asyncio.subprocess.Process
    place: int
    reaping: asyncio.Task[None] = field(init=False)
    told: bool = False

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal; SIGKILL goes to the processes that the worker started, too."""
        self.told = True
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if number is signal.SIGKILL else os.kill)(self.process.pid, number)


class LocalWorkers:
    """The workers of this process, by name. Names and devices of dead ones are used again.

    For the thread of the event loop that lives as long as the process: children die with the thread that starts them.
    """

    def __init__(
        self,
        config: ServeConfig,
        address: str,
        *,
        command: Command | None = None,
        on_exit: Callable[[str, int], None] | None = None,
    ) -> None:
        """No worker yet.

        Args:
          config: of the controller.
          address: HOST:PORT that it listens on.
          command: program and arguments for (config, address to join, name); by default ``worker_command``.
          on_exit: called with name and exit code (negative: the signal) of each worker that has ended.
        """
        self._stores = stores_of(config, address)
        self._config = msgspec.structs.replace(config, parameter_store=str(self._stores or "off"))
        self._address = f"127.0.0.1:{address.rpartition(':')[2]}" if is_any(address) else address
        self._command = command or worker_command
        self._on_exit = on_exit or (lambda name, code: None)
        self._children: dict[str, Child] = {}
        self._used: set[str] = set()
        self._changing = asyncio.Lock()
        self._stopped = False

    @property
    def processes(self) -> Mapping[str, int]:
        """Process ids of the running workers, by name."""
        return {name: child.process.pid for name, child in sorted(self._children.items())}

    async def add(self, count: int) -> tuple[str, ...]:
        """Starts workers and names them ``instance-0``, ``instance-1`` and so on, where there is none of that name.

        Raises:
          Draining, OSError: as ``start``; those before it run.
        """
        async with self._changing:
            taken = {number for number in range(len(self._children) + count) if name_of(number) in self._children}
            names = tuple(map(name_of, free_numbers(taken, count)))
            for name in names:
                await self._start(name, ())
            return names

    async def start(self, name: str, flags: Sequence[str] = ()) -> None:
        """Starts a worker, if there is none of that name; returns when its process exists, long before it has joined.

        Args:
          flags: more of its settings, such as ``--zone=a``.

        Raises:
          Draining: ``stop`` was called.
          OSError: the operating system gives no process.
        """
        async with self._changing:
            if name not in self._children:
                await self._start(name, flags)

    def signal(self, name: str, number: signal.Signals) -> None:
        """Sends a worker a signal: SIGTERM asks it to leave, SIGKILL takes it away, with its own children.

        Raises:
          UnknownInstance: no worker of that name runs here.
        """
        if (child := self._children.get(name)) is None:
            running = ", ".join(self.processes) or "none"
            raise UnknownInstance(f"no worker {name!r} is a process of this server; there are {running}")
        child.signal(number)

    async def stop(self, seconds: float = STOP_SECONDS) -> None:
        """Ends all workers, by force those that have not gone after ``seconds``; leaves nothing of them behind."""
        async with self._changing:
            self._stopped = True
            for child in self._children.values():
                child.signal(signal.SIGTERM)
            reaping = {child.reaping: name for name, child in self._children.items()}
            _, late = await asyncio.wait(reaping, timeout=seconds) if reaping else (set(), set())
            for task in late:
                log.warning("worker does not end, killing it", extra={"instance": reaping[task], "seconds": seconds})
            for child in list(self._children.values()):
                child.signal(signal.SIGKILL)
            await asyncio.gather(*reaping)
            if self._stores is not None:
                forget_parameters(self._stores, self._used)
                self._used.clear()

    async def _start(self, name: str, flags: Sequence[str]) -> None:
        if self._stopped:
            raise Draining("the server is stopping and starts no workers")
        if self._stores is not None and not self._used:
            await asyncio.to_thread(sweep_abandoned, self._stores.parent)
        (place,) = free_numbers({child.place for child in self._children.values()}, 1)
        process = await asyncio.create_subprocess_exec(
            *self._command(self._config, self._address, name),
            *flags,
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,  # this server's standard output is for its own one line
            start_new_session=True,
            env=worker_environment(os.environ, os.getpid(), place, self._config.devices_per_instance),
        )
        child = Child(process, place)
        self._children[name] = child
        self._used.add(name)
        child.reaping = asyncio.create_task(self._reap(name, child))
        log.info("worker started", extra={"instance": name, "pid": process.pid})

    async def _reap(self, name: str, child: Child) -> None:
        code = await child.process.wait()
        with contextlib.suppress(ProcessLookupError):  # what it started goes with it
            os.killpg(child.process.pid, signal.SIGKILL)
        del self._children[name]
        log.log(
            logging.INFO if child.told or code == 0 else logging.WARNING,
            "worker ended",
            extra={"instance": name, "pid": child.process.pid, "ended_by": shown_end(code)},
        )
        self._on_exit(name, code)


def worker_command(config: ServeConfig, address: str, name: str) -> list[str]:
    """The command line of a worker: what differs from the defaults of the settings that children get."""
    defaults = {setting.name: setting.default for setting in msgspec.structs.fields(ServeConfig)}
    changed = {name: value for name in HANDED_ON if (value := getattr(config, name)) != defaults[name]}
    flags = [f"{flag_of(setting)}={value}" for setting, value in changed.items()]
    return [sys.executable, "-m", "spotjax.serve", f"--join={address}", f"--name={name}", *flags]


def worker_environment(environment: Mapping[str, str], parent: int, number: int, devices: int) -> dict[str, str]:
    """The parent's environment without its settings, with the parent's process id and with devices of its own."""
    kept = {n: value for n, value in environment.items() if not n.startswith(PREFIX) or n in OTHER_VARIABLES}
    return kept | {PARENT: str(parent), CUDA: cuda_devices(environment.get(CUDA), number, devices)}


def cuda_devices(visible: str | None, number: int, devices: int) -> str:
    """CUDA devices of the ``number``-th worker: the next few of the visible ones, of all when ``visible`` is None."""
    mine = slice(number * devices, (number + 1) * devices)
    if visible is None:
        return ",".join(map(str, range(mine.start, mine.stop)))
    return ",".join(visible.split(",")[mine])


def stores_of(config: ServeConfig, address: str) -> Path | None:
    """Where the workers of a server at that address keep parameters: where no other server's of the same names do."""
    from spotjax.reshard.store_directory import default_directory

    if config.parameter_store == "off":
        return None
    home = Path(config.parameter_store) if config.parameter_store else default_directory()
    return home / f"spotjax-{os.getuid()}-workers-{address.rpartition(':')[2]}"


def forget_parameters(stores: Path, names: Collection[str]) -> None:
    """Removes what outlives the processes of workers."""
    from spotjax.reshard.store_directory import remove_of

    for name in names:
        remove_of(stores, name)
    with contextlib.suppress(OSError):  # a worker that does not end still has something there
        stores.rmdir()


def sweep_abandoned(home: Path) -> None:
    """Removes what workers left whose server was killed, and nobody came to use again."""
    from spotjax.reshard.store_directory import sweep

    for stores in home.glob(f"spotjax-{os.getuid()}-workers-*"):
        sweep(stores, ABANDONED_SECONDS)
        with contextlib.suppress(OSError):  # not empty, or gone already
            stores.rmdir()


def free_numbers(taken: Collection[int], count: int) -> list[int]:
    """The ``count`` lowest numbers that are not taken."""
    return list(itertools.islice((n for n in itertools.count() if n not in taken), count))


def name_of(number: int) -> str:
    """``instance-3``."""
    return f"instance-{number}"


def shown_end(code: int) -> str:
    """``exit code 1`` or ``SIGKILL``, as ``Popen.returncode`` has it."""
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def die_with_parent(environment: MutableMapping[str, str] = os.environ) -> None:
    """Makes the kernel kill this process when the one that started it as a local worker dies; else does nothing.

    To be called early. The signal is SIGKILL, for a worker that is busy compiling would not get to handle another.

    Raises:
      ConfigError: ``SPOTJAX_PARENT`` is no process id.
    """
    parent = environment.pop(PARENT, None)  # not for the processes that this one starts
    if parent is None or sys.platform != "linux":
        return
    if not parent.isdecimal():
        raise ConfigError(f"{PARENT} is set by a server for its workers, to its process id; got {parent!r}")
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != int(parent):  # it died before we asked
        os.kill(os.getpid(), signal.SIGKILL)
