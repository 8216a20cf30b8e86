"""Machines that a program of the user adds, lists and removes: for AWS, Azure, Slurm or anything else.

The program is called with one more argument, what to do: ``offers``, ``list``, ``request``, ``release`` or ``watch``.
What about is in its environment (``SPOTJAX_NAME`` and so on); answers are lines of JSON on standard output; the exit
code says what went wrong. How it is run is in ``command_run``; docs/clouds.md has the contract and two examples.
"""

from __future__ import annotations

import asyncio
import logging
import os
import weakref
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta

from spotjax.config import NAME
from spotjax.errors import (
    ConfigError,
    OutOfCapacity,
    ProviderError,
    ProviderRefused,
    ProviderUnavailable,
    QuotaExceeded,
)
from spotjax.fleet.providers.command_run import Finished, lines, run
from spotjax.fleet.providers.machines import changes
from spotjax.fleet.providers.provider import FleetIdentity, Machine, MachineState, Offer, OfferKey, ProviderConfig
from spotjax.meshes.instance import PriceClass
from spotjax.settings import OTHER_VARIABLES, PREFIX

log = logging.getLogger(__name__)

Verb = Literal["offers", "list", "request", "release", "watch"]
Parsed = TypeVar("Parsed")

OUT_OF_CAPACITY, QUOTA_EXCEEDED, REFUSED, TRY_AGAIN = 10, 11, 12, 75
"""Exit codes; 75 is EX_TEMPFAIL of sysexits.h."""
CANNOT_RUN = (2, 126, 127)
"""Exit codes of shells for what is wrong with the program itself."""
FAILURES: Mapping[str, type[ProviderError]] = {
    "out_of_capacity": OutOfCapacity,
    "quota_exceeded": QuotaExceeded,
    "refused": ProviderRefused,
    "try_again": ProviderUnavailable,
}
"""Words for why a machine failed."""
MOST_AT_ONCE = 8
"""Programs that run at a time."""


class CommandOffer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What can be rented: ``[[provider.offers]]``, or a line of ``offers``."""

    type: Annotated[str, Meta(min_length=1, description="name of the machine type, as the program knows it")]
    zone: Annotated[str, Meta(pattern=f"^({NAME})?$", description="name of the zone")] = ""
    price_class: Annotated[PriceClass, Meta(description="whether machines can be taken away")] = "spot"
    price: Annotated[float, Meta(ge=0, description="USD per hour")]

    @property
    def offer(self) -> Offer:
        """The same for the fleet."""
        return Offer(self.type, self.zone, self.price_class, self.price)


class CommandMachine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A line of ``list`` or ``request``."""

    name: Annotated[str, Meta(min_length=1)]
    type: Annotated[str, Meta(min_length=1)]
    state: MachineState
    zone: str = ""
    price_class: PriceClass = "spot"
    price: Annotated[float, Meta(ge=0)] | None = None
    detail: str = ""
    created: Annotated[float, Meta(ge=0)] = 0.0
    failure: Literal["out_of_capacity", "quota_exceeded", "refused", "try_again"] | None = None


class CommandConfig(ProviderConfig, frozen=True, tag="command"):
    """``[provider]`` with ``kind = "command"``."""

    command: Annotated[
        tuple[Annotated[str, Meta(min_length=1)], ...],
        Meta(min_length=1, description="program and its first arguments; no shell is between"),
    ]
    offers: Annotated[
        tuple[CommandOffer, ...], Meta(description="what can be rented; without them the program is asked")
    ] = ()
    timeout_seconds: Annotated[
        float, Meta(gt=0, le=3600, description="after which a call is killed, and has failed for this time")
    ] = 60.0
    poll_seconds: Annotated[float, Meta(gt=0, le=3600, description="between two calls of list")] = 10.0
    watch: Annotated[bool, Meta(description="the program knows watch")] = False
    environment: Annotated[dict[str, str], Meta(description="more variables for the program")] = {}  # noqa: RUF012

    async def open(self, fleet: FleetIdentity) -> CommandProvider:
        """Opens it; runs nothing.

        Raises:
          ConfigError: an offer is there twice.
        """
        return CommandProvider(self, fleet, os.environ)


class CommandProvider:
    """Rents by calling a program. See ``Provider``. Calls for different machines run side by side, a few at a time."""

    name = "command"

    def __init__(self, config: CommandConfig, fleet: FleetIdentity, environment: Mapping[str, str]) -> None:
        """Runs nothing.

        Args:
          config: what to run.
          fleet: whom for.
          environment: variables that the program gets on top; settings of this server are left out.

        Raises:
          ConfigError: an offer is there twice.
        """
        self._config, self._fleet = config, fleet
        self._offers = {each.offer.key: each.offer for each in config.offers}
        if len(self._offers) < len(config.offers):
            raise ConfigError("offers: two are of the same type, zone and price_class; give each of them once")
        kept = {n: value for n, value in environment.items() if not n.startswith(PREFIX) or n in OTHER_VARIABLES}
        told = {"SPOTJAX_FLEET": fleet.name, "SPOTJAX_JOIN": fleet.join}
        self._environment = kept | told | config.environment
        self._running = asyncio.Semaphore(MOST_AT_ONCE)
        self._locks: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()

    async def offers(self) -> Sequence[Offer]:
        """Those of the configuration, or what the program says now."""
        if not self._config.offers:
            found = {each.offer.key: each.offer for each in parsed(await self._call("offers"), CommandOffer, "offers")}
            if not found:
                raise ProviderRefused(f"{self._shown('offers')} wrote no offer; let it, or put offers in [provider]")
            self._offers = found
        return tuple(self._offers.values())

    async def list(self) -> Sequence[Machine]:
        """What the program says."""
        if not self._offers:
            await self.offers()
        return self._machines(await self._call("list"), "list")

    async def request(self, name: str, offer: Offer) -> Machine:
        """See ``Provider``. The program is asked first whether there is one, so it need not take care of that."""
        if not self._offers:
            await self.offers()
        if offer.key not in self._offers:
            raise ProviderRefused(f"there is no {offer}; there is {', '.join(map(str, self._offers.values()))}")
        async with self._alone(name):
            if (there := next((each for each in await self.list() if each.name == name), None)) is not None:
                return there
            told = {"SPOTJAX_TYPE": offer.type, "SPOTJAX_ZONE": offer.zone, "SPOTJAX_PRICE_CLASS": offer.price_class}
            machines = self._machines(await self._call("request", told | {"SPOTJAX_NAME": name}), "request")
        if not machines:
            return Machine(name, self._offers[offer.key], MachineState.WAITING)
        if [each.name for each in machines] != [name]:
            raise ProviderRefused(f"{self._shown('request')} was to make {name}, but names {machines[0].name}")
        return machines[0]

    async def release(self, name: str) -> None:
        """See ``Provider``."""
        async with self._alone(name):
            await self._call("release", {"SPOTJAX_NAME": name})

    async def watch(self) -> AsyncGenerator[Machine, None]:
        """See ``Provider``. The program is asked for its list from time to time, and at once when ``watch`` says so."""
        before: Mapping[str, Machine] = {}
        async with aclosing(self._occasions()) as occasions:
            async for _ in occasions:
                try:
                    now = {machine.name: machine for machine in await self.list()}
                except ProviderUnavailable as problem:
                    log.warning("machines cannot be listed: %s", problem)
                    continue
                for machine in changes(before, now):
                    yield machine
                before = now

    async def close(self) -> None:
        """Frees nothing; programs end with the calls that they are for."""

    async def _occasions(self) -> AsyncGenerator[None, None]:
        """When to ask: now, after every pause, and when the program that watches writes a line."""
        written = asyncio.Event()
        watching = asyncio.create_task(self._listen(written)) if self._config.watch else None
        try:
            while True:
                yield
                try:
                    await asyncio.wait_for(written.wait(), self._config.poll_seconds)
                except TimeoutError:
                    continue
                written.clear()
        finally:
            if watching is not None:
                watching.cancel()
                await asyncio.gather(watching, return_exceptions=True)

    async def _listen(self, written: asyncio.Event) -> None:
        while True:
            try:
                async with aclosing(lines([*self._config.command, "watch"], self._environment)) as heard:
                    async for _ in heard:
                        written.set()
            except ProviderError as problem:
                log.warning("%s", problem)
            log.warning("%s has ended, and is started again", self._shown("watch"))
            await asyncio.sleep(self._config.poll_seconds)

    async def _call(self, verb: Verb, told: Mapping[str, str] = {}) -> bytes:
        """Standard output of a call that went well."""
        async with self._running:
            finished = await run(
                [*self._config.command, verb], {**self._environment, **told}, self._config.timeout_seconds
            )
        if finished.code != 0:
            raise error_of(finished, self._shown(verb))
        return finished.output

    def _machines(self, output: bytes, verb: Verb) -> Sequence[Machine]:
        """What lines say of machines; each one once."""
        found = {each.name: self._machine(each) for each in parsed(output, CommandMachine, self._shown(verb))}
        return tuple(found.values())

    def _machine(self, line: CommandMachine) -> Machine:
        key: OfferKey = line.type, line.zone, line.price_class
        price = self._offers[key].price if line.price is None and key in self._offers else line.price
        if price is None:
            raise ProviderRefused(
                f"machine {line.name} is {Offer(*key, 0.0)}, and no offer says what that costs; add one to [provider], "
                "or let list say a price"
            )
        failure = FAILURES[line.failure] if line.failure else None
        return Machine(line.name, Offer(*key, price), line.state, line.detail, line.created, failure)

    def _alone(self, name: str) -> asyncio.Lock:
        """Calls for one machine come one after the other."""
        return self._locks.setdefault(name, asyncio.Lock())

    def _shown(self, verb: Verb) -> str:
        return f"{' '.join(self._config.command)} {verb}"


def parsed(output: bytes, kind: type[Parsed], program: str) -> list[Parsed]:
    """The lines of a program.

    Raises:
      ProviderRefused: one is not what it should be; says which.
    """
    found = []
    for number, line in enumerate(output.splitlines(), 1):
        if line.strip():
            try:
                found.append(msgspec.json.decode(line, type=kind))
            except msgspec.DecodeError as problem:
                raise ProviderRefused(f"{program} wrote a line {number} that is wrong: {problem}") from problem
    return found


def error_of(finished: Finished, program: str) -> ProviderError:
    """What an exit code other than 0 means."""
    said = [line.strip() for line in finished.errors.splitlines() if line.strip()]
    message = f"{program} ended with {finished.code}: {said[-1][:500] if said else 'it said nothing'}"
    if finished.code == OUT_OF_CAPACITY:
        return OutOfCapacity(message)
    if finished.code == QUOTA_EXCEEDED:
        return QuotaExceeded(message)
    if finished.code == REFUSED or finished.code in CANNOT_RUN:
        return ProviderRefused(message)
    return ProviderUnavailable(message)
