"""The interface between the fleet and whoever rents machines out, and what is said across it. Knows no cloud."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar, Protocol

import msgspec

from spotjax.config import ServeConfig
from spotjax.errors import ProviderError
from spotjax.meshes.instance import PriceClass

OfferKey = tuple[str, str, PriceClass]
"""Type, zone and price class."""


class MachineState(StrEnum):
    """Life of a rented machine as its provider sees it, in order."""

    WAITING = "waiting"
    """Asked for; the provider has none to give yet. Costs nothing."""
    STARTING = "starting"
    """It is being made or boots; may already cost."""
    RUNNING = "running"
    STOPPING = "stopping"
    """It is being taken or given back; may still cost."""
    PREEMPTED = "preempted"
    """It was taken. What is left of it must be released before another one can have its name."""
    FAILED = "failed"
    """The provider could not make it, or it broke. Must be released."""


@dataclass(frozen=True, slots=True)
class Offer:
    """Something that can be rented.

    Attributes:
      type: the provider's name of the machine type, such as ``g2-standard-48`` or ``v5litepod-8``.
      zone: where; empty if the provider has no zones.
      price_class: whether it can be taken away.
      price: USD per hour.
    """

    type: str
    zone: str
    price_class: PriceClass
    price: float

    @property
    def key(self) -> OfferKey:
        """What it is known by, whatever it costs today."""
        return self.type, self.zone, self.price_class

    def __str__(self) -> str:
        """``g2-standard-48 in zone us-east1-b as spot``."""
        return f"{self.type}{f' in zone {self.zone}' if self.zone else ''} as {self.price_class}"


@dataclass(frozen=True, slots=True)
class Machine:
    """One machine that was asked for, whether it is there yet or not.

    Attributes:
      name: given by whoever asked for it; the instance's name in the fleet, and the key of every call.
      offer: what it was rented as.
      state: where it is in its life.
      detail: why it is in this state, in the provider's own words; empty if it says nothing.
      created: when it was asked for, in Unix seconds; 0 if the provider does not say.
      failure: why it FAILED, as the error that ``request`` would have raised had the provider known at once, such as
        ``OutOfCapacity``; None in every other state, and if the provider does not say.
    """

    name: str
    offer: Offer
    state: MachineState
    detail: str = ""
    created: float = 0.0
    failure: type[ProviderError] | None = None


class Provider(Protocol):
    """Rents machines to one fleet.

    All calls are idempotent by a machine's name, so they may be repeated after a crash at any moment. A provider marks
    what it makes as this fleet's (a label, a name prefix), lists only that, and needs no memory of its own: the cloud's
    answer is the truth.

    Raises, from every call:
      OutOfCapacity: there are no such machines now; try another zone, type or price class.
      QuotaExceeded: this account may not have more of them.
      ProviderRefused: not allowed, or wrong: trying again is of no use before somebody changes something.
      ProviderUnavailable: the provider does not answer, or says to try again.
    """

    @property
    def name(self) -> str:
        """Such as ``gce`` or ``local``."""
        ...

    async def offers(self) -> Sequence[Offer]:
        """What may be asked for, with today's prices, in order of preference."""
        ...

    async def list(self) -> Sequence[Machine]:
        """Every machine of this fleet that still exists or is wanted, also dead ones whose remains must be released."""
        ...

    async def request(self, name: str, offer: Offer) -> Machine:
        """Asks for one machine, which joins the fleet under that name when it is up. Returns at once.

        If there is a machine of that name, that one is returned and nothing is asked for.
        """
        ...

    async def release(self, name: str) -> None:
        """Gives a machine back, or what is left of it, or takes a request back. One that does not exist is no error."""
        ...

    def watch(self) -> AsyncIterator[Machine]:
        """Machines as their state changes, the current ones first; never ends by itself. A machine that is gone for
        good is told once as ``STOPPING`` with detail ``gone``."""
        ...

    async def close(self) -> None:
        """Frees connections. Machines stay."""
        ...


@dataclass(frozen=True, slots=True)
class FleetIdentity:
    """Whom machines are rented for.

    Attributes:
      name: of the fleet, which its machines are marked with; two fleets of one account have different ones.
      join: HOST:PORT at which machines reach the controller.
      settings: of the controller.
    """

    name: str
    join: str
    settings: ServeConfig


class ProviderConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind"):
    """What a provider is told in its table of a file. Each one has a class of its own, with ``tag`` as its kind.

    Attributes:
      near: its machines are the controller's own.
    """

    near: ClassVar[bool] = False

    async def open(self, fleet: FleetIdentity) -> Provider:
        """See ``spotjax.fleet.providers.registry.open_provider``."""
        raise NotImplementedError
