"""Machines that are nodes of a Ray cluster: each one is an actor, alone on its node, that runs a worker there.

Ray, and its autoscaler, find or make the nodes; an actor that waits is all that tells them. What is kept of machines is
in the cluster's own store (``ray_records``), the connection is a process of its own (``ray_connection``).
"""

from __future__ import annotations

import importlib.util
import os
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from spotjax.config import NAME, ServeConfig
from spotjax.errors import ConfigError, ProviderRefused
from spotjax.fleet.providers.local import worker_settings
from spotjax.fleet.providers.machines import watch_by_listing
from spotjax.fleet.providers.provider import FleetIdentity, Machine, MachineState, Offer, ProviderConfig
from spotjax.fleet.providers.ray_link import Link
from spotjax.fleet.providers.ray_records import Found, Wish, machine_of
from spotjax.local_workers import HANDED_ON, STOP_SECONDS, Command, worker_command
from spotjax.meshes.instance import PriceClass

ALONE = "spotjax"
"""The resource of which each node has one, and each machine takes it."""


class RayOffer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A kind of node: ``[[provider.offers]]``."""

    type: Annotated[str, Meta(pattern=f"^{NAME}$", description="name of the kind of node, for the fleet")]
    zone: Annotated[str, Meta(pattern=f"^({NAME})?$", description="zone; empty: any")] = ""
    price_class: Annotated[PriceClass, Meta(description="whether nodes can be taken away")] = "spot"
    price: Annotated[float, Meta(ge=0, description="USD per hour")]
    cpus: Annotated[float, Meta(ge=0, description="CPUs that a machine takes of its node")] = 0.0
    gpus: Annotated[float, Meta(ge=0, description="GPUs that it takes and sees")] = 0.0
    resources: Annotated[
        dict[str, Annotated[float, Meta(ge=0)]],
        Meta(description="more that it takes, by Ray's names; one of spotjax keeps it alone on its node"),
    ] = msgspec.field(default_factory=lambda: {ALONE: 1.0})
    labels: Annotated[dict[str, str], Meta(description="labels that its nodes have")] = {}

    @property
    def offer(self) -> Offer:
        """The same for the fleet."""
        return Offer(self.type, self.zone, self.price_class, self.price)


class RayConfig(ProviderConfig, frozen=True, tag="ray"):
    """``[provider]`` with ``kind = "ray"``."""

    offers: Annotated[tuple[RayOffer, ...], Meta(min_length=1, description="kinds of nodes, best first")]
    address: Annotated[
        str,
        Meta(min_length=1, description="HOST:PORT of the cluster's head, or auto: the cluster that this machine is in"),
    ] = "auto"
    zone_label: Annotated[
        str, Meta(description="label of nodes that has the zone; empty: an offer's zone is not looked for")
    ] = "ray.io/availability-zone"
    price_class_label: Annotated[
        str,
        Meta(description="label that has spot or on-demand; empty: an offer's price_class is not looked for"),
    ] = "ray.io/market-type"
    poll_seconds: Annotated[float, Meta(gt=0, le=3600, description="between two looks at the cluster")] = 1.0
    timeout_seconds: Annotated[
        float, Meta(gt=0, le=3600, description="after which a call has failed for this time")
    ] = 60.0
    worker: Annotated[
        dict[str, Any],
        Meta(description=f"settings of the workers that are not the controller's: {', '.join(HANDED_ON)}"),
    ] = {}  # noqa: RUF012

    async def open(self, fleet: FleetIdentity) -> RayProvider:
        """Opens it; connects at the first call.

        Raises:
          ConfigError: ray is not installed, the address is none, an offer is there twice, or ``worker`` has something
            that is no setting of a worker.
        """
        if importlib.util.find_spec("ray") is None:
            raise ConfigError('kind = "ray" in [provider] needs Ray; install spotjax[ray]')
        if "://" in self.address:
            raise ConfigError(
                f"address = {self.address!r} in [provider] is of Ray Client, which tells too little of actors; run the "
                'controller on a node of the cluster (ray start --num-cpus=0 makes one) and say "auto"'
            )
        settings = worker_settings(self.worker, fleet.settings)
        if settings.notice_file:
            raise ConfigError(
                "notice_file cannot be set for workers of Ray: they are told there that a node is drained"
            )
        return RayProvider(self, fleet, settings)


class RayProvider:
    """Rents nodes of a Ray cluster. See ``Provider``."""

    name = "ray"

    def __init__(
        self,
        config: RayConfig,
        fleet: FleetIdentity,
        settings: ServeConfig,
        *,
        command: Command = worker_command,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Connects to nothing yet.

        Args:
          config: what there is.
          fleet: whom for.
          settings: the workers get theirs from.
          command: see ``LocalWorkers``; a node's own Python stands for the program.
          now: Unix seconds.

        Raises:
          ConfigError: an offer is there twice.
        """
        self._config, self._fleet, self._settings, self._now = config, fleet, settings, now
        self._offers = {each.offer.key: each for each in config.offers}
        if len(self._offers) < len(config.offers):
            raise ConfigError("offers: two are of the same type, zone and price_class; give each of them once")
        self._command = command
        self._link = Link(config.address, fleet.name, config.timeout_seconds, os.environ)

    async def offers(self) -> Sequence[Offer]:
        """As the configuration has them."""
        return tuple(each.offer for each in self._config.offers)

    async def list(self) -> Sequence[Machine]:
        """What the cluster says."""
        return tuple(map(machine_of, await self._link.list()))

    async def request(self, name: str, offer: Offer) -> Machine:
        """See ``Provider``. One that no node has room for waits."""
        if (known := self._offers.get(offer.key)) is None:
            there = ", ".join(str(each.offer) for each in self._config.offers)
            raise ProviderRefused(f"there is no {offer}; there is {there}")
        wish = self._wish(name, known)
        patience = max(STOP_SECONDS, self._settings.grace_seconds)
        found = await self._link.request(wish, self._arguments(wish), patience)
        return self._of_name(name, found) or Machine(name, known.offer, MachineState.STOPPING, "given back")

    async def release(self, name: str) -> None:
        """See ``Provider``. A worker is told, and killed when its grace is over and it had time to end."""
        await self._link.release(name)

    def watch(self) -> AsyncIterator[Machine]:
        """See ``Provider``."""
        return watch_by_listing(self.list, self._config.poll_seconds)

    async def close(self) -> None:
        """Ends the connection. Machines stay."""
        await self._link.close()

    def _of_name(self, name: str, found: Sequence[Found]) -> Machine | None:
        return next((machine_of(each) for each in found if each.wish.name == name), None)

    def _wish(self, name: str, known: RayOffer) -> Wish:
        """What is asked for, in Ray's words."""
        labels, config = dict(known.labels), self._config
        if config.zone_label and known.zone:
            labels[config.zone_label] = known.zone
        if config.price_class_label:
            labels[config.price_class_label] = known.price_class.replace("_", "-")
        amounts = {"CPU": known.cpus, "GPU": known.gpus} | known.resources
        return Wish(
            name=name, life=uuid.uuid4().hex[:12], type=known.type, zone=known.zone, price_class=known.price_class,
            price=known.price, created=self._now(), resources={n: a for n, a in amounts.items() if a}, labels=labels,
        )  # fmt: skip

    def _arguments(self, wish: Wish) -> Sequence[str]:
        """Of the node's own Python, for its worker."""
        rented = f"--price-class={wish.price_class}", f"--zone={wish.zone}"
        flags = *rented, "--data-listen={ip}:0", "--notice-file={notice}"
        return *self._command(self._settings, self._fleet.join, wish.name)[1:], *flags
