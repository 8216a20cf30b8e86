"""Harm done to a service under load, drawn by seed, and whether it kept its promises.

``schedule`` decides what happens to whom, purely; ``Chaos`` makes it happen and looks at what comes of it.
"""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import Collection, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from spotjax.tools.load import Load, longest
from spotjax.tools.local_fleet import LocalFleet
from spotjax.tools.service import GRACE_SECONDS, NotInTime, Service, alive, ready

LEASE_SECONDS = 2.0
"""Silence after which an instance counts as lost; ``freeze`` and ``cut`` exceed it, ``pause`` and ``blip`` do not."""
LOOK_SECONDS = 0.5
"""How often to look whether tokens can come at all."""
STALL_SECONDS = 30.0
"""Without any token for so long although a mesh serves, something hangs."""
MOST_TOKENS = 120
"""Most tokens that clients see between two events."""


@dataclass(frozen=True)
class Kind:
    """A kind of event.

    Attributes:
      takes: instances that it needs.
      loses: of these, how many are gone afterwards until they are brought back.
      away: of these, how many come back by themselves.
      shortest, longest: seconds that it lasts, where it does.
      needs: ``embedded`` any service, ``processes``, ``network``.
    """

    takes: int
    loses: int = 0
    away: int = 0
    shortest: float = 0.0
    longest: float = 0.0
    needs: str = "processes"


KINDS = {
    "kill": Kind(1, loses=1, needs="embedded"),
    "kill two": Kind(2, loses=2, needs="embedded"),
    "kill in a change": Kind(2, loses=2, needs="embedded"),  # one is given notice, the other killed as its bytes move
    "terminate": Kind(1, loses=1, needs="embedded"),  # SIGTERM, with grace
    "preempt": Kind(1, loses=1, shortest=5.0, longest=10.0, needs="embedded"),  # the operators' command
    "kill newcomer": Kind(0, shortest=0.1, longest=3.0),  # one that is gone starts and is killed somewhere on its way
    "freeze": Kind(1, away=1, shortest=2.5, longest=4.0),  # stopped as a whole, longer than the lease
    "pause": Kind(1, shortest=0.1, longest=1.0),  # the same, shorter
    "hang": Kind(1, away=1, shortest=0.5, longest=3.0),  # the worker is stopped, what speaks for it is not
    "cut": Kind(1, away=1, shortest=2.5, longest=4.0, needs="network"),  # longer than the lease
    "blip": Kind(1, shortest=0.2, longest=0.8, needs="network"),
    "slow": Kind(1, shortest=0.5, longest=2.0, needs="network"),
    "sever": Kind(1, away=1, needs="network"),  # connections of the data plane are reset, and can be made anew
}
JOIN = "join"
"""Brings some of those back that are gone."""
NEWCOMER = "kill newcomer"
FOLLOWS = -1
"""Tokens before an event that follows hard upon the one before."""
HASTY, JOINS, TOO_FEW = 0.2, 0.3, 0.1
"""Shares of events that follow hard, of turns that join if anybody is gone, and of losses that may leave too few."""


@dataclass(frozen=True)
class Event:
    """Something that happens to the service.

    Attributes:
      kind: a key of ``KINDS``, or ``JOIN``.
      targets: instances.
      tokens: how many clients see after the event before; ``FOLLOWS`` hard upon it.
      seconds: how long it lasts.
    """

    kind: str
    targets: tuple[str, ...]
    tokens: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        lasting = f" for {self.seconds:.2f} s" if self.seconds else ""
        return f"{self.kind} {', '.join(self.targets)}{lasting} after {self.tokens} tokens"


def possible(service: Service) -> list[str]:
    """Kinds of events that can be done to a service."""
    can = {"embedded"}
    if isinstance(service, LocalFleet):
        can |= {"processes"} | ({"network"} if service.network else set())
    return [name for name, kind in KINDS.items() if kind.needs in can]


def schedule(seed: int, count: int, names: Sequence[str], kinds: Collection[str], enough: int = 2) -> list[Event]:
    """``count`` events, joins included; no kind occurs twice before all have once. The same seed, the same events.

    Targets are part of the fleet when their turn comes, and joins bring back those that are not. Most events leave
    ``enough`` instances, some do not.
    """
    draw = random.Random(seed)
    gone: list[str] = []
    away: list[str] = []
    recovering: list[str] = []
    events: list[Event] = []
    deck: list[str] = []

    def can_be(name: str, there: Sequence[str]) -> bool:
        kind = KINDS[name]
        if name == NEWCOMER:
            return bool(gone)
        left = len(there) - kind.loses - kind.away
        return len(there) >= kind.takes and (left >= enough or draw.random() < TOO_FEW)

    while len(events) < count:
        if not any(name != NEWCOMER for name in deck):  # and they wait until somebody is gone
            deck += draw.sample(sorted(kinds), len(kinds))
        there = [name for name in names if name not in gone and name not in away]
        joins = gone and draw.random() < JOINS
        chosen = None if joins else next((name for name in deck if can_be(name, there)), None)
        tokens = FOLLOWS if draw.random() < HASTY else draw.randint(0, MOST_TOKENS)
        if chosen is not None:
            deck.remove(chosen)
            kind = KINDS[chosen]
            targets = draw.sample(gone, 1) if chosen == NEWCOMER else draw.sample(there, kind.takes)
            tokens = max(tokens, 0) if set(targets) & set(recovering) else tokens
            events.append(Event(chosen, tuple(targets), tokens, draw.uniform(kind.shortest, kind.longest)))
            gone += targets[: kind.loses]
            away = recovering = targets[: kind.away]
        elif gone:
            back = draw.sample(gone, draw.randint(1, len(gone)))
            gone = [name for name in gone if name not in back]
            events.append(Event(JOIN, tuple(back), tokens))
        else:
            away = []  # they are back by then
    return events


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
        await self._wait_for_moment(event)
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
        service, first = self._service, event.targets[0]
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
            case _:
                assert isinstance(service, LocalFleet)
                self._begin(first, disturb(service, event))

    async def _kill_in_a_change(self, leaving: str, victim: str) -> None:
        """Gives one instance notice and kills another when the change for it has come to a step drawn by chance."""
        steps = {self._draw.choice(("plan", "precopy")), "stop", "switch"}  # it may come to an end without that step
        said, deadline = len(self._service.events), time.monotonic() + GRACE_SECONDS
        self._begin(leaving, self._service.leave(leaving))
        while steps.isdisjoint(event.kind for event in self._service.events[said:]) and time.monotonic() < deadline:
            await asyncio.sleep(0)
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
