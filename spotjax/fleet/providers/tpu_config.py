"""``[provider]`` with ``kind = "tpu"``: what may be asked of Cloud TPU, and as what."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from msgspec import Meta

from spotjax.bootstrap.options import BootstrapOptions
from spotjax.bootstrap.script import script
from spotjax.errors import ConfigError, ProviderRefused
from spotjax.fleet.providers.provider import FleetIdentity, Offer, ProviderConfig
from spotjax.fleet.providers.tpu_machines import require_name
from spotjax.meshes.instance import PriceClass

if TYPE_CHECKING:
    from spotjax.fleet.providers.tpu import TpuProvider

Script = Callable[[str, Offer], str]
"""The start-up script of the machine of that name, rented as that."""
ZONE = "^[a-z]+-[a-z]+[0-9]+-[a-z]$"
OWN_METADATA = ("startup-script", "spotjax-name", "spotjax-fleet", "spotjax-join", "spotjax-price")
"""Metadata of a node that the provider sets; ``spotjax-name`` and ``spotjax-join`` are for the start-up script."""
OWN_LABELS = ("spotjax-fleet", "spotjax-name", "spotjax-type")
LOOPBACK = re.compile(r"(localhost|127\.0\.0\.1|\[::1\]):[0-9]+")


class TpuOffer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A kind of slice that may be asked for: ``[[provider.offers]]``."""

    type: Annotated[
        str, Meta(pattern="^v[0-9]+[a-z]*-[0-9]+$", description="accelerator type, such as v5litepod-8 or v6e-16")
    ]
    zone: Annotated[str, Meta(pattern=ZONE, description="zone, such as europe-west4-b")]
    price_class: Annotated[PriceClass, Meta(description="spot, or on_demand (the guaranteed tier)")] = "spot"
    price: Annotated[float, Meta(ge=0, description="USD per hour of the whole slice, all hosts and chips")]
    topology: Annotated[
        str, Meta(pattern="^([0-9]+(x[0-9]+){1,2})?$", description="chips, such as 2x4; empty: what the type has")
    ] = ""
    runtime_version: Annotated[str, Meta(description="for this type; empty: the provider's")] = ""

    @property
    def offer(self) -> Offer:
        """The same for the fleet."""
        return Offer(self.type, self.zone, self.price_class, self.price)


class TpuConfig(ProviderConfig, frozen=True, tag="tpu"):
    """``[provider]`` with ``kind = "tpu"``."""

    project: Annotated[str, Meta(min_length=1, description="id of the project that pays")]
    offers: Annotated[tuple[TpuOffer, ...], Meta(min_length=1, description="slices that may be asked for, best first")]
    runtime_version: Annotated[str, Meta(min_length=1, description="TPU software version, such as v2-alpha-tpuv6e")]
    startup_script: Annotated[
        str, Meta(description="file with the script that each host runs at boot; empty: Spotjax's own, see bootstrap")
    ] = ""
    bootstrap: Annotated[
        dict[str, Any], Meta(description="options of spotjax bootstrap tpu, but for join, name, zone and price_class")
    ] = {}  # noqa: RUF012
    zones: Annotated[
        tuple[Annotated[str, Meta(pattern=ZONE)], ...],
        Meta(description="more zones in which machines of the fleet may be left, when offers there were taken out"),
    ] = ()
    network: Annotated[str, Meta(description="VPC network; empty: the project's default")] = ""
    subnetwork: Annotated[str, Meta(description="subnetwork; empty: that of the zone's region")] = ""
    external_ips: Annotated[bool, Meta(description="hosts have external addresses; if not, give the VPC Cloud NAT")] = (
        False
    )
    tags: Annotated[tuple[str, ...], Meta(description="network tags, for firewall rules")] = ()
    labels: Annotated[dict[str, str], Meta(description="more labels of the nodes")] = {}  # noqa: RUF012
    metadata: Annotated[dict[str, str], Meta(description="more metadata of the nodes")] = {}  # noqa: RUF012
    service_account: Annotated[str, Meta(description="e-mail; empty: the default compute service account")] = ""
    reservation: Annotated[
        str, Meta(description="projects/P/locations/Z/reservations/R that on-demand slices are taken from; empty: none")
    ] = ""
    wait_seconds: Annotated[
        float,
        Meta(ge=1, description="seconds after which a request that got nothing fails"),
    ] = 1800.0
    poll_seconds: Annotated[float, Meta(gt=0, description="seconds between two looks at all zones")] = 10.0
    call_seconds: Annotated[float, Meta(gt=0, description="seconds to wait for the answer to a call")] = 30.0
    settle_seconds: Annotated[
        float, Meta(ge=0, description="seconds for which a new request is watched for an error that comes at once")
    ] = 3.0
    endpoint: Annotated[str, Meta(description="HOST:PORT of the API, such as a private endpoint; empty: Google's")] = ""
    insecure: Annotated[
        bool, Meta(description="no TLS and no credentials: for a stand-in on this machine, and refused elsewhere")
    ] = False

    def check(self) -> None:
        """Raises ConfigError for what fields say against each other."""
        keys = [(offer.type, offer.zone, offer.price_class) for offer in self.offers]
        if len(set(keys)) < len(keys):
            raise ConfigError("offers: two are of the same type, zone and price_class; give each one once")
        for own, given, what in ((OWN_METADATA, self.metadata, "metadata"), (OWN_LABELS, self.labels, "labels")):
            if taken := sorted(set(own) & set(given)):
                raise ConfigError(f"{what}: {', '.join(taken)} is set by Spotjax; choose another name")
        if self.startup_script and self.bootstrap:
            raise ConfigError(f"bootstrap has no meaning beside startup_script ({self.startup_script})")
        if self.insecure and not LOOPBACK.fullmatch(self.endpoint):
            raise ConfigError(f"insecure: endpoint must be HOST:PORT of this machine, got {self.endpoint!r}")

    @property
    def all_zones(self) -> tuple[str, ...]:
        """Where machines of the fleet may be, in the order of the offers."""
        return tuple(dict.fromkeys([offer.zone for offer in self.offers] + list(self.zones)))

    async def open(self, fleet: FleetIdentity) -> TpuProvider:
        """Opens it.

        Raises:
          ConfigError: the fleet's name does not fit, two fields contradict each other, or there is no start-up script.
          ProviderRefused: this machine has no credentials for Google Cloud.
        """
        from spotjax.fleet.providers.tpu import TpuProvider, credentials, open_client

        self.check()
        try:
            require_name(fleet.name, f"{fleet.name}-99999")
        except ProviderRefused as problem:
            raise ConfigError(f"the fleet's name: {problem}") from problem
        scripts = await asyncio.to_thread(self._scripts, fleet.join)
        scripts("any", self.offers[0].offer)  # what is wrong with it is better known now
        rights = None if self.insecure else await credentials()
        return TpuProvider(self, fleet.name, fleet.join, scripts, open_client(self.endpoint, rights))

    def _scripts(self, join: str) -> Script:
        """The user's, which is the same for all machines, or one of ours for each."""
        if not self.startup_script:
            return partial(bootstrap_script, self.bootstrap, join)
        try:
            text = Path(self.startup_script).read_text()
        except (OSError, ValueError) as error:
            raise ConfigError(f"startup_script: cannot read {self.startup_script}: {error}") from error
        return lambda name, offer: text


def bootstrap_script(given: Mapping[str, Any], join: str, name: str, offer: Offer) -> str:
    """What ``spotjax bootstrap tpu`` writes for a machine.

    Raises:
      ConfigError: an option is unknown, out of range, or follows from the machine.
    """
    ours = {"join": join, "name": name, "zone": offer.zone, "price_class": offer.price_class}
    if taken := sorted(set(ours) & set(given)):
        raise ConfigError(f"bootstrap: {', '.join(taken)} follows from the machine that is asked for")
    try:
        options = msgspec.convert({**given, **ours}, BootstrapOptions)
    except msgspec.ValidationError as error:
        raise ConfigError(f"bootstrap: {error}") from error
    return script("tpu", options)
