"""A host of a TPU slice that is not host 0: does on its own devices what host 0 says, in the order it says it in."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from spotjax.errors import PeerUnreachable
from spotjax.fleet.notices.standing import Word
from spotjax.fleet.notices.telling import message_of
from spotjax.protocol import control
from spotjax.protocol.steps import StepHeader
from spotjax.transport.connection import Connection
from spotjax.worker.heartbeat import Heartbeat
from spotjax.worker.heartbeat_process import BEATS_PER_LEASE
from spotjax.worker.slice_executor import Gate
from spotjax.worker.slice_leader import LEASE_SECONDS
from spotjax.worker.slice_messages import (
    Answer,
    Greeting,
    HostLostStep,
    HostNoticed,
    Order,
    SliceEnds,
    Superseded,
)
from spotjax.worker.slice_process import SliceProcess
from spotjax.worker.slice_worker import SliceWorker

log = logging.getLogger("spotjax.worker")

CONNECT_SECONDS = 10.0


class FollowerProcess(SliceProcess):
    """This process as a host that follows."""

    KIND = SliceWorker

    async def open(self) -> None:
        """Connects with the leader."""
        self._ended, self._at_work, self._told = asyncio.Event(), asyncio.create_task(_nothing()), False
        await super().open()
        leader = self._hosts.addresses[0]
        interval = LEASE_SECONDS / BEATS_PER_LEASE
        self._heartbeat = Heartbeat(leader, self._name, str(self._hosts.number), interval, *self._trust)
        await asyncio.to_thread(self._heartbeat.start)
        self._leader = await self._endpoint.connect(leader, CONNECT_SECONDS)
        self._leader.closed.add_done_callback(lambda _: self._leader_gone())
        self._leader.send(Greeting(self._hosts.number))

    async def work(self) -> int:
        """Follows until the leader says that it is over."""
        self._listen()
        await self._ended.wait()
        return self.code

    async def _disconnect(self) -> None:
        """The process's end does: host 0 ends when connections do, and jax aborts a process that outlives host 0."""

    def _receive(self, connection: Connection, header: Any, payload: memoryview) -> None:
        match header:
            case Order():
                self._ordered(header.number, control.decode_from_controller(payload))
            case Superseded():
                if self._worker is not None:
                    self._worker.supersede()
            case SliceEnds():
                self.code = header.code
                self._ended.set()
            case _:
                super()._receive(connection, header, payload)

    def _ordered(self, number: int, message: control.FromController) -> None:
        """Takes an order its place, and carries it out after the one before."""
        worker, gate = self._worker, None
        if isinstance(worker, SliceWorker) and isinstance(message, control.Command):
            gate = worker.turn(message)
        self._at_work = asyncio.create_task(self._carry_out(self._at_work, number, message, gate))

    async def _carry_out(
        self, before: asyncio.Task[None], number: int, message: control.FromController, gate: Gate | None
    ) -> None:
        await before
        command = message.id if isinstance(message, control.Command) else 0
        answer: control.FromWorker
        try:
            answer = await self._answer(message, gate)
        except PeerUnreachable as problem:
            answer = control.Failed(command, problem.instance, str(problem))
        except Exception as problem:
            log.exception("%s failed", type(message).__name__)
            answer = control.Failed(command, "", str(problem))
        finally:
            if gate is not None:
                gate.open()
        self._leader.send(Answer(self._hosts.number, number), control.encode(answer))

    async def _answer(self, message: control.FromController, gate: Gate | None) -> control.FromWorker:
        match message:
            case control.Welcome():
                worker = await self._prepare(message)
                return worker.ready()
            case control.Forget():
                if self._worker is not None:
                    self._worker.forget(message.sequences)
                return control.Done(0)
        assert isinstance(self._worker, SliceWorker) and isinstance(message, control.Command), "commands come later"
        return await self._worker.carry_out_at(gate, message)

    async def _beat(self, controller: str, interval: float) -> None:
        """The controller hears of the leader alone, and the leader of this host."""

    def _circulate(self, header: StepHeader, payload: tuple[memoryview, ...]) -> None:
        self._loop.call_soon_threadsafe(self._leader.send, header, *payload)

    def _report(self, message: control.FromWorker) -> None:
        if isinstance(message, control.StepLost):
            self._leader.send(HostLostStep(message.instance, message.message))

    def _heard(self, word: Word) -> None:
        """The notice is the whole slice's."""
        message = message_of(word, time.monotonic())
        self._leader.send(HostNoticed(self._hosts.number), control.encode(message))

    def _leader_gone(self) -> None:
        if not self._ended.is_set():
            self._die("host 0 is gone")


async def _nothing() -> None:
    """The order before the first."""
