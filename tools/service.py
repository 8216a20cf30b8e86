"""A running service to do harm to: its server process, a client, what it says, what happened, what it leaves.

Whoever holds it acts as the cloud does, from outside. The kinds of services are in ``tools.local_fleet``.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from bisect import insort
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc

from spotjax.api.errors import Unavailable
from spotjax.async_client import AsyncSpotjaxClient
from spotjax.errors import FleetError, SpotjaxError
from spotjax.fleet.status import FleetEvent, FleetStatus
from spotjax.meshes.instance import InstanceState
from spotjax.tools.processes import Process, Usage, free_port

START_SECONDS = 240.0
"""A first start compiles."""
CHANGE_SECONDS = 120.0
"""How long a change may take on a busy machine before it counts as one that never ends."""
GRACE_SECONDS = 8.0
"""The notice that instances get: shorter than that of real clouds, for who has nowhere to go waits until it is over."""
POLL_SECONDS = 0.03
CHANGED = ("switch", "stop")
"""Events at the end of a change."""
CONTROLLER = "controller"
SERVE = (sys.executable, "-m", "spotjax.serve", "--log-format", "json")


class NotInTime(Exception):
    """Something that was to happen did not; says what, and what the service looked like."""


@dataclass
class Life:
    """One of several lives of a server process.

    Attributes:
      started: monotonic seconds.
      ended: the same, of its death; 0 while it lives.
      sequences: of the life before that were to go on when it had read its log; None before it said so.
      kept: those of them that had KV.
    """

    started: float
    ended: float = 0.0
    sequences: int | None = None
    kept: int = 0


class Service:
    """A running server process and a client of it.

    Args:
      directory: for logs.
      arguments: of ``spotjax serve``, without ``--listen`` and ``--commit-log``.
      names: of the instances.
      host: address to listen on.
      credentials: of the client, for a server with TLS.
      patience: of the client, in seconds; 0 where nothing is to happen to the server, then no connection may break.
      commit_log: its directory, by default one of ours.
      http: where it serves HTTP.

    Attributes:
      client: of the server.
      commit_log: directory of the commit log.
      http: as given.
      lives: of the server process, the current one last.
      events: everything that the service said happened.
      history: what was done and what happened, for people, by monotonic seconds.
    """

    def __init__(
        self,
        directory: Path,
        arguments: Sequence[str],
        names: Sequence[str],
        host: str = "127.0.0.1",
        credentials: grpc.ChannelCredentials | None = None,
        patience: float = 0.0,
        commit_log: Path | None = None,
        http: str = "off",
    ) -> None:
        self.names, self.directory = tuple(names), directory
        self.commit_log, self.patience = commit_log or directory / "commits", patience
        self.events: list[FleetEvent] = []
        self.history: list[tuple[float, str]] = []
        self.address, self.http = f"{host}:{free_port(host)}", http
        self.command = (
            *SERVE,
            "--listen",
            self.address,
            "--http",
            http,
            "--commit-log",
            str(self.commit_log),
            *arguments,
        )
        self.server = Process(CONTROLLER, self.command, directory)
        self.lives = [Life(time.monotonic())]
        self.client: AsyncSpotjaxClient
        self._credentials = credentials
        self._following: asyncio.Task[None] | None = None
        self._said = asyncio.Event()
        self._started = time.monotonic()

    async def start(self) -> None:
        """Waits until it serves."""
        self.client = AsyncSpotjaxClient(self.address, patience=self.patience, credentials=self._credentials)
        await self._poll("it serves", lambda: " is serving " in self.server.output(), START_SECONDS)
        self._following = asyncio.create_task(self._follow())

    @property
    def deserted(self) -> bool:
        """Whether nobody is there to serve with: a server that is started then says nothing."""
        return False

    async def status(self) -> FleetStatus:
        """What the service says of itself, once there is one to say so.

        Raises:
          Unavailable: there is none, and that lasts longer than our patience, or until somebody joins.
        """
        deadline = time.monotonic() + self.patience
        while True:
            try:
                return await self.client.status()
            except Unavailable:
                if time.monotonic() >= deadline or self.deserted:
                    raise
            await asyncio.sleep(POLL_SECONDS)

    async def until(self, what: str, condition: Callable[[FleetStatus], bool], seconds: float = CHANGE_SECONDS) -> None:
        """Waits until the status fulfils a condition.

        Raises:
          NotInTime: it did not.
        """
        deadline = time.monotonic() + seconds
        while not condition(status := await self.status()):
            if time.monotonic() > deadline:
                raise NotInTime(f"not within {seconds:g} s: {what}; the status is {status}\n{self.story()}")
            await asyncio.sleep(POLL_SECONDS)

    async def until_ready(self, names: Iterable[str] | None = None, seconds: float = CHANGE_SECONDS) -> None:
        """Waits until these instances, by default all, are ready and a mesh serves."""
        wanted = set(self.names if names is None else names)
        await self.until(
            f"{', '.join(sorted(wanted)) or 'a mesh'} ready", lambda s: s.ready and wanted <= ready(s), seconds
        )

    async def until_gone(self, names: Iterable[str], seconds: float = CHANGE_SECONDS) -> None:
        """Waits until these instances are not part of the fleet."""
        gone = set(names)
        await self.until(f"{', '.join(sorted(gone))} gone", lambda s: not gone & alive(s), seconds)

    async def until_said(
        self, kinds: Collection[str], since: int, seconds: float = CHANGE_SECONDS, instance: str = ""
    ) -> int:
        """Waits, no longer than that, for an event of one of these kinds, if given of an instance.

        Args:
          since: number of events before.

        Returns: number of events up to that one, or up to now.
        """
        deadline = time.monotonic() + seconds
        while True:
            for number, event in enumerate(self.events[since:], since + 1):
                if event.kind in kinds and instance in ("", event.fields.get("instance")):
                    return number
            self._said.clear()
            try:
                await asyncio.wait_for(self._said.wait(), deadline - time.monotonic())
            except TimeoutError:
                return len(self.events)

    def note(self, text: str, at: float | None = None) -> None:
        """Adds a line to the history, of now or of a moment before."""
        insort(self.history, (time.monotonic() if at is None else at, text))

    def story(self, lines: int = 120) -> str:
        """The end of the history and of all logs, for people."""
        told = [f"{when - self._started:8.3f}  {text}" for when, text in self.history[-lines:]]
        logs = [f"--- {process.name} ({process.exit_code})\n{process.tail()}" for process in self.processes()]
        return "\n".join([*told, *logs])

    def processes(self) -> list[Process]:
        """All processes of ours that were not replaced by another."""
        return [self.server]

    def usage(self) -> dict[str, Usage]:
        """What each of them holds."""
        return {process.name: process.usage() for process in self.processes() if process.exit_code is None}

    async def kill_server(self) -> None:
        """Kills the server process, whatever it is doing."""
        self.note("    the server is killed")
        self.lives[-1].ended = time.monotonic()
        os.kill(self.server.pid, signal.SIGKILL)  # at once, before what it spawned is looked for
        await asyncio.to_thread(self.server.kill)

    def start_server(self, *prefix: str) -> None:
        """Starts the server that was killed again, at its address and with its log; does not wait for it.

        Args:
          prefix: a command that runs it.
        """
        self.note("    the server is started again")
        self.server = Process(CONTROLLER, (*prefix, *self.command), self.directory)
        self.lives.append(Life(time.monotonic()))

    async def kill(self, names: Sequence[str]) -> None:
        """Takes instances away at once, unannounced."""
        raise NotImplementedError

    async def leave(self, name: str) -> None:
        """Gives an instance notice of ``GRACE_SECONDS``; returns when it is gone."""
        raise NotImplementedError

    async def preempt(self, name: str, grace_seconds: float) -> None:
        """The same by the operators' command, which may find the instance gone already, or the server."""
        with contextlib.suppress(FleetError, Unavailable):
            await self.client.preempt(name, grace_seconds)

    async def bring(self, names: Sequence[str]) -> None:
        """Brings instances that are gone back; returns when they are on their way."""
        raise NotImplementedError

    async def missing(self) -> list[str]:
        """Instances that have to be brought back; others are there or come back by themselves."""
        raise NotImplementedError

    async def stop(self) -> int:
        """Asks the server to end; returns its exit code."""
        self.server.signal(signal.SIGTERM, whole=False)
        code = await asyncio.to_thread(self.server.wait, CHANGE_SECONDS)
        await self._disconnect()
        return code

    async def close(self) -> None:
        """Ends whatever still runs."""
        await self._disconnect()
        for process in self.processes():
            process.kill()

    def left(self) -> list[str]:
        """What is left of the service after its end: processes and files, for people."""
        processes = [f"process {p.pid} of {process.name}" for process in self.processes() for p in process.tree()]
        temporary = [f"file {path}" for path in (self.directory / "temporary").rglob("*") if not path.is_dir()]
        return processes + temporary

    async def _disconnect(self) -> None:
        if self._following is not None:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)
            await self.client.close()
            self._following = None

    async def _poll(self, what: str, get: Callable[[], Any], seconds: float) -> Any:
        deadline = time.monotonic() + seconds
        while not (value := get()):
            if self.server.exit_code is not None or time.monotonic() > deadline:
                raise NotInTime(f"not within {seconds:g} s: {what}\n{self.story()}")
            await asyncio.sleep(POLL_SECONDS)
        return value

    async def _follow(self) -> None:
        while True:
            with contextlib.suppress(SpotjaxError):  # the server ended, or has only begun
                async for event in self.client.watch():
                    self._heard(event)
            if not self.patience:
                return
            await asyncio.sleep(POLL_SECONDS)

    def _heard(self, event: FleetEvent) -> None:
        self.events.append(event)
        self._said.set()
        self.note(f"    epoch {event.epoch} {event.kind}: {event.message}")
        if event.kind == "recovered":
            life = self.lives[-1]
            life.sequences, life.kept = int(event.fields["sequences"]), int(event.fields["kept"])


Kind = TypeVar("Kind", bound=Service)


@contextlib.asynccontextmanager
async def running(service: Kind) -> AsyncIterator[Kind]:
    """Starts a service and ends whatever is left of it at the end."""
    try:
        await service.start()
        yield service
    finally:
        await service.close()


def ready(status: FleetStatus) -> set[str]:
    """Names of instances that can be given work."""
    return {instance.name for instance in status.instances if instance.state is InstanceState.READY}


def alive(status: FleetStatus) -> set[str]:
    """Names of instances that are not gone."""
    return {instance.name for instance in status.instances if instance.state is not InstanceState.GONE}


def serving(status: FleetStatus) -> set[str]:
    """Names of instances that the current mesh stands on."""
    return {device.instance for device in status.placement.devices.values()} if status.placement else set()
