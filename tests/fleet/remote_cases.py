"""A cluster of scripted workers, and plans for it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np
from fleet_cases import PAGE_SIZE, SPEC, TIGHT, instances, kind

from spotjax.engine.batch import Batch, Span
from spotjax.engine.request import RequestState, SamplingParams
from spotjax.errors import ConnectionLost
from spotjax.fleet.change import Planning, plan_change
from spotjax.fleet.leases import Leases
from spotjax.fleet.remote import RemoteCluster
from spotjax.fleet.sessions import Sessions, WorkerSession
from spotjax.meshes.instance import InstanceState
from spotjax.meshes.placement import Placement
from spotjax.planner.demand import Demand
from spotjax.planner.kv_cohorts import LiveSequence
from spotjax.protocol import control
from spotjax.protocol.steps import ResultHeader, StepHeader, result_payload
from spotjax.reshard.transfer import PageTransfer, Preparation
from spotjax.runtime.buckets import Buckets

BUCKETS = Buckets(max_batch=4, prefill_tokens=16, page_size=PAGE_SIZE, max_positions=64)
DEMAND = Demand(batch=3, prompt=8, output=8, page_size=PAGE_SIZE, kv_pages=19, step_tokens=8)
PLANNING = Planning(SPEC, DEMAND)
PAGES = (PageTransfer(0, 0, ((1, 2),)),)
Command = control.Command
Remains = Mapping[tuple[int, int], Sequence[tuple[int, tuple[int, ...], int]]]
"""By replica and stage: key, pages and positions of every sequence that has some there."""
Answer = control.Done | control.Failed | None
Script = Callable[[Any], Awaitable[Answer]]


async def obey(command: Any) -> Answer:
    return control.Done(command.id, moved=1, loaded=2)


class Connection:
    """A connection for steps."""

    def __init__(self) -> None:
        self.sent: list[tuple[StepHeader, tuple[memoryview, ...]]] = []
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def send(self, header: StepHeader, *payloads: memoryview) -> None:
        if self.closed.done():
            raise ConnectionLost("it is closed")
        self.sent.append((header, payloads))


class Endpoint:
    """Connects to everybody who is not in ``deaf``."""

    def __init__(self) -> None:
        self.connections: dict[str, Connection] = {}
        self.deaf: set[str] = set()
        self.connecting: Callable[[], None] = lambda: None

    async def connect(self, address: str, timeout: float) -> Connection:
        await asyncio.sleep(0)
        self.connecting()
        if address in self.deaf:
            raise ConnectionLost(f"{address} does not answer")
        return self.connections.setdefault(address, Connection())


@dataclass
class Worker:
    """A worker that does as its script says.

    Attributes:
      heard: what it was told.
    """

    session: WorkerSession
    script: Script = obey
    heard: list[Any] = field(default_factory=list)

    def commands(self) -> list[str]:
        return [type(message).__name__ for message in self.heard]

    def last(self, what: type) -> Any:
        return [message for message in self.heard if isinstance(message, what)][-1]


class Fleet:
    """A cluster and its workers; a watcher that does what the controller does."""

    def __init__(self, names: Sequence[str], patience: float = 5.0, *, backup: bool = False) -> None:
        self.sessions = Sessions(Leases(2.0), lambda: 0.0, self)  # type: ignore[arg-type]
        self.endpoint = Endpoint()
        self.cluster = RemoteCluster(
            self.sessions, self.endpoint, BUCKETS, patience, fuse=False, backup=backup, bandwidth=7,  # type: ignore[arg-type]
            layers=SPEC.config.layers,
        )  # fmt: skip
        self.workers: dict[str, Worker] = {}
        self.order: list[tuple[str, str]] = []
        self.ends: dict[str, str] = {}
        self._running: list[asyncio.Task[None]] = []
        for name in names:
            self.add(name)

    def add(
        self,
        name: str,
        incarnation: str = "1",
        held: tuple[control.Parts, ...] = (),
        zone: str = "",
        placement: Placement | None = None,
        copies: bool = False,
    ) -> Worker:
        """A worker that is ready; with a placement, it has stages of it from the time of an earlier controller."""
        session = WorkerSession(
            control.Register(control.VERSION, name, incarnation, kind(), "cpu", False, zone, f"{name}:1")
        )
        kept = control.PlacementMessage.of(placement) if placement is not None else None
        session.offer = control.Ready(held, 0, kept, copies)
        self.sessions._current[name] = session
        worker = self.workers[name] = Worker(session)
        self._running.append(asyncio.create_task(self._work(name, worker)))
        return worker

    async def _work(self, name: str, worker: Worker) -> None:
        while (message := await worker.session.outgoing.get()) is not None:
            worker.heard.append(message)
            if isinstance(message, Command):
                self.order.append((type(message).__name__, name))
                answer = await worker.script(message)
                if answer is not None:
                    worker.session.answered(answer)

    def ended(self, session: WorkerSession, why: str) -> None:
        self.ends[session.instance] = why
        self.cluster.lose(session.instance)

    def may_come_back(self, name: str) -> bool:
        return self.sessions._probation.remaining(name, "1", 0.0) == 0

    async def form(self, preparation: Preparation) -> None:
        await self.cluster.prepare(preparation)
        await self.cluster.switch(())

    async def close(self) -> None:
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        assert not [task for task in left if "remote" in str(task.get_coro()) or "ask" in str(task.get_coro())]


def failing(what: type, unreachable: str = "", then: Callable[[], None] = lambda: None) -> Script:
    """A script that fails one kind of command."""

    async def script(command: Any) -> Answer:
        if not isinstance(command, what):
            return await obey(command)
        then()
        return control.Failed(command.id, unreachable, "it does not work")

    return script


def dying(fleet: Fleet, name: str, what: type) -> Script:
    """A script of a worker that dies of one kind of command."""

    async def script(command: Any) -> Answer:
        if not isinstance(command, what):
            return await obey(command)
        fleet.sessions.end(name, "its connection closed")
        return None

    return script


def keeping(
    epoch: int = 0, remains: Remains = MappingProxyType({}), backups: Mapping[int, int] = MappingProxyType({})
) -> Script:
    """A script of a worker that has stages of an epoch, and copies of others' KV."""

    async def script(command: Any) -> Answer:
        if isinstance(command, control.Coverage):
            return control.Done(command.id, positions=tuple(backups.get(key, 0) for key in command.sequences))
        if isinstance(command, control.Reunite) and command.epoch == epoch:
            told = tuple(control.StageRemains(*place, tuple(kept)) for place, kept in remains.items())
            return control.Done(command.id, remains=told)
        return await obey(command)

    return script


def first_plan(count: int = 4) -> Preparation:
    """Two devices to a replica: 2x2x1 on four instances."""
    return plan_change(PLANNING, None, instances(count, memory=TIGHT), {}, 1)


def next_plan(
    fleet: Fleet, current: Placement, count: int, gone: Sequence[str] = (), running: Sequence[int] = (), epoch: int = 2
) -> Preparation:
    machines = [
        replace(machine, state=InstanceState.GONE if machine.name in gone else InstanceState.READY)
        for machine in instances(count, memory=TIGHT)
    ]
    live = {data: [LiveSequence(data, 1, 3)] for data in range(current.shape.data)}
    return plan_change(PLANNING, current, machines, live, epoch, running, fleet.cluster.held())


def names(preparation: Preparation) -> list[str]:
    return sorted({device.instance for device in preparation.placement.devices.values()})


def decode_step(step: int, sequence: int = 5) -> Batch:
    state = RequestState("r", 0, (1, 2), SamplingParams(temperature=0))
    return Batch(step, (Span(sequence, (2,), 1, (1,), state, True),))


def result(pipeline: str, step: int, token: int) -> tuple[ResultHeader, memoryview]:
    array = np.zeros((4, 4), np.int32)
    array[0, 0] = token
    return ResultHeader(pipeline, step, 4, 4, False), memoryview(b"".join(result_payload(array)))
