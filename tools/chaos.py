"""Harm done to a service under load, drawn by seed, and whether it kept its promises.

``tools.chaos_schedule`` decides what happens to whom; ``Chaos`` makes it happen and looks at what comes of it.
"""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

from spotjax.api.errors import Unavailable
from spotjax.tools.chaos_schedule import FOLLOWS, JOIN, KINDS, NEWCOMER, Event
from spotjax.tools.controller_chaos import clocks, strike
from spotjax.tools.load import Load, longest
from spotjax.tools.local_fleet import LocalFleet
from spotjax.tools.service import CHANGED, GRACE_SECONDS, NotInTime, Service, alive, ready

LEASE_SECONDS = 2.0
"""Silence after which an instance counts as lost; ``freeze`` and ``cut`` exceed it, ``pause`` and ``blip`` do not."""
STRIKES = ("controller", "clocks", "disk")
"""What events need that strike the controller."""
LOOK_SECONDS = 0.5
"""How often to look whether tokens can come at all."""
STALL_SECONDS = 30.0
"""Without any token for so long although a mesh serves, something hangs."""


def possible(service: Service) -> list[str]:
    """Kinds of events that can be done to a service."""
    can = {"embedded"}
    if isinstance(service, LocalFleet):
        can |= {"processes"} | ({"network"} if service.network else set())
        if service.patience:
            can |= {"controller"} | ({"clocks"} if clocks() else set()) | ({"disk"} if service.disk else set())
    return [name for name, kind in KINDS.items() if kind.needs in can]


@dataclass(frozen=True)
class Outcome:
    """An event that happened.

    Attributes:
      event: what it was.
      moment: monotonic seconds.
      pause: begin and end of the longest pause of one stream's tokens from then to the next event, same clock.
    """

    event: Event
    moment: float
    pause: tuple[float, float]

    @property
    def gap(self) -> float:
        """Length of the pause in seconds."""
        return self.pause[1] - self.pause[0]


class Chaos:
    """Makes events happen to a service under load.

    Args:
      service: everybody of it is ready.
      load: on it.
      seed: of what is left to chance beyond the events themselves.
      enough: instances that a mesh needs.
    """

    def __init__(self, service: Service, load: Load, seed: int, enough: int = 2) -> None:
        self._service, self._load, self._enough = service, load, enough
        self._draw = random.Random(seed)
        self._happened: list[tuple[Event, float]] = []
        self._pending: dict[str, asyncio.Task[None]] = {}

    async def happen(self, event: Event) -> None:
        """Waits for the moment of an event and makes it happen; what it leads to is not waited for.

        Raises:
          NotInTime: something hangs, and the moment does not come.
        """
        for name in event.targets:
            await self._ended(name)
        try:
            await self._wait_for_moment(event)
        except Unavailable:
            if not self._service.deserted:
                raise
        self._happened.append((event, time.monotonic()))
        self._service.note(f"{len(self._happened)}. {event}")
        await self._act(event)

    async def heal(self) -> None:
        """Lets everything come to its end and brings all instances back.

        Raises:
          NotInTime: they do not come.
        """
        for name in list(self._pending):
            await self._ended(name)
        if missing := await self._service.missing():
            await self._service.bring(missing)
        await self._service.until_ready()

    async def close(self) -> None:
        """Ends what still goes on."""
        for action in self._pending.values():
            action.cancel()
        await asyncio.gather(*self._pending.values(), return_exceptions=True)

    def outcomes(self) -> list[Outcome]:
        """All events so far and the pauses that they made."""
        ends = [moment for _, moment in self._happened[1:]] + [time.monotonic()]
        return [
            Outcome(event, moment, longest(self._load.streams, moment, end))
            for (event, moment), end in zip(self._happened, ends, strict=True)
        ]

    async def _wait_for_moment(self, event: Event) -> None:
        wanted = set() if event.kind in (JOIN, NEWCOMER) else set(event.targets)
        if event.tokens == FOLLOWS:
            await self._service.until(f"{wanted} part of the fleet", lambda status: wanted <= alive(status))
            return
        await self._service.until(
            f"{', '.join(sorted(wanted)) or 'a mesh'} ready",
            lambda status: wanted <= ready(status) and (status.ready or len(ready(status)) < self._enough),
        )
        await self._see_tokens(event.tokens)

    async def _see_tokens(self, count: int) -> None:
        """Waits until clients have seen so many tokens more, or none can come for lack of instances."""
        wanted = self._load.tokens + count
        seen, since = self._load.tokens, time.monotonic()
        while not await self._load.until(lambda: self._load.tokens >= wanted, LOOK_SECONDS):
            if self._load.tokens > seen:
                seen, since = self._load.tokens, time.monotonic()
            status = await self._service.status()
            if len(ready(status)) < self._enough:
                return
            if time.monotonic() - since > STALL_SECONDS:
                raise NotInTime(f"no token for {STALL_SECONDS:g} s with {len(ready(status))} instances: {status}")

    async def _act(self, event: Event) -> None:
        service, first = self._service, next(iter(event.targets), "")
        match event.kind:
            case "kill" | "kill two":
                await service.kill(event.targets)
            case "kill in a change":
                await self._kill_in_a_change(*event.targets)
            case "terminate":
                self._begin(first, service.leave(first))
            case "preempt":
                self._begin(first, service.preempt(first, event.seconds))
            case "kill newcomer":
                await service.bring(event.targets)
                await asyncio.sleep(event.seconds)
                await service.kill(event.targets)
            case "join":
                await service.bring(event.targets)
            case kind if KINDS[kind].needs in STRIKES:
                assert isinstance(service, LocalFleet)
                await strike(service, self._load, event, self._draw)
            case _:
                assert isinstance(service, LocalFleet)
                self._begin(first, disturb(service, event))

    async def _kill_in_a_change(self, leaving: str, victim: str) -> None:
        """Gives one instance notice and kills another when the change for it has come to a step drawn by chance."""
        since = len(self._service.events)
        self._begin(leaving, self._service.leave(leaving))
        await self._service.until_said((self._draw.choice(("plan", "precopy")), *CHANGED), since, GRACE_SECONDS)
        await self._service.kill([victim])

    def _begin(self, name: str, action: Coroutine[Any, Any, None]) -> None:
        self._pending[name] = asyncio.create_task(action)

    async def _ended(self, name: str) -> None:
        if name in self._pending:
            await self._pending.pop(name)


async def disturb(fleet: LocalFleet, event: Event) -> None:
    """Freezes an instance or disturbs its connections for a while."""
    (name,) = event.targets
    worker, network = fleet.workers[name], fleet.network
    match event.kind:
        case "freeze" | "pause" | "hang":
            worker.signal(signal.SIGSTOP, whole=event.kind != "hang")
        case "cut" | "blip" if network is not None:
            network.cut(name)
        case "slow" if network is not None:
            network.slow(name)
        case "sever" if network is not None:
            network.sever(name, spare=int(fleet.address.rpartition(":")[2]))
        case _:
            raise ValueError(f"no such event: {event}")
    await asyncio.sleep(event.seconds)
    worker.signal(signal.SIGCONT)
    if network is not None:
        network.mend(name)
    fleet.note(f"    {event.kind} of {name} is over")
