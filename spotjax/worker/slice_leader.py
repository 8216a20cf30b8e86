"""Host 0 of a TPU slice: a worker like any other towards the fleet, which has the other hosts do what it does."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Any, cast

import msgspec

from spotjax.errors import PeerUnreachable, SliceUnavailable
from spotjax.fleet.notices.telling import of_host, word_of
from spotjax.protocol import control
from spotjax.protocol.beats import Beat
from spotjax.protocol.steps import MaskHeader, StepHeader
from spotjax.transport.connection import Connection
from spotjax.transport.memory import aligned
from spotjax.worker.slice_executor import SliceExecutor
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
from spotjax.worker.worker import Worker

log = logging.getLogger("spotjax.worker")

GREETING_SECONDS = 60.0
"""For the other hosts to connect, once all have met."""
LEASE_SECONDS = 5.0
"""Silence of a host after which the slice ends. Beats come from a process of their own: a busy host is heard."""
LOOK_SECONDS = 0.5
END_SECONDS = 10.0
"""For the other hosts to free everything at the end."""


class Followers:
    """The other hosts, seen from the leader. For the thread of its loop."""

    def __init__(self) -> None:
        self.connections: dict[int, Connection] = {}
        self.beats: dict[int, float] = {}
        self.ending = False
        self._asked: dict[tuple[int, int], asyncio.Future[control.FromWorker]] = {}
        self._number = 0

    def send(self, header: msgspec.Struct, *payload: memoryview | bytes) -> None:
        """The same frame to all."""
        for connection in self.connections.values():
            connection.send(header, *payload)

    def order(self, message: Any) -> list[asyncio.Future[control.FromWorker]]:
        """Has all carry something out; returns at once. The answers are Ready, Done or Failed."""
        if self.ending:
            return []
        self._number += 1
        self.send(Order(self._number), control.encode(message))
        loop = asyncio.get_running_loop()
        asked = {(host, self._number): loop.create_future() for host in self.connections}
        self._asked |= asked
        return list(asked.values())

    def answered(self, answer: Answer, payload: memoryview) -> None:
        """An answer has come."""
        asked = self._asked.pop((answer.host, answer.number))
        if not asked.cancelled():
            asked.set_result(control.decode_from_worker(payload))

    async def end(self, code: int) -> None:
        """Has all end with this exit code; returns when they have, or did not in time."""
        self.ending = True
        self.send(SliceEnds(code))
        ends = {connection.closed for connection in self.connections.values()}
        if ends:
            await asyncio.wait(ends, timeout=END_SECONDS)
        self.connections.clear()


class LeadingWorker(SliceWorker):
    """The whole slice's model: what is asked of it, all hosts do."""

    followers: Followers
    loop: asyncio.AbstractEventLoop
    offers: Sequence[control.Ready] = ()
    """What the other hosts have to offer."""

    def ready(self) -> control.Ready:
        """What there is to offer on all hosts."""
        offers = [super().ready(), *self.offers]
        return control.Ready(tuple(parts for offer in offers for parts in offer.held), _compiled(offers))

    async def carry_out(self, command: control.Command) -> control.Done:
        """One command, on all hosts; returns when all are through with it.

        Raises: see ``Worker.carry_out``.
        """
        if isinstance(command, control.Coverage | control.SaveKv | control.SaveParameters):  # the latter are refused
            return await super().carry_out(command)
        asked, gate = self.followers.order(command), self.turn(command)
        answers = await asyncio.gather(self.carry_out_at(gate, command), *asked, return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
            if isinstance(answer, control.Failed):
                raise _error(answer)
        done = cast(list[control.Done], answers)
        return control.Done(
            command.id, sum(one.moved for one in done), sum(one.loaded for one in done), _compiled(done)
        )

    def forget(self, sequences: Sequence[int]) -> None:
        """See ``Worker.forget``."""
        self.followers.order(control.Forget(tuple(sequences)))
        super().forget(sequences)

    def supersede(self) -> None:
        """See ``Worker.supersede``."""
        self.followers.send(Superseded())
        super().supersede()

    def pause(self) -> None:
        """See ``Worker.pause``; KV that is spread over hosts is not kept."""
        self.clear()

    def clear(self) -> None:
        """See ``Worker.clear``; called in a thread other than the loop's."""
        asyncio.run_coroutine_threadsafe(self.carry_out(control.Clear(0)), self.loop).result()


class LeadingExecutor(SliceExecutor):
    """Gives steps their place in the order, here and on the other hosts at once."""

    followers: Followers

    def receive(self, header: StepHeader, payload: memoryview) -> None:
        """See ``StageExecutor.receive``."""
        self.followers.send(header, payload)
        super().receive(header, payload)

    def receive_masks(self, header: MaskHeader, payload: memoryview) -> None:
        """See ``StageExecutor.receive_masks``; every host draws for itself."""
        self.followers.send(header, payload)
        super().receive_masks(header, payload)


class LeaderProcess(SliceProcess):
    """This process as the host that has the slice's sessions with the controller."""

    KIND = LeadingWorker

    async def open(self) -> None:
        """Waits for all other hosts."""
        self._followers = Followers()
        self._arrived = asyncio.Queue[int]()
        await super().open()
        async with asyncio.timeout(GREETING_SECONDS):
            for _ in self._hosts.addresses[1:]:
                await self._arrived.get()
        self._watching = asyncio.create_task(self._watch())

    async def close(self) -> None:
        """The same on all hosts; this one last, because the others depend on it."""
        if self._worker is not None:
            await asyncio.to_thread(self._worker.clear)
        await self._followers.end(self.code)
        await super().close()

    def _forsake(self) -> None:
        """What must be done, in a thread, even if this process cannot be ended in order."""
        asyncio.run_coroutine_threadsafe(self._followers.end(self.code), self._loop).result()
        super()._forsake()

    async def _prepare(self, welcome: control.Welcome) -> Worker:
        asked = self._followers.order(welcome)
        worker = await super()._prepare(welcome)
        assert isinstance(worker, LeadingWorker), "this is what is loaded here"
        worker.followers, worker.loop = self._followers, self._loop
        offers = await asyncio.gather(*asked)
        for offer in offers:
            if isinstance(offer, control.Failed):
                raise _error(offer)
        worker.offers = cast(list[control.Ready], offers)
        return worker

    def _make_executor(self, model: Any, max_positions: int) -> LeadingExecutor:
        executor = LeadingExecutor(
            self._name, model, max_positions, self._links.send, self._die, self._watchdog, self._circulate
        )
        executor.followers = self._followers
        return executor

    def _circulate(self, header: StepHeader, payload: tuple[memoryview, ...]) -> None:
        self._loop.call_soon_threadsafe(self._step_here, header, payload)

    def _step_here(self, header: StepHeader, payload: tuple[memoryview, ...]) -> None:
        whole = aligned(sum(part.nbytes for part in payload))
        place = 0
        for part in payload:
            whole[place : place + part.nbytes] = part
            place += part.nbytes
        if self._worker is not None:
            self._worker.executor.receive(header, whole)

    def _receive(self, connection: Connection, header: Any, payload: memoryview) -> None:
        match header:
            case Greeting():
                self._greeted(header.host, connection)
            case Answer():
                self._followers.answered(header, payload)
            case Beat():
                self._followers.beats[int(header.incarnation)] = self._loop.time()
            case HostNoticed():
                self._host_noticed(header.host, payload)
            case HostLostStep():
                self._report(control.StepLost(header.instance, header.message))
            case _:
                super()._receive(connection, header, payload)

    def _greeted(self, host: int, connection: Connection) -> None:
        self._followers.connections[host] = connection
        self._followers.beats[host] = self._loop.time()
        connection.closed.add_done_callback(lambda _: self._host_gone(host))
        self._arrived.put_nowait(host)

    def _host_gone(self, host: int) -> None:
        if not self._followers.ending:
            self._die(f"host {host} is gone")

    def _host_noticed(self, host: int, payload: memoryview) -> None:
        """What any host hears is the whole slice's."""
        message = control.decode_from_worker(payload)
        assert isinstance(message, control.Noticed | control.NoticeWithdrawn), "that is what hosts send so"
        self._heard(of_host(word_of(message, self._name, time.monotonic()), host))

    async def _watch(self) -> None:
        """Ends the slice when a host is silent."""
        while not self._followers.ending:
            before = self._loop.time()
            await asyncio.sleep(LOOK_SECONDS)
            now = self._loop.time()
            late = now - before - LOOK_SECONDS
            for host, heard in self._followers.beats.items():
                if late > LOOK_SECONDS:  # we did not run ourselves; beats may be waiting to be read
                    self._followers.beats[host] = now
                elif now - heard > LEASE_SECONDS and not self._followers.ending:
                    self._die(f"host {host} has been silent for {LEASE_SECONDS:g} s")


def _compiled(answers: Sequence[control.Ready] | Sequence[control.Done]) -> int:
    return sum(answer.compiled for answer in answers)


def _error(failed: control.Failed) -> Exception:
    """What another host's failure is here."""
    if failed.unreachable:
        return PeerUnreachable(failed.unreachable, failed.message)
    return SliceUnavailable(f"on another host of this slice: {failed.message}")
