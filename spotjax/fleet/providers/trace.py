"""A recorded spot market, replayed on this machine: workers come when it gave some, and are killed when it took them.

What the market does when is in ``trace_capacity``; machines are child processes as those of ``local``. The replay
begins when the provider is opened, so a controller that is started again begins it again.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import msgspec
from msgspec import Meta

from spotjax.config import NAME
from spotjax.errors import ConfigError, OutOfCapacity, ProviderRefused
from spotjax.fleet.providers.local import LocalConfig, LocalOffer, LocalProvider, worker_settings
from spotjax.fleet.providers.machines import Machines
from spotjax.fleet.providers.provider import FleetIdentity, Machine, MachineState, Offer, OfferKey, ProviderConfig
from spotjax.fleet.providers.trace_capacity import Capacity, Step, What, merged, steps
from spotjax.local_workers import HANDED_ON
from spotjax.sim.traces.formats import open_spot
from spotjax.sim.workload import SpotTrace

log = logging.getLogger(__name__)


class TraceFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A market: ``[[provider.traces]]``."""

    file: Annotated[str, Meta(min_length=1, description="file in any format of spot traces that is known")]
    type: Annotated[str, Meta(pattern=f"^{NAME}$", description="name of the machine type")] = "local"
    zone: Annotated[str, Meta(pattern=f"^({NAME})?$", description="name of the zone that it pretends to be")] = ""
    price: Annotated[float, Meta(ge=0, description="USD per hour of spot machines")] = 0.0
    on_demand_price: Annotated[
        float | None,
        Meta(description="USD per hour of on-demand machines, which are always to be had; without it there are none"),
    ] = None

    def __post_init__(self) -> None:
        if self.on_demand_price is not None and self.on_demand_price < 0:
            raise ValueError("`on_demand_price` must be >= 0")

    @property
    def key(self) -> OfferKey:
        """Of its spot machines."""
        return self.type, self.zone, "spot"

    @property
    def offers(self) -> tuple[LocalOffer, ...]:
        """What can be had there."""
        spot = LocalOffer(type=self.type, zone=self.zone, price=self.price)
        if self.on_demand_price is None:
            return (spot,)
        return spot, msgspec.structs.replace(spot, price_class="on_demand", price=self.on_demand_price)


class TraceConfig(ProviderConfig, frozen=True, tag="trace"):
    """``[provider]`` with ``kind = "trace"``."""

    near = True
    traces: Annotated[tuple[TraceFile, ...], Meta(min_length=1, description="markets, one for each zone and type")]
    speed: Annotated[float, Meta(gt=0, description="seconds of the trace that pass in a second")] = 1.0
    begin_seconds: Annotated[float, Meta(ge=0, description="seconds of the trace to leave out at its start")] = 0.0
    notice_seconds: Annotated[
        float, Meta(ge=0, le=3600, description="before it is killed, a worker gets SIGTERM; 0: it does not")
    ] = 0.0
    beyond: Annotated[
        Literal["wait", "fail"], Meta(description="what a request gets when the market has no machine: wait, or fail")
    ] = "wait"
    most: Annotated[int, Meta(ge=1, le=1024, description="machines at once")] = 16
    start_seconds: Annotated[float, Meta(ge=0, description="how long a machine takes to start")] = 0.0
    worker: Annotated[
        dict[str, Any],
        Meta(description=f"settings of the workers that are not the controller's: {', '.join(HANDED_ON)}"),
    ] = {}  # noqa: RUF012

    async def open(self, fleet: FleetIdentity) -> TraceProvider:
        """Opens it and begins the replay.

        Raises:
          ConfigError: a trace cannot be read or ends before ``begin_seconds``, two are of the same zone and type,
            ``worker`` has something that is no setting of a worker or sets ``grace_seconds``, which is the notice.
        """
        if "grace_seconds" in self.worker:
            raise ConfigError("grace_seconds in worker of [provider]: it is notice_seconds in [provider]; leave it out")
        settings = worker_settings(self.worker | {"grace_seconds": self.notice_seconds}, fleet.settings)
        markets = await asyncio.to_thread(read_traces, self)
        offers = tuple(offer for each in self.traces for offer in each.offers)
        machines = Machines()
        local = LocalConfig(most=self.most, start_seconds=self.start_seconds, offers=offers)
        provider = TraceProvider(self, markets, LocalProvider(local, settings, fleet.join, machines=machines), machines)
        provider.play()
        return provider


class Host(Protocol):
    """What brings machines to life: ``LocalProvider``."""

    async def request(self, name: str, offer: Offer) -> Machine:
        """See ``Provider``."""
        ...

    async def release(self, name: str) -> None:
        """See ``Provider``."""
        ...

    def take(self, name: str, notice: bool) -> None:
        """See ``LocalProvider``."""
        ...

    async def close(self) -> None:
        """See ``Provider``."""
        ...


class TraceProvider:
    """Rents out what recorded markets have. See ``Provider``. Time is that of the event loop.

    Machines are served in the order in which they were asked for; those on demand are always there and stay.
    """

    name = "trace"

    def __init__(
        self,
        config: TraceConfig,
        markets: Mapping[OfferKey, SpotTrace],
        host: Host,
        machines: Machines,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Nothing to be had before ``play``.

        Args:
          config: how the markets are replayed.
          markets: the recorded ones, by what they are for.
          host: brings machines to life, and tells ``machines``.
          machines: all machines, also those that wait.
          now: Unix seconds.
        """
        self._config, self._host, self._machines, self._now = config, host, machines, now
        self._steps = merged(steps(key, t, config.speed, config.notice_seconds) for key, t in markets.items())
        self._capacity = Capacity(markets)
        self._offers = {offer.offer.key: offer.offer for each in config.traces for offer in each.offers}
        self._waiting: dict[str, Offer] = {}
        self._playing: asyncio.Task[None] | None = None

    def play(self) -> None:
        """Begins the replay. What the market has at second 0 can be had at once."""
        start = asyncio.get_running_loop().time()
        there = [step for step in self._steps if step.seconds == 0]
        for step in there:
            self._apply(step)
        self._playing = asyncio.create_task(self._play(start, self._steps[len(there) :]))

    async def offers(self) -> Sequence[Offer]:
        """As the configuration has them, whether there are any now or not."""
        return tuple(self._offers.values())

    async def list(self) -> Sequence[Machine]:
        """Those of this process, and those that wait."""
        return self._machines.all()

    async def request(self, name: str, offer: Offer) -> Machine:
        """See ``Provider``."""
        if (there := self._machines.get(name)) is not None:
            return there
        if (known := self._offers.get(offer.key)) is None:
            raise ProviderRefused(f"there is no {offer}; there is {', '.join(map(str, self._offers.values()))}")
        if known.price_class == "on_demand":
            return await self._host.request(name, known)
        if self._capacity.take(name, known.key):
            try:
                return await self._host.request(name, known)
            except BaseException:
                self._capacity.give_back(name)
                raise
        if self._config.beyond == "fail":
            raise OutOfCapacity(f"the market has no {offer} left, of {self._capacity.count(known.key)} now")
        self._waiting[name] = known
        return self._machines.put(Machine(name, known, MachineState.WAITING, created=self._now()))

    async def release(self, name: str) -> None:
        """See ``Provider``. Its place is free at once."""
        if self._waiting.pop(name, None) is not None:
            self._machines.drop(name)
        else:
            await self._host.release(name)
            self._capacity.give_back(name)
            await self._serve()

    def watch(self) -> AsyncIterator[Machine]:
        """See ``Provider``."""
        return self._machines.watch()

    async def close(self) -> None:
        """Ends the replay and all machines: they are processes of this one, which is about to end."""
        if self._playing is not None:
            self._playing.cancel()
            await asyncio.gather(self._playing, return_exceptions=True)
        for name in list(self._waiting):
            await self.release(name)
        await self._host.close()

    async def _play(self, start: float, steps: Sequence[Step]) -> None:
        loop = asyncio.get_running_loop()
        for seconds, together in itertools.groupby(steps, key=lambda step: step.seconds):
            await asyncio.sleep(max(0.0, start + seconds - loop.time()))
            for step in together:
                self._apply(step)
            await self._serve()
        log.info("the recorded market has ended, and stays as it is")

    def _apply(self, step: Step) -> None:
        if machine := self._capacity.apply(step):
            log.info("machine is taken by the market", extra={"instance": machine, "notice": step.what is What.NOTICE})
            self._host.take(machine, notice=step.what is What.NOTICE)

    async def _serve(self) -> None:
        """Those that wait, as far as there are places; one that the host has no room for waits on."""
        for name, offer in list(self._waiting.items()):
            if self._capacity.take(name, offer.key):
                try:
                    await self._host.request(name, offer)
                except OutOfCapacity as problem:
                    log.warning("the market has a machine, but there is no room for it: %s", problem)
                    self._capacity.give_back(name)
                else:
                    del self._waiting[name]


def read_traces(config: TraceConfig) -> dict[OfferKey, SpotTrace]:
    """The markets, from where the replay begins.

    Raises:
      ConfigError: one cannot be read or ends before, or two are of the same zone and type.
    """
    markets: dict[OfferKey, SpotTrace] = {}
    for each in config.traces:
        if each.key in markets:
            raise ConfigError(f"traces: two are of type {each.type} in zone {each.zone or 'none'}; give each one once")
        trace = open_spot(Path(each.file))
        if config.begin_seconds >= trace.duration:
            raise ConfigError(f"begin_seconds is {config.begin_seconds:g}, but {each.file} ends at {trace.duration:g}")
        markets[each.key] = trace.window(config.begin_seconds, trace.duration) if config.begin_seconds else trace
    return markets
