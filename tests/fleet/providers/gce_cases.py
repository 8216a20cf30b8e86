"""What tests of Compute Engine share: the service as a process of its own, and providers that talk to it."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
from google.auth.credentials import AnonymousCredentials

from spotjax.config import ServeConfig
from spotjax.fleet.providers.gce import GceConfig, GceOffer
from spotjax.fleet.providers.gce_compute import Compute
from spotjax.fleet.providers.gce_provider import GceProvider
from spotjax.fleet.providers.provider import FleetIdentity

HERE, THERE = "us-east1-b", "us-west1-a"
OFFERS = (
    GceOffer(type="g2-standard-4", zones=(HERE, THERE), spot_price=0.3, on_demand_price=0.9),
    GceOffer(type="g2-standard-8", zones=(THERE,), spot_price=0.5),
)


def identity(name: str = "fleet") -> FleetIdentity:
    return FleetIdentity(name, "10.0.0.1:8470", ServeConfig())


def config_for(**settings: Any) -> GceConfig:
    """Two zones, and looks that follow each other quickly."""
    given: dict[str, Any] = {
        "project": "project-1", "template": "global/instanceTemplates/worker", "offers": OFFERS, "poll_seconds": 0.5,
        "settle_seconds": 1.0, "termination": "stop", "call_seconds": 5.0,
    }  # fmt: skip
    return GceConfig(**(given | settings))


@dataclass
class Service:
    """The service as a process."""

    address: str
    client: httpx.Client

    def admin(self, what: str, **body: Any) -> dict[str, Any]:
        """Says what is to happen."""
        answer = self.client.post(f"/admin/{what}", json=body)
        assert answer.status_code == 200, answer.text
        said: dict[str, Any] = answer.json()
        return said

    def instances(self) -> dict[str, dict[str, Any]]:
        """What there is, by zone and name."""
        return {f"{each['zone'].rpartition('/')[2]}/{each['name']}": each for each in self.admin("state")["instances"]}

    def preempt(self, name: str) -> None:
        """Takes an instance, wherever it is."""
        where = next(place for place in self.instances() if place.endswith(f"/{name}"))
        self.admin("preempt", zone=where.partition("/")[0], name=name)

    def open(self, fleet: FleetIdentity | None = None, **settings: Any) -> GceProvider:
        """A new provider, with no memory of another one."""
        config, fleet = config_for(**settings), fleet or identity()
        config.check(fleet)
        compute = Compute(config.project, config.call_seconds, self.address, AnonymousCredentials())  # type: ignore[no-untyped-call]
        return GceProvider(config, fleet, compute, sleep=lambda seconds: asyncio.sleep(seconds / 25))

    @contextlib.asynccontextmanager
    async def provider(self, fleet: FleetIdentity | None = None, **settings: Any) -> AsyncIterator[GceProvider]:
        """The same, closed at the end."""
        provider = self.open(fleet, **settings)
        try:
            yield provider
        finally:
            await provider.close()


@contextlib.contextmanager
def service(**flags: float) -> Iterator[Service]:
    """Starts it."""
    given = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    command = [sys.executable, "-m", "spotjax.testing.gce_service", "--port=0", *given]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            address = process.stdout.readline().strip()
            with httpx.Client(base_url=address, trust_env=False) as client:
                yield Service(address, client)
        finally:
            process.terminate()
