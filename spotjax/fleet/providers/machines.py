"""Machines as a provider knows them, and whoever watches them. What becomes of a machine is the provider's business."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from spotjax.errors import ProviderUnavailable
from spotjax.fleet.providers.provider import Machine, MachineState

GONE = "gone"


class Machines:
    """The machines of a provider that learns by itself what becomes of them."""

    def __init__(self) -> None:
        self._machines: dict[str, Machine] = {}
        self._watching: set[asyncio.Queue[Machine]] = set()

    def get(self, name: str) -> Machine | None:
        """The machine of that name."""
        return self._machines.get(name)

    def all(self) -> tuple[Machine, ...]:
        """All machines, in the order in which they were asked for."""
        return tuple(self._machines.values())

    def put(self, machine: Machine) -> Machine:
        """A machine is new or has changed; returns it."""
        if self._machines.get(machine.name) != machine:
            self._machines[machine.name] = machine
            self._tell(machine)
        return machine

    def drop(self, name: str) -> None:
        """A machine is gone for good, if there was one of that name."""
        if (machine := self._machines.pop(name, None)) is not None:
            self._tell(gone(machine))

    async def watch(self) -> AsyncGenerator[Machine, None]:
        """See ``Provider.watch``."""
        with self.told() as changes:
            while True:
                yield await changes.get()

    @contextlib.contextmanager
    def told(self) -> Iterator[asyncio.Queue[Machine]]:
        """What ``watch`` gives, to be waited for in other ways."""
        changes: asyncio.Queue[Machine] = asyncio.Queue()
        for machine in self.all():
            changes.put_nowait(machine)
        self._watching.add(changes)
        try:
            yield changes
        finally:
            self._watching.discard(changes)

    def _tell(self, machine: Machine) -> None:
        for changes in self._watching:
            changes.put_nowait(machine)


async def watch_by_listing(
    listing: Callable[[], Awaitable[Sequence[Machine]]],
    seconds: float,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> AsyncGenerator[Machine, None]:
    """``Provider.watch`` for one that has to be asked again and again.

    Args:
      listing: asks; when it says ``ProviderUnavailable``, it is asked again later, after the time that it said.
      seconds: from an answer to the next question.
      sleep: waits.

    Raises:
      ProviderError: ``listing`` raised another one.
    """
    before: Mapping[str, Machine] = {}
    while True:
        pause = seconds
        try:
            now = {machine.name: machine for machine in await listing()}
        except ProviderUnavailable as problem:
            pause = max(seconds, problem.retry_after or 0.0)
        else:
            for machine in changes(before, now):
                yield machine
            before = now
        await sleep(pause)


def changes(before: Mapping[str, Machine], now: Mapping[str, Machine]) -> list[Machine]:
    """What a watcher is told between two answers, both by name: what is gone first, for its name may be used again."""
    ended = [gone(machine) for name, machine in before.items() if name not in now]
    return ended + [machine for name, machine in now.items() if before.get(name) != machine]


def gone(machine: Machine) -> Machine:
    """What is told of a machine that is gone for good."""
    return replace(machine, state=MachineState.STOPPING, detail=GONE)
