"""Services on this machine: a controller with workers as processes, with children, or everything in one process."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import grpc
import psutil

from spotjax.errors import FleetError
from spotjax.tools.namespaces import Network
from spotjax.tools.processes import Process
from spotjax.tools.service import CHANGE_SECONDS, GRACE_SECONDS, SERVE, NotInTime, Service, alive
from spotjax.tools.small_disk import SmallDisk

LATE_SECONDS = 5.0
"""How much longer than its notice an instance may take to go on a busy machine."""
SHARED_MEMORY = Path("/dev/shm")


class LocalFleet(Service):
    """A controller and a process for every instance, each of which can be killed, frozen and cut off.

    Args:
      names: of the instances.
      arguments: for the controller.
      worker_arguments: for every worker.
      network: if given, every worker is a host of it.
      environment: variables for the workers.
      credentials: of the client, for a controller with TLS.
      patience: of the client, in seconds, for a controller that dies; workers do not notice whether it is another.
      disk: if given, the commit log is on it.
      http: where the controller serves HTTP.

    Attributes:
      WORKER: the command of a worker, less its settings.
    """

    WORKER: Sequence[str] = SERVE

    def __init__(
        self,
        directory: Path,
        names: Sequence[str],
        arguments: Sequence[str] = (),
        worker_arguments: Sequence[str] = (),
        network: Network | None = None,
        environment: dict[str, str] | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        patience: float = 0.0,
        disk: SmallDisk | None = None,
        http: str = "off",
    ) -> None:
        host = network.address if network else "127.0.0.1"
        trust = ("--insecure",) if network and credentials is None else ()  # nobody else is on that network
        listening = ("--data-listen", f"{host}:0", *trust, *arguments)
        commit_log = disk.directory / "commits" if disk else None
        super().__init__(directory, listening, names, host, credentials, patience, commit_log, http)
        self.workers: dict[str, Process] = {}
        self.arguments_of: dict[str, tuple[str, ...]] = {}
        """Arguments of single workers, by name."""
        self.network, self.disk = network, disk
        self.store = Path(
            tempfile.mkdtemp(prefix="spotjax-local-", dir=SHARED_MEMORY if SHARED_MEMORY.is_dir() else None)
        )
        """Where the workers keep parameters."""
        self._worker_arguments, self._environment = (*trust, *worker_arguments), environment

    async def start(self) -> None:
        """Starts all workers and waits until the first mesh serves."""
        for name in self.names:
            self.spawn(name)
        await super().start()

    def spawn(self, name: str, *arguments: str) -> Process:
        """Starts the process of an instance, whatever became of the one before."""
        prefix, host = self.network.host(name) if self.network else ((), "127.0.0.1")
        place = ("--join", self.address, "--name", name, "--data-listen", f"{host}:0")
        grace = ("--grace-seconds", f"{GRACE_SECONDS:g}", "--notices", "none")
        flags = (*place, *grace, "--parameter-store", str(self.store), *self._worker_arguments)
        flags = (*flags, *self.arguments_of.get(name, ()), *arguments)
        worker = Process(name, (*prefix, *self.WORKER, *flags), self.directory, self._environment)
        self.workers[name] = worker
        return worker

    def processes(self) -> list[Process]:
        """Controller and workers."""
        return [self.server, *self.workers.values()]

    def left(self) -> list[str]:
        """The same, and stored parameters: workers that left took theirs with them."""
        return super().left() + [f"file {path}" for path in self.store.rglob("*")]

    async def close(self) -> None:
        """The same, stored parameters included."""
        await super().close()
        shutil.rmtree(self.store, ignore_errors=True)

    @property
    def deserted(self) -> bool:
        """Whether no worker lives."""
        return all(worker.exit_code is not None for worker in self.workers.values())

    async def kill(self, names: Sequence[str]) -> None:
        """Kills the processes of all these instances, then waits for the kernel."""
        for name in names:
            self.workers[name].signal(signal.SIGKILL)
        for name in names:
            await asyncio.to_thread(self.workers[name].kill)

    async def leave(self, name: str) -> None:
        """Announces the end to the worker's process, which is to end by itself, and in time.

        Raises:
          NotInTime: it was not gone then.
        """
        worker = self.workers[name]
        worker.signal(signal.SIGTERM, whole=False)
        try:
            await asyncio.to_thread(worker.wait, GRACE_SECONDS + LATE_SECONDS)
        except subprocess.TimeoutExpired:
            raise NotInTime(f"{name} was still there {GRACE_SECONDS + LATE_SECONDS:g} s after SIGTERM") from None

    async def preempt(self, name: str, grace_seconds: float) -> None:
        """The same by the operators' command; then the machine is taken away."""
        await super().preempt(name, grace_seconds)
        await self.kill([name])

    async def missing(self) -> list[str]:
        """Those whose process ended."""
        return [name for name, worker in self.workers.items() if worker.exit_code is not None]

    async def bring(self, names: Sequence[str]) -> None:
        """Starts new processes; what is left of the old ones ends first."""
        for name in names:
            await asyncio.to_thread(self.workers[name].kill)
            self.spawn(name)

    async def stop(self) -> int:
        """Ends the controller, then the workers, which then wait for another one; returns the controller's code."""
        code = await super().stop()
        for worker in self.workers.values():
            worker.signal(signal.SIGTERM, whole=False)
        for name, worker in self.workers.items():
            try:
                await asyncio.to_thread(worker.wait, CHANGE_SECONDS)
            except subprocess.TimeoutExpired:
                raise NotInTime(f"{name} did not end after its controller\n{worker.tail()}") from None
        return code


class ChildrenFleet(Service):
    """A controller that started the workers itself, ``--workers N``, and starts new ones when asked to."""

    async def kill(self, names: Sequence[str]) -> None:
        """Kills the processes."""
        for name in names:
            worker = self.worker(name)
            for process in [*worker.children(recursive=True), worker]:
                process.kill()

    async def leave(self, name: str) -> None:
        """Announces the end to the worker."""
        worker = self.worker(name)
        worker.terminate()
        await asyncio.to_thread(worker.wait, GRACE_SECONDS + LATE_SECONDS)

    async def bring(self, names: Sequence[str]) -> None:
        """Lets as many join as are named."""
        await self.client.add(len(names))

    async def missing(self) -> list[str]:
        """Those without a process."""
        named = [process.cmdline() for process in self.server.tree()]
        return [name for name in self.names if not any(f"--name={name}" in command for command in named)]

    def worker(self, name: str) -> psutil.Process:
        """The process of a worker.

        Raises:
          StopIteration: there is none.
        """
        return next(process for process in self.server.tree() if f"--name={name}" in process.cmdline())


class EmbeddedService(Service):
    """Everything in one process, whose instances are taken and brought back by the operators' commands."""

    async def kill(self, names: Sequence[str]) -> None:
        """Takes instances at once."""
        await asyncio.gather(*(self.preempt(name, 0.0) for name in names))

    async def leave(self, name: str) -> None:
        """Gives notice."""
        await self.preempt(name, GRACE_SECONDS)

    async def bring(self, names: Sequence[str]) -> None:
        """Lets all join that are gone: which ones, cannot be asked for."""
        with contextlib.suppress(FleetError):  # a preemption that counts may be under way
            await self.client.add(len(await self.missing()) or len(names))

    async def missing(self) -> list[str]:
        """Those that the service counts as gone."""
        return sorted(set(self.names) - alive(await self.status()))
