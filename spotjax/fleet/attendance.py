"""Instances come and go, as operators wish or as clouds will: what that means for the fleet, and who waits for it.

Makes the membership say what is so and has the mesh changed accordingly. How it changes is in ``reconfigure``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any

from spotjax.errors import InstanceLost
from spotjax.fleet.cluster import Cluster
from spotjax.fleet.events import EventLog
from spotjax.fleet.membership import Membership
from spotjax.fleet.reconfigure import Clock, Reconfigurer
from spotjax.fleet.status import Reconfiguration
from spotjax.meshes.instance import Instance, InstanceState

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

    async def open(self) -> Reconfiguration:
        """Forms the first mesh, of those that are there."""
        self._is_open = True
        return await self._reconfigurer.reconfigure()

    async def close(self) -> None:
        """Lets changes end without waiting for deadlines. Who still waits for an instance is told that none comes."""
        self._is_open = False
        self._reconfigurer.hurry()
        for name in self._awaited:
            self._stop_waiting(name, f"instance {name} has not arrived, and the service ends")
        await asyncio.gather(*self._changes, return_exceptions=True)

    async def preempt(self, instance: str, grace_seconds: float) -> Reconfiguration:
        """See ``FleetService.preempt``."""
        joining = self._members.require_alive(instance).state is InstanceState.JOINING
        if not joining and grace_seconds > 0:
            self._notice(instance, grace_seconds)
            return await self._finish(self._leave(instance, grace_seconds))
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
        if state is InstanceState.READY:  # one with notice keeps its deadline
            self._members.set_state(instance, InstanceState.DRAINING)
            self._events.record("notice", self._epoch, f"instance {instance} is drained", instance=instance)
        return await self._finish(self._leave(instance, None))

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

    def noticed(self, instance: str, seconds: float) -> None:
        """It will be gone in so many seconds."""
        if not self._is_open:
            self.gone(instance, "as announced")
        elif instance in self._members.having(InstanceState.JOINING):
            self.gone(instance, "before it joined")
        elif self._members.is_alive(instance):
            self._notice(instance, seconds)
            self._in_background(self._leave(instance, seconds))

    def gone(self, instance: str, how: str) -> None:
        """It is gone already."""
        self._stop_waiting(instance, f"instance {instance} is gone before it joined: {how}")
        if not self._members.is_alive(instance):
            return
        self._lose(instance, how)
        if self._is_open:
            self._in_background(self._reconfigurer.reconfigure())

    @property
    def _epoch(self) -> int:
        return self._reconfigurer.epoch

    async def _take_spare(self, count: int) -> Sequence[str]:
        return self._members.take_spare(count)

    def _notice(self, instance: str, grace_seconds: float) -> None:
        self._members.notice(instance, self._clock() + grace_seconds)
        message = f"instance {instance} will be taken in {grace_seconds:g} s"
        self._events.record("notice", self._epoch, message, instance=instance, seconds=grace_seconds)

    def _leave(self, instance: str, grace_seconds: float | None) -> Coroutine[Any, Any, Reconfiguration]:
        """Moves off an instance, which is gone when that is done or when its grace, if it has an end, is over."""
        losses, deadline = self._members.losses(instance), None
        if grace_seconds is not None:
            call_later = asyncio.get_running_loop().call_later
            deadline = call_later(grace_seconds, self._take_leave, instance, losses, "at its deadline")
        return self._move_off(instance, losses, deadline)

    async def _move_off(self, instance: str, losses: int, deadline: asyncio.TimerHandle | None) -> Reconfiguration:
        try:
            return await self._reconfigurer.reconfigure()
        finally:
            if deadline is not None:
                deadline.cancel()
            self._take_leave(instance, losses, "as announced")

    def _take_leave(self, instance: str, losses: int, how: str) -> None:
        """The end of an instance that leaves, unless it is gone already; one of that name that is back stays."""
        if self._members.is_leaving(instance) and self._members.losses(instance) == losses:
            self._cluster.evict(instance, at_once=False)
            self._lose(instance, how)

    def _stop_waiting(self, instance: str, why: str) -> None:
        """Tells who waits for an instance that it will not come."""
        if (awaited := self._awaited.get(instance)) is not None and not awaited.done():
            awaited.set_exception(InstanceLost(why))

    def _lose(self, instance: str, how: str) -> None:
        self._stop_waiting(instance, f"instance {instance} is gone {how}")
        self._reconfigurer.lose(instance)
        self._events.record("lost", self._epoch, f"instance {instance} is gone {how}", instance=instance)

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
