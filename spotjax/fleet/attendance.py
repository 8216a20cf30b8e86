"""Instances come and go, as operators wish or as clouds will: what that means for the fleet, and who waits for it.

Makes the membership say what is so and has the mesh changed accordingly. How it changes is in ``reconfigure``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import replace
from math import inf
from typing import Any

from spotjax.errors import InstanceLost
from spotjax.fleet.cluster import Cluster
from spotjax.fleet.events import EventLog
from spotjax.fleet.membership import Membership
from spotjax.fleet.notices.intervals import Intervals, NoticeRecord
from spotjax.fleet.notices.notice import Notice, NoticeKind, Withdrawn
from spotjax.fleet.notices.standing import Standing, Word, acted_on_from
from spotjax.fleet.reconfigure import Clock, Reconfigurer
from spotjax.fleet.status import Reconfiguration
from spotjax.meshes.instance import Instance, InstanceState

OPERATOR = "operator"
"""Source of the notices of drills."""
END_SECONDS = 0.5
"""Before its deadline, from which on an instance that is gone may have ended itself."""
Supply = Callable[[int], Awaitable[Sequence[str]]]


class Attendance:
    """Who is there. Nothing that happens before ``open`` or after ``close`` changes the mesh; who is gone is noted.

    Args:
      members: the instances.
      cluster: their devices.
      reconfigurer: changes the mesh.
      events: told about everything.
      clock: monotonic seconds.
      supply: starts so many more instances and names them; they arrive sooner or later. By default it takes those that
        are gone.
      failed: told about an error in a change, which the service cannot go on from.
    """

    def __init__(
        self,
        members: Membership,
        cluster: Cluster,
        reconfigurer: Reconfigurer,
        events: EventLog,
        clock: Clock,
        supply: Supply | None,
        failed: Callable[[BaseException], None],
    ) -> None:
        self._members, self._cluster, self._reconfigurer = members, cluster, reconfigurer
        self._events, self._clock, self._failed = events, clock, failed
        self._supply: Supply = supply or self._take_spare
        self._is_open = False
        self._changes: set[asyncio.Task[Reconfiguration]] = set()
        self._awaited: dict[str, asyncio.Future[Reconfiguration]] = {}
        self._standing: dict[str, Standing] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}
        """Of each instance that has notice: until its deadline, or until it is to be acted on."""
        self._released: set[str] = set()
        self._intervals = Intervals()

    async def open(self) -> Reconfiguration:
        """Forms the first mesh, of those that are there."""
        self._is_open = True
        return await self._reconfigurer.reconfigure()

    async def close(self) -> None:
        """Lets changes end without waiting for deadlines. Who still waits for an instance is told that none comes."""
        self._is_open = False
        for timer in self._timers.values():
            timer.cancel()
        self._reconfigurer.hurry()
        for name in self._awaited:
            self._stop_waiting(name, f"instance {name} has not arrived, and the service ends")
        await asyncio.gather(*self._changes, return_exceptions=True)

    async def preempt(self, instance: str, grace_seconds: float) -> Reconfiguration:
        """See ``FleetService.preempt``."""
        joining = self._members.require_alive(instance).state is InstanceState.JOINING
        if not joining and grace_seconds > 0:
            deadline = self._clock() + grace_seconds
            leaving = self.noticed(Notice(OPERATOR, NoticeKind.PREEMPT, instance, deadline, "drill"))
            return await self._finish(self._leave(instance)) if leaving is None else await asyncio.shield(leaving)
        self._cluster.evict(instance, at_once=True)
        self._lose(instance, "before it joined" if joining else "without notice")
        return await self._finish(self._reconfigurer.reconfigure())

    async def release(self, instance: str) -> Reconfiguration:
        """See ``FleetService.release``."""
        state = self._members.require_alive(instance).state
        self._reconfigurer.require_feasible_without(instance)
        if state is InstanceState.JOINING:
            self._cluster.evict(instance, at_once=False)
            self._lose(instance, "before it joined")
            return await self._finish(self._reconfigurer.reconfigure())
        self._released.add(instance)
        if state is InstanceState.READY:  # one with notice keeps its deadline
            self._members.set_state(instance, InstanceState.DRAINING)
            self._events.record("notice", self._epoch, f"instance {instance} is drained", instance=instance)
        return await self._finish(self._leave(instance))

    async def add(self, count: int) -> Reconfiguration:
        """See ``FleetService.add``."""
        names = await self._supply(count)
        absent = [name for name in names if not self._cluster.joinable(name)]
        if not absent:
            return await self._finish(self._reconfigurer.reconfigure())
        loop = asyncio.get_running_loop()
        awaited: dict[str, asyncio.Future[Reconfiguration]] = {name: loop.create_future() for name in absent}
        self._awaited |= awaited
        try:
            reports = await asyncio.gather(*awaited.values())
        finally:
            for name, future in awaited.items():
                if self._awaited.get(name) is future:  # not that of another call, for its next life
                    del self._awaited[name]
        return max(reports, key=lambda report: report.epoch)

    def registered(self, instance: Instance) -> None:
        """A new instance gets ready to join."""
        self._forget_notices(instance.name)
        self._members.register(replace(instance, state=InstanceState.JOINING))
        message = f"instance {instance.name} registered, {instance.type.devices} devices at {instance.address}"
        self._events.record("registered", self._epoch, message, instance=instance.name)

    def arrived(self, instance: str) -> None:
        """It is ready to join."""
        if not self._is_open:
            return  # part of the first mesh, or too late
        change = self._in_background(self._reconfigurer.reconfigure())
        if (awaited := self._awaited.get(instance)) is not None:
            change.add_done_callback(lambda done: _pass_on(done, awaited))

    def noticed(self, word: Word) -> asyncio.Task[Reconfiguration] | None:
        """A source says that an instance will be gone, or takes that back. Returns what is done about it, if anything.

        Its deadline is on this process's clock.
        """
        instance, now = word.instance, self._clock()
        before = self._standing.get(instance, Standing())
        stands = before.hear(word, now)
        if stands == before or not self._members.is_alive(instance):
            return None
        self._standing[instance] = stands
        self._intervals.heard(word, now)
        self._say(stands.words.get(word.source, word))
        return self._act(instance)

    def notices(self) -> tuple[NoticeRecord, ...]:
        """What the notices of every source have come to."""
        return self._intervals.records()

    def gone(self, instance: str, how: str, *, in_order: bool = False) -> None:
        """It is gone already; ``in_order`` if it ended itself."""
        self._stop_waiting(instance, f"instance {instance} is gone before it joined: {how}")
        if not self._members.is_alive(instance):
            return
        self._lose(instance, how, in_order=in_order or self._clock() > self._members.deadline(instance) - END_SECONDS)
        if self._is_open:
            self._in_background(self._reconfigurer.reconfigure())

    @property
    def _epoch(self) -> int:
        return self._reconfigurer.epoch

    async def _take_spare(self, count: int) -> Sequence[str]:
        return self._members.take_spare(count)

    def _say(self, word: Word) -> None:
        instance, source, now = word.instance, word.source, self._clock()
        if isinstance(word, Withdrawn):
            message = f"{source} takes its notice to instance {instance} back: {word.evidence}"
            self._events.record("withdrawn", self._epoch, message, instance=instance, source=source)
            return
        left: dict[str, float] = {} if word.deadline is None else {"seconds": round(word.deadline - now, 3)}
        what = f"will be taken in {left['seconds']:g} s" if left else "may be taken soon"
        message = f"instance {instance} {what}, says {source}: {word.kind} ({word.evidence})"
        self._events.record("notice", self._epoch, message, instance=instance, source=source, kind=word.kind, **left)

    def _act(self, instance: str) -> asyncio.Task[Reconfiguration] | None:
        """Does what an instance's notices ask for now, and sets the time for the rest."""
        if (timer := self._timers.pop(instance, None)) is not None:
            timer.cancel()
        notice, now, call_later = self._standing[instance].notice, self._clock(), asyncio.get_running_loop().call_later
        self._members.advise(instance, notice is not None)
        if (begin := acted_on_from(notice)) > now:
            if begin < inf:
                self._timers[instance] = call_later(begin - now, self._act, instance)
            return self._stay(instance)
        assert notice is not None and notice.deadline is not None, "else there is nothing to act on"
        if not self._is_open or instance in self._members.having(InstanceState.JOINING):
            self.gone(instance, "before it joined" if self._is_open else "as announced", in_order=True)
            return None
        self._members.notice(instance, notice.deadline)
        losses = self._members.losses(instance)
        left = notice.deadline - now
        self._timers[instance] = call_later(left, self._take_leave, instance, losses, "at its deadline")
        return self._in_background(self._leave(instance))

    def _stay(self, instance: str) -> asyncio.Task[Reconfiguration] | None:
        """An instance that was to leave, and has not left, stays."""
        if instance not in self._members.having(InstanceState.NOTICED):
            return None
        released = instance in self._released
        self._members.set_state(instance, InstanceState.DRAINING if released else InstanceState.READY)
        return self._in_background(self._reconfigurer.reconfigure())

    def _leave(self, instance: str) -> Coroutine[Any, Any, Reconfiguration]:
        """Has the mesh leave an instance as it is now, which is gone when that is done, if it is still to go."""
        return self._move_off(instance, self._members.losses(instance))

    async def _move_off(self, instance: str, losses: int) -> Reconfiguration:
        try:
            return await self._reconfigurer.reconfigure()
        finally:
            self._take_leave(instance, losses, "as announced")

    def _take_leave(self, instance: str, losses: int, how: str) -> None:
        """The end of an instance that leaves, unless it is gone already; one of that name that is back stays."""
        if self._members.is_leaving(instance) and self._members.losses(instance) == losses:
            self._cluster.evict(instance, at_once=False)
            self._lose(instance, how, in_order=True)

    def _stop_waiting(self, instance: str, why: str) -> None:
        """Tells who waits for an instance that it will not come."""
        if (awaited := self._awaited.get(instance)) is not None and not awaited.done():
            awaited.set_exception(InstanceLost(why))

    def _lose(self, instance: str, how: str, *, in_order: bool = False) -> None:
        self._stop_waiting(instance, f"instance {instance} is gone {how}")
        self._reconfigurer.lose(instance)
        seconds = self._intervals.ended(instance, self._clock(), in_order=in_order)
        self._forget_notices(instance)
        message, since = f"instance {instance} is gone {how}", {}
        if seconds is not None:
            message, since = f"{message}, {seconds:.3f} s after its notice", {"notice_seconds": round(seconds, 3)}
        self._events.record("lost", self._epoch, message, instance=instance, **since)

    def _forget_notices(self, instance: str) -> None:
        """They were about a life that is over."""
        if (timer := self._timers.pop(instance, None)) is not None:
            timer.cancel()
        self._standing.pop(instance, None)
        self._released.discard(instance)

    async def _finish(self, change: Coroutine[Any, Any, Reconfiguration]) -> Reconfiguration:
        """Carries a change through even if whoever asked for it goes away. An error in one ends the service."""
        return await asyncio.shield(self._in_background(change))

    def _in_background(self, change: Coroutine[Any, Any, Reconfiguration]) -> asyncio.Task[Reconfiguration]:
        task = asyncio.create_task(change)
        self._changes.add(task)
        task.add_done_callback(self._change_ended)
        return task

    def _change_ended(self, change: asyncio.Task[Reconfiguration]) -> None:
        self._changes.discard(change)
        if not change.cancelled() and (problem := change.exception()) is not None:
            self._failed(problem)


def _pass_on(change: asyncio.Task[Reconfiguration], awaited: asyncio.Future[Reconfiguration]) -> None:
    """What a change comes to, to who waits for it."""
    if awaited.done():
        return
    if change.cancelled():
        awaited.cancel()
    elif (problem := change.exception()) is not None:
        awaited.set_exception(problem)
    else:
        awaited.set_result(change.result())
