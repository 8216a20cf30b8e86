"""What lets the real capacity loop die at any point, in time that jumps, and lives on in a successor.

Owns time, the death, the ledger's file as it is left, the workers that join, and the true bill. Which cloud it is, and
what must be true at the end, is said in ``chaos_tpu``.
"""

from __future__ import annotations

import asyncio
import contextlib
import selectors
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import msgspec

from spotjax.errors import NoFeasibleShape, UnknownInstance
from spotjax.fleet.capacity.file import CapacitySettings
from spotjax.fleet.capacity.keeper import Keeper
from spotjax.fleet.capacity.ledger import DAY, HOUR, Ledger
from spotjax.fleet.capacity.ledger_file import NAME, LedgerFile
from spotjax.fleet.capacity.load import Meter
from spotjax.fleet.capacity.loop import CapacityLoop
from spotjax.fleet.capacity.served import Clocks, Served
from spotjax.fleet.change import Planning
from spotjax.fleet.providers.provider import Provider
from spotjax.fleet.status import FleetStatus
from spotjax.meshes.instance import Instance, InstanceState, InstanceType
from spotjax.models.config import DecoderConfig
from spotjax.models.spec import ModelSpec
from spotjax.planner.demand import Demand

EPOCH = 20_000 * DAY
"""Unix seconds at which the clock of the event loop says 0."""
KIND = InstanceType("slice", 1, 2**30, 1e9, 1e9, 1e9, 1e8)
SPEC = ModelSpec(DecoderConfig(vocab=64, width=16, layers=4, heads=4, kv_heads=2, head_size=4, mlp=32))
DRAIN_SECONDS = 3.0


class Crashed(BaseException):
    """The controller is dead from here on."""


class JumpingLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock stands while a call is on its way, and else jumps to the next timer."""

    def __init__(self) -> None:
        self.now, self.calls = 1000.0, 0
        super().__init__(_Jumps(self))

    def time(self) -> float:
        """Seconds."""
        return self.now

    @contextlib.contextmanager
    def calling(self) -> Iterator[None]:
        """A call is on its way."""
        self.calls += 1
        try:
            yield
        finally:
            self.calls -= 1


class _Jumps(selectors.DefaultSelector):
    def __init__(self, loop: JumpingLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None or (timeout > 0 and self._loop.calls):
            return super().select(1.0)
        events = super().select(0)
        if not events:
            self._loop.now += timeout
        return events


class Doom:
    """Where a controller dies.

    Args:
      what: steps that count: ``change``, ``look`` or ``write``, or ``any``.
      step: which one of them, from 1 on.
      how: ``before`` it; ``after`` its effect; ``late``: a call is left for ``late``, a file half written.
    """

    def __init__(self, what: str = "any", step: int = 2**62, how: str = "before") -> None:
        self._what, self._left, self.how = what, step, how
        self.dead = asyncio.Event()
        self.late: Callable[[], None] | None = None

    def strikes(self, step: str) -> bool:
        """Whether this step is the last. Raises Crashed if there was one already."""
        if self.dead.is_set():
            raise Crashed
        self._left -= self._what in (step, "any")
        if self._left > 0:
            return False
        self.dead.set()
        return True


class DyingFile:
    """The ledger's file of a controller that may die before, while and after it writes."""

    def __init__(self, directory: Path, doom: Doom) -> None:
        self._file, self._doom = LedgerFile(directory), doom
        self._beside = (directory / NAME).with_suffix(".new")

    def read(self) -> Ledger:
        """What is there."""
        return self._file.read()

    async def write(self, ledger: Ledger) -> None:
        """See ``CapacityLoop``."""
        strikes = self._doom.strikes("write")
        if strikes and self._doom.how == "late":
            whole = msgspec.json.encode(ledger)
            self._beside.write_bytes(whole[: len(whole) // 2])
        elif not strikes or self._doom.how == "after":
            self._file.write(ledger)
        if strikes:
            raise Crashed


class Workers:
    """Members are the machines that ``running`` says, but for those that were told to go. A ``Served``.

    Args:
      running: names by what tells two lives of a name apart, and whether each is on demand.
      draw: whether the fleet can do without an instance.
    """

    planning = Planning(SPEC, Demand(batch=4, prompt=8, output=8, page_size=4))

    def __init__(self, running: Callable[[], Mapping[str, tuple[str, bool]]], draw: Random) -> None:
        self._running, self._draw = running, draw
        self._gone: set[str] = set()

    def members(self) -> Sequence[Instance]:
        """See ``Served``."""
        there = {name: demand for life, (name, demand) in self._running().items() if life not in self._gone}
        return [Instance(name, KIND, InstanceState.READY, on_demand=demand) for name, demand in there.items()]

    def status(self) -> FleetStatus:
        """See ``Served``."""
        return FleetStatus("m", True, False, None, (), (), 0, 0, 0, 0, 0, 0.0)

    async def release(self, instance: str) -> Any:
        """See ``Served``."""
        await asyncio.sleep(DRAIN_SECONDS)
        if self._draw.random() < 0.1:
            raise NoFeasibleShape("no mesh fits without it")
        self._leave(instance)

    async def preempt(self, instance: str, grace_seconds: float) -> Any:
        """See ``Served``."""
        await asyncio.sleep(grace_seconds)
        self._leave(instance)

    def noticed(self, word: Any) -> None:
        """See ``Served``."""

    def gone(self, instance: str, how: str) -> None:
        """See ``Served``."""
        self._gone |= {life for life, (name, _) in self._running().items() if name == instance}

    def record(self, kind: str, message: str, **fields: object) -> None:
        """See ``Served``."""

    def _leave(self, instance: str) -> None:
        lives = {life for life, (name, _) in self._running().items() if name == instance} - self._gone
        if not lives:
            raise UnknownInstance(f"{instance} is gone")
        self._gone |= lives


class Controller:
    """One controller's life: the real loop on what its predecessor has left on disk."""

    def __init__(
        self, settings: CapacitySettings, provider: Provider, directory: Path, served: Served, doom: Doom, seed: int
    ) -> None:
        clock = asyncio.get_running_loop().time
        file = DyingFile(directory, doom)
        self.doom = doom
        self.keeper = Keeper(settings, file.read(), Random(seed), clock())
        self.loop = CapacityLoop(
            settings, provider, self.keeper, file.write, Meter(settings.window_seconds, clock()), lambda: served,
            Clocks(clock, lambda: EPOCH + clock()),
        )  # fmt: skip
        self._running = asyncio.create_task(self.loop.run())

    async def until_dead(self, seconds: float) -> bool:
        """Lets it work. Whether it died of its doom; it is dead in any case, and ends nothing in order."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.doom.dead.wait()
        doomed = self.doom.dead.is_set()
        await self.kill()
        return doomed

    async def kill(self) -> None:
        """From here on nothing that it does has any effect."""
        self.doom.dead.set()
        self._running.cancel()
        await asyncio.gather(self._running, return_exceptions=True)


class Bill:
    """What machines really cost: all the time that they are there, whatever their state.

    Args:
      most_per_hour, most_per_day: USD.
    """

    def __init__(self, most_per_hour: float, most_per_day: float) -> None:
        self._most_per_hour, self._most_per_day = most_per_hour, most_per_day
        self._paid: dict[str, dict[int, float]] = {}
        self.dearest = 0.0
        """USD per hour that were ever paid."""
        self.excused = False
        """Nobody could know what runs: the disk was lost, or a call took longer than any call may."""

    def pay(self, prices: Mapping[str, float], wall: float, seconds: float) -> None:
        """Machines, by life, were there for so many seconds.

        Raises:
          AssertionError: a cap was exceeded.
        """
        day, rate = int(wall // DAY), sum(prices.values())
        for life, price in prices.items():
            paid = self._paid.setdefault(life, {})
            paid[day] = paid.get(day, 0.0) + price * seconds / HOUR
        self.dearest = max(self.dearest, rate)
        if not self.excused:
            most = self._most_per_hour
            assert rate <= most + 1e-9, f"the cap on an hour: {rate} USD per hour are paid, {most} allowed: {prices}"
            assert self.spent(day) <= self._most_per_day, f"the cap on a day: {self.spent(day)} USD were spent"

    def spent(self, day: int | None = None) -> float:
        """USD, on that day or ever."""
        return sum(usd for paid in self._paid.values() for of, usd in paid.items() if day in (None, of))

    def forget(self, lives: Mapping[str, float]) -> None:
        """The ledger was lost: only what is still there can be counted again."""
        self._paid = {life: paid for life, paid in self._paid.items() if life in lives}
