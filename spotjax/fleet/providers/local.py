"""Machines that are child processes on this one: for a laptop, for tests, and to see how a fleet is rented.

How a child is started and ended is in ``spotjax.local_workers``. Machines of this provider end with the process that
opened it, on Linux however that ends; after a restart there are none, and nothing has to be found again.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from spotjax import settings
from spotjax.config import NAME, ServeConfig
from spotjax.errors import ConfigError, Draining, OutOfCapacity, ProviderRefused
from spotjax.fleet.providers.machines import Machines
from spotjax.fleet.providers.provider import FleetIdentity, Machine, MachineState, Offer, ProviderConfig
from spotjax.local_workers import HANDED_ON, STOP_SECONDS, Command, LocalWorkers, shown_end
from spotjax.meshes.instance import PriceClass


class LocalOffer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What can be had on this machine: ``[[provider.offers]]``."""

    type: Annotated[str, Meta(pattern=f"^{NAME}$", description="name of the machine type")] = "local"
    zone: Annotated[str, Meta(pattern=f"^({NAME})?$", description="name of the zone it pretends to be in")] = ""
    price_class: Annotated[PriceClass, Meta(description="what it pretends to be rented as")] = "spot"
    price: Annotated[float, Meta(ge=0, description="USD per hour that it pretends to cost")] = 0.0
    most: Annotated[int, Meta(ge=1, le=1024, description="of these at once")] = 1024

    @property
    def offer(self) -> Offer:
        """The same for the fleet."""
        return Offer(self.type, self.zone, self.price_class, self.price)


class LocalConfig(ProviderConfig, frozen=True, tag="local"):
    """``[provider]`` with ``kind = "local"``."""

    near = True
    most: Annotated[int, Meta(ge=1, le=1024, description="machines at once")] = 4
    start_seconds: Annotated[float, Meta(ge=0, description="how long a machine takes to start")] = 0.0
    offers: Annotated[tuple[LocalOffer, ...], Meta(min_length=1, description="what can be had")] = (LocalOffer(),)
    worker: Annotated[
        dict[str, Any],
        Meta(description=f"settings of the workers that are not the controller's: {', '.join(HANDED_ON)}"),
    ] = {}  # noqa: RUF012

    async def open(self, fleet: FleetIdentity) -> LocalProvider:
        """Opens it.

        Raises:
          ConfigError: ``worker`` has something that is no setting of a worker, or an offer is there twice.
        """
        return LocalProvider(self, worker_settings(self.worker, fleet.settings), fleet.join)


@dataclass
class Life:
    """What is to become of one machine.

    Attributes:
      offer: what it was rented as.
      end: its end was asked for.
      notice: with notice; else at once.
      released: nothing of it is to be kept.
      code: how its process ended.
      living: ends when its process has ended, or there will be none.
    """

    offer: Offer
    end: asyncio.Event = field(default_factory=asyncio.Event)
    notice: bool = True
    released: bool = False
    code: asyncio.Future[int] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    living: asyncio.Task[None] = field(init=False)


class LocalProvider:
    """Rents out child processes of this one. See ``Provider``.

    A worker that a signal ends, or that leaves by itself, counts as preempted; one that ends with an error has failed.
    """

    name = "local"

    def __init__(
        self,
        config: LocalConfig,
        settings: ServeConfig,
        join: str,
        *,
        command: Command | None = None,
        machines: Machines | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        """No machine yet.

        Args:
          config: what there is.
          settings: the workers get theirs from.
          join: HOST:PORT of the controller.
          command: see ``LocalWorkers``.
          machines: where its machines are put; others may be there, but none of the same names that run.
          now: Unix seconds.

        Raises:
          ConfigError: an offer is there twice.
        """
        self._config, self._settings, self._now = config, settings, now
        self._offers = {each.offer.key: each for each in config.offers}
        if len(self._offers) < len(config.offers):
            raise ConfigError("offers: two are of the same type, zone and price_class; give each of them once")
        self._workers = LocalWorkers(settings, join, command=command, on_exit=self._ended)
        self._machines = Machines() if machines is None else machines
        self._lives: dict[str, Life] = {}
        self._closed = False

    async def offers(self) -> Sequence[Offer]:
        """As the configuration has them."""
        return tuple(each.offer for each in self._config.offers)

    async def list(self) -> Sequence[Machine]:
        """Those of this process."""
        return self._machines.all()

    async def request(self, name: str, offer: Offer) -> Machine:
        """See ``Provider``. Machines that have ended count until they are released."""
        if name in self._lives and (there := self._machines.get(name)) is not None:
            return there
        if self._closed:
            raise ProviderRefused("the provider was closed, and its machines end")
        known = self._known(offer)
        alike = sum(life.offer.key == offer.key for life in self._lives.values())
        if alike >= known.most or len(self._lives) >= self._config.most:
            limit = f"{known.most} of these" if alike >= known.most else f"{self._config.most} machines"
            raise OutOfCapacity(f"there is no room for another {offer}: there may be {limit}")
        life = self._lives[name] = Life(known.offer)
        machine = self._machines.put(Machine(name, known.offer, MachineState.STARTING, created=self._now()))
        life.living = asyncio.create_task(self._live(machine, life))
        return machine

    async def release(self, name: str) -> None:
        """See ``Provider``. A worker is told, and killed when its grace is over and it had time to end."""
        if (life := self._lives.get(name)) is not None:
            life.released = True
            life.end.set()
            if life.living.done():
                self._forget(name)

    def take(self, name: str, notice: bool) -> None:
        """Preempts a machine, if there is one of that name: with its workers' ``grace_seconds`` of notice, or at once,
        also one that had notice already or is being given back.
        """
        if (life := self._lives.get(name)) is not None:
            life.notice = notice and life.notice
            life.end.set()
            if not notice and name in self._workers.processes:
                self._workers.signal(name, signal.SIGKILL)

    def watch(self) -> AsyncIterator[Machine]:
        """See ``Provider``."""
        return self._machines.watch()

    async def close(self) -> None:
        """Ends all machines: they are processes of this one, which is about to end."""
        self._closed = True
        await self._workers.stop()
        for name in list(self._lives):
            await self.release(name)
        await asyncio.gather(*(life.living for life in self._lives.values()))

    async def _live(self, machine: Machine, life: Life) -> None:
        """The life of a machine, from its start to its end."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(life.end.wait(), self._config.start_seconds)
        taken = MachineState.PREEMPTED, "taken before it had started"
        if not life.end.is_set():
            taken = await self._run(machine, life)
        if life.released:
            self._forget(machine.name)
        else:
            self._machines.put(replace(machine, state=taken[0], detail=taken[1]))

    async def _run(self, machine: Machine, life: Life) -> tuple[MachineState, str]:
        """The life of its process: how that ended, and why."""
        flags = (f"--price-class={machine.offer.price_class}", f"--zone={machine.offer.zone}")
        try:
            await self._workers.start(machine.name, flags)
        except (OSError, Draining) as problem:
            return MachineState.FAILED, str(problem)
        self._machines.put(replace(machine, state=MachineState.RUNNING))
        end = asyncio.ensure_future(life.end.wait())
        await asyncio.wait((end, life.code), return_when=asyncio.FIRST_COMPLETED)
        end.cancel()
        if life.code.done():
            code = life.code.result()
            return MachineState.PREEMPTED if code <= 0 else MachineState.FAILED, shown_end(code)
        self._machines.put(replace(machine, state=MachineState.STOPPING))
        grace = self._settings.grace_seconds
        if life.notice:
            self._workers.signal(machine.name, signal.SIGTERM)
            patience = max(STOP_SECONDS, grace) if life.released else grace
            await asyncio.wait((life.code,), timeout=patience)
        if not life.code.done():
            self._workers.signal(machine.name, signal.SIGKILL)
        return MachineState.PREEMPTED, shown_end(await life.code)

    def _known(self, offer: Offer) -> LocalOffer:
        if (known := self._offers.get(offer.key)) is None:
            there = ", ".join(str(each.offer) for each in self._config.offers)
            raise ProviderRefused(f"there is no {offer}; there is {there}")
        return known

    def _forget(self, name: str) -> None:
        del self._lives[name]
        self._machines.drop(name)

    def _ended(self, name: str, code: int) -> None:
        self._lives[name].code.set_result(code)


def worker_settings(table: Mapping[str, Any], controller: ServeConfig) -> ServeConfig:
    """The controller's settings with those that are the workers' alone.

    Raises:
      ConfigError: one is no setting of workers, or out of its range.
    """
    where = "worker of [provider]"
    settings.refuse_unknown(table, HANDED_ON, where)
    checked = {name: settings.checked(name, value, f"{name} in {where}", strict=True) for name, value in table.items()}
    return msgspec.structs.replace(controller, **checked)
