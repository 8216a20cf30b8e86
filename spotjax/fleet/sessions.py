"""The controller's ends of the workers' control streams: who is registered, who answers, who is silent.

Turns streams, beats and time into a few facts for whoever runs the fleet (``Watcher``). Decides nothing about the mesh.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable
from typing import Any, Protocol

import grpc
import msgspec

from spotjax.errors import InstanceLost
from spotjax.fleet.leases import Leases
from spotjax.fleet.probation import Probation
from spotjax.protocol import control
from spotjax.protocol.beats import Beat

log = logging.getLogger(__name__)

LOOKS_PER_LEASE = 16
"""How often, within a lease, leases are looked at."""
FIRST_BEAT_SECONDS = 30.0
"""For a newcomer's first beat, unless it is ready before: its heartbeat process starts on cores that others use."""
GOODBYE_SECONDS = 1.0
"""For a worker to take what was sent to it before its session ended."""


class Watcher(Protocol):
    """Whoever runs the fleet."""

    async def welcome(self, registration: control.Register) -> control.Welcome | control.Refused:
        """What to answer a newcomer that could be taken in."""
        ...

    def registered(self, session: WorkerSession) -> None:
        """A worker was welcomed."""
        ...

    def ready(self, session: WorkerSession) -> None:
        """It has compiled and loaded, and can be given work."""
        ...

    def noticed(self, session: WorkerSession, word: control.Noticed | control.NoticeWithdrawn) -> None:
        """Its machine will be gone, a source says, or will not."""
        ...

    def step_lost(self, session: WorkerSession, instance: str, problem: str) -> None:
        """It says that a step ended with it through the fault of an instance."""
        ...

    def ended(self, session: WorkerSession, why: str) -> None:
        """It is gone as far as the fleet is concerned."""
        ...


class WorkerSession:
    """One worker's control stream, for as long as it lasts.

    Attributes:
      registration: what it said of itself.
      offer: what it holds, once it is ready.
      compiled: functions that it compiled so far while somebody could have waited.
      vitals: what it said last of how it is; None before it does.
      over: done, with the reason, when the stream is of no use any more.
    """

    def __init__(self, registration: control.Register) -> None:
        self.registration = registration
        self.offer: control.Ready | None = None
        self.compiled = 0
        self.vitals: control.Vitals | None = None
        self.over: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.outgoing: asyncio.Queue[control.FromController | None] = asyncio.Queue()
        """Ends with None."""
        self._asked: dict[int, asyncio.Future[control.Done]] = {}
        self._ids = itertools.count()

    @property
    def instance(self) -> str:
        """Its name."""
        return self.registration.instance

    def tell(self, message: control.FromController) -> None:
        """Sends a message, if there still is somebody to read it."""
        if not self.over.done():
            self.outgoing.put_nowait(message)

    async def ask(self, command: Callable[[int], control.Command]) -> control.Done:
        """Has a command carried out.

        Args:
          command: makes it from its id.

        Raises:
          InstanceLost: the worker is gone.
          CommandFailed: it could not.
        """
        number = next(self._ids)
        answer: asyncio.Future[control.Done] = asyncio.get_running_loop().create_future()
        if self.over.done():
            raise InstanceLost(f"instance {self.instance} is gone: {self.over.result()}")
        self._asked[number] = answer
        try:
            self.tell(command(number))
            return await answer
        finally:
            self._asked.pop(number, None)

    def end(self, why: str) -> None:
        """Ends it from this side: nothing that comes after counts. What was told before is still sent."""
        if not self.over.done():
            self.over.set_result(why)
            self.outgoing.put_nowait(None)
        for answer in self._asked.values():
            if not answer.done():
                answer.set_exception(InstanceLost(f"instance {self.instance} is gone: {why}"))

    def answered(self, message: control.Done | control.Failed) -> None:
        """A command has come back."""
        answer = self._asked.get(message.id)
        if answer is None or answer.done():
            return  # nobody waits for it any more
        if isinstance(message, control.Failed):
            answer.set_exception(CommandFailed(self.instance, message.unreachable, message.message))
        else:
            self.compiled = message.compiled
            answer.set_result(message)


class CommandFailed(Exception):
    """A worker could not carry out a command.

    Attributes:
      instance: the worker.
      unreachable: the instance that it could not read from, empty for another reason.
    """

    def __init__(self, instance: str, unreachable: str, message: str) -> None:
        super().__init__(message)
        self.instance, self.unreachable = instance, unreachable


class Sessions:
    """All workers.

    Args:
      leases: of everybody who is registered.
      clock: monotonic seconds.
      watcher: is told what happens.
    """

    def __init__(self, leases: Leases, clock: Callable[[], float], watcher: Watcher) -> None:
        self._leases, self._clock, self._watcher = leases, clock, watcher
        self._current: dict[str, WorkerSession] = {}
        self._probation = Probation()

    def __getitem__(self, instance: str) -> WorkerSession:
        """The session of an instance.

        Raises:
          InstanceLost: there is none.
        """
        try:
            return self._current[instance]
        except KeyError:
            raise InstanceLost(f"instance {instance} is not registered") from None

    def get(self, instance: str) -> WorkerSession | None:
        """The session of an instance, if there is one."""
        return self._current.get(instance)

    def all(self) -> tuple[WorkerSession, ...]:
        """Every session."""
        return tuple(self._current.values())

    def beat(self, beat: Beat) -> None:
        """A sign of life."""
        self._leases.beat(beat.instance, beat.incarnation, self._clock())

    def silence(self, instance: str) -> float:
        """Seconds since the last sign of life of an instance that is registered; less before its first."""
        return max(0.0, self._leases.seconds - self._leases.remaining(instance, self._clock()))

    def end(self, instance: str, why: str) -> None:
        """Ends the session of an instance, if there is one."""
        session = self._current.pop(instance, None)
        if session is not None:
            self._leases.revoke(instance)
            session.end(why)
            self._watcher.ended(session, why)

    def give_up(self, instance: str, why: str) -> None:
        """Ends the session of an instance that failed, if there is one; the process must stay out for some time."""
        session = self._current.get(instance)
        if session is not None:
            seconds = self._probation.failed(instance, session.registration.incarnation, self._clock())
            log.error("instance %s is given up and must stay out for %g s: %s", instance, seconds, why)
            self.end(instance, why)

    async def watch(self, lease_seconds: float) -> None:
        """Ends the sessions of the silent. Runs until cancelled."""
        interval = lease_seconds / LOOKS_PER_LEASE
        while True:
            before = self._clock()
            await asyncio.sleep(interval)
            late = self._clock() - before - interval
            if late > 2 * interval:  # we did not run ourselves; beats may be waiting to be read
                self._leases.stalled(late, self._clock())
            for instance in self._leases.expired(self._clock()):
                self.give_up(instance, f"silent for {lease_seconds:g} s")

    async def join(self, requests: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """One stream, from the first to the last message."""
        try:
            registration = await context.read()
        except msgspec.DecodeError as problem:
            message = f"the first message is no registration: {problem}; install the same version of spotjax on both"
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, message)
        if not isinstance(registration, control.Register):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first message must be a registration")
        answer = await self._admit(registration)
        if isinstance(answer, control.Refused):
            log.warning("worker refused: %s", answer.reason, extra={"instance": registration.instance})
            await context.write(answer)
            return
        session = WorkerSession(registration)
        session.tell(answer)
        self._current[session.instance] = session
        self._leases.expect(session.instance, registration.incarnation, self._clock(), FIRST_BEAT_SECONDS)
        self._watcher.registered(session)
        try:
            await self._converse(session, context)
        finally:
            if self._current.get(session.instance) is session:
                self.end(session.instance, "its connection closed")

    async def _admit(self, registration: control.Register) -> control.Welcome | control.Refused:
        if registration.version != control.VERSION:
            return control.Refused(
                f"it speaks version {registration.version} of the protocol, the controller {control.VERSION}; install "
                "the same version of spotjax on both",
                retry=False,
            )
        name, incarnation = registration.instance, registration.incarnation
        current = self._current.get(name)
        if current is not None and current.registration.incarnation == incarnation:
            self.end(name, "it registers again")
        seconds = self._probation.remaining(name, incarnation, self._clock())
        if seconds > 0:
            return control.Refused(f"it failed and must stay out for another {seconds:.1f} s", retry=True)
        answer = None if name in self._current else await self._watcher.welcome(registration)
        if answer is None or name in self._current:  # or somebody was quicker while the answer was worked out
            return control.Refused(f"an instance named {name} is in the fleet already", retry=True)
        return answer

    async def _converse(self, session: WorkerSession, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """Passes messages both ways until either side ends."""
        reading = asyncio.create_task(self._read(session, context))
        writing = asyncio.create_task(self._write(session, context))
        try:
            ends: set[asyncio.Future[Any]] = {reading, writing, session.over}
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            # gRPC cannot end a stream, and the worker waits, while a write that was cancelled halfway is under way
            session.outgoing.put_nowait(None)
            await asyncio.wait({writing}, timeout=GOODBYE_SECONDS)
        finally:
            for task in (reading, writing):
                task.cancel()
            for problem in await asyncio.gather(reading, writing, return_exceptions=True):
                if isinstance(problem, grpc.aio.BaseError | asyncio.InvalidStateError):
                    log.debug("the stream of %s broke: %s", session.instance, problem)
                elif isinstance(problem, Exception):
                    log.error("the session with %s fails: %s", session.instance, problem, exc_info=problem)

    async def _read(self, session: WorkerSession, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        while (message := await context.read()) is not grpc.aio.EOF:
            if session.over.done():
                return
            match message:
                case control.Ready():
                    session.offer, session.compiled = message, message.compiled
                    self._leases.grant(session.instance, session.registration.incarnation, self._clock())
                    self._probation.serves(session.instance, session.registration.incarnation, self._clock())
                    self._watcher.ready(session)
                case control.Done() | control.Failed():
                    session.answered(message)
                case control.Noticed() | control.NoticeWithdrawn():
                    self._watcher.noticed(session, message)
                case control.Vitals():
                    session.vitals = message
                case control.StepLost():
                    self._watcher.step_lost(session, message.instance, message.message)
                case _:
                    log.warning("%s sends a second registration, which is ignored", session.instance)

    async def _write(self, session: WorkerSession, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        while (message := await session.outgoing.get()) is not None:
            await context.write(message)
