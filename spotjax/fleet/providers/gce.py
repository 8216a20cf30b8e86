"""``[provider]`` with ``kind = "gce"``: what may be rented of Compute Engine, and as what.

Google's library is imported when the provider is opened: it is an extra.
"""

from __future__ import annotations

import asyncio
import re
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from spotjax.bootstrap.options import BootstrapOptions
from spotjax.bootstrap.script import script
from spotjax.errors import ConfigError
from spotjax.fleet.providers.provider import FleetIdentity, Offer, Provider, ProviderConfig
from spotjax.meshes.instance import PriceClass

LABEL = r"[a-z]([a-z0-9-]{0,30}[a-z0-9])?"
"""Names of fleets: what a label and the beginning of an instance's name can be."""
TEMPLATE = r"^(projects/[^/]+/)?(global|regions/[a-z0-9-]+)/instanceTemplates/[a-z]([a-z0-9-]*[a-z0-9])?\Z"
DECIDED = ("join", "name", "zone", "price_class")
"""Options of start-up scripts that follow from what is rented."""
MARGIN = 5.0
"""Seconds that a worker is gone before its machine."""


class GceOffer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A machine type: ``[[provider.offers]]``. What has no price is not rented."""

    type: Annotated[
        str, Meta(pattern=r"^[a-z0-9][a-z0-9-]{0,62}\Z", description="machine type, such as g2-standard-48")
    ]
    zones: Annotated[
        tuple[Annotated[str, Meta(pattern=r"^[a-z][a-z0-9-]+\Z")], ...],
        Meta(min_length=1, description="zones, the best one first"),
    ]
    spot_price: Annotated[float | None, Meta(description="USD per hour as spot")] = None
    on_demand_price: Annotated[float | None, Meta(description="USD per hour on demand")] = None
    template: Annotated[
        str, Meta(pattern=f"({TEMPLATE})|^\\Z", description="instance template; empty: that of the provider")
    ] = ""

    def offers(self) -> list[Offer]:
        """The same for the fleet."""
        prices: tuple[tuple[PriceClass, float | None], ...] = (
            ("spot", self.spot_price), ("on_demand", self.on_demand_price),
        )  # fmt: skip
        return [
            Offer(self.type, zone, price_class, price)
            for price_class, price in prices
            if price is not None
            for zone in self.zones
        ]


class GceConfig(ProviderConfig, frozen=True, tag="gce"):
    """``[provider]`` with ``kind = "gce"``."""

    project: Annotated[str, Meta(pattern=r"^[a-z0-9.:-]+\Z", description="id of the Google Cloud project")]
    template: Annotated[
        str,
        Meta(
            pattern=TEMPLATE,
            description="instance template with disk image, network, GPUs and service account, as "
            "global/instanceTemplates/NAME or regions/REGION/instanceTemplates/NAME",
        ),
    ]
    offers: Annotated[tuple[GceOffer, ...], Meta(min_length=1, description="what can be rented, the best first")]
    termination: Annotated[
        Literal["delete", "stop"],
        Meta(
            description="what Google does with a spot machine that it takes; one that is only stopped is deleted later"
        ),
    ] = "delete"
    notice_seconds: Annotated[
        Literal[0, 120] | None,
        Meta(description="notice before a spot machine is shut down, 0 or 120; without: as in the template"),
    ] = None
    bootstrap: Annotated[
        dict[str, Any],
        Meta(description="options of `spotjax bootstrap gce`; without: the template has a start-up script"),
    ] = {}  # noqa: RUF012
    poll_seconds: Annotated[float, Meta(gt=0, description="between two looks at the machines")] = 5.0
    call_seconds: Annotated[float, Meta(gt=0, description="for the answer to a call")] = 30.0
    settle_seconds: Annotated[
        float, Meta(ge=0, description="for which a request waits for an error; a later one is that of the machine")
    ] = 5.0
    operation_seconds: Annotated[
        float, Meta(gt=0, description="after which it is no longer asked what became of a request")
    ] = 900.0
    endpoint: Annotated[
        str, Meta(pattern=r"^(https://[^\s/]+)?\Z", description="of the API, such as a private one; empty: Google's")
    ] = ""

    def check(self, fleet: FleetIdentity) -> None:
        """Raises ConfigError for what fields say against each other, or cannot be for that fleet."""
        if not re.fullmatch(LABEL, fleet.name):
            raise ConfigError(
                f"a fleet on Compute Engine cannot be called {fleet.name!r}: use at most 32 of a-z, 0-9, -"
            )
        keys = [offer.key for offer in self.all_offers]
        if len(set(keys)) < len(keys):
            raise ConfigError("offers: two are of the same type, zone and price class; give each one once")
        if not keys:
            raise ConfigError("offers: none has a price, so nothing can be rented; give spot_price or on_demand_price")
        if any(offer.price < 0 for offer in self.all_offers):
            raise ConfigError("offers: a price is negative")
        if self.bootstrap:
            self.start_up_script(fleet, "name", self.all_offers[0])

    @property
    def all_offers(self) -> tuple[Offer, ...]:
        """Spot before on demand, else in the order of the configuration."""
        every = [offer for each in self.offers for offer in each.offers()]
        return tuple(sorted(every, key=lambda offer: offer.price_class != "spot"))

    def template_of(self, offer: Offer) -> str:
        """The full name of the template that it is made from."""
        own = next(each.template for each in self.offers if offer.key in {one.key for one in each.offers()})
        template = own or self.template
        return template if template.startswith("projects/") else f"projects/{self.project}/{template}"

    def start_up_script(self, fleet: FleetIdentity, name: str, offer: Offer) -> str:
        """What a machine runs when it boots; empty if the template says that.

        Raises:
          ConfigError: an option is unknown, out of range, or is not to be chosen.
        """
        if not self.bootstrap:
            return ""
        if taken := sorted(set(DECIDED) & set(self.bootstrap)):
            raise ConfigError(f"bootstrap: {', '.join(taken)} follows from what is rented")
        decided = {"join": fleet.join, "name": name, "zone": offer.zone, "price_class": offer.price_class}
        settings = dict(self.bootstrap.get("settings", {}))
        if self.notice_seconds and offer.price_class == "spot":
            settings.setdefault("notice_seconds", self.notice_seconds - MARGIN)
        try:
            options = msgspec.convert(self.bootstrap | decided | {"settings": settings}, BootstrapOptions)
        except msgspec.ValidationError as problem:
            raise ConfigError(f"bootstrap: {problem}") from problem
        return script("gce", options)

    async def open(self, fleet: FleetIdentity) -> Provider:
        """Opens it.

        Raises:
          ConfigError: fields contradict each other, or ``google-cloud-compute`` is not installed.
          ProviderRefused: this machine has no credentials for Google Cloud.
        """
        self.check(fleet)
        try:
            from spotjax.fleet.providers.gce_compute import Compute
            from spotjax.fleet.providers.gce_provider import GceProvider
        except ImportError as problem:
            raise ConfigError(
                f"provider gce needs google-cloud-compute ({problem}): pip install 'spotjax[gce]'"
            ) from problem
        compute = await asyncio.to_thread(Compute, self.project, self.call_seconds, self.endpoint)
        return GceProvider(self, fleet, compute)
