"""What tests of the Cloud TPU provider share: an account, a server in front of it, and providers that talk to it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from spotjax.fleet.providers.provider import Machine, MachineState, Offer
from spotjax.fleet.providers.tpu import TpuProvider, open_client
from spotjax.fleet.providers.tpu_config import TpuConfig, TpuOffer
from spotjax.testing.tpu_cloud import TpuCloud
from spotjax.testing.tpu_service import TpuService, start

HERE, THERE = "us-west4-a", "europe-west4-b"
SPOT = TpuOffer(type="v5litepod-8", zone=HERE, price=4.5)
ELSEWHERE = TpuOffer(type="v5litepod-8", zone=THERE, price=5.0)
ON_DEMAND = TpuOffer(type="v5litepod-8", zone=HERE, price_class="on_demand", price=9.6)


def config_for(address: str, **settings: object) -> TpuConfig:
    """Two zones, one of them on demand, too."""
    given: dict[str, object] = {
        "project": "project-1",
        "offers": (SPOT, ELSEWHERE, ON_DEMAND),
        "runtime_version": "v2-alpha-tpuv5-lite",
        "endpoint": address,
        "insecure": True,
        "poll_seconds": 0.02,
        "settle_seconds": 0.0,
    }
    return TpuConfig(**(given | settings))  # type: ignore[arg-type]


def plain(name: str, offer: Offer) -> str:
    """A start-up script."""
    return "#!/bin/sh\n"


@dataclass
class Account:
    """One account and the service in front of it. Tests move it on, state by state."""

    cloud: TpuCloud
    service: TpuService
    address: str

    @contextlib.asynccontextmanager
    async def provider(self, fleet: str = "fleet", **settings: object) -> AsyncIterator[TpuProvider]:
        """A new provider, with no memory of another one."""
        config = config_for(self.address, **settings)
        provider = TpuProvider(config, fleet, "10.0.0.1:8470", plain, open_client(self.address, None))
        try:
            yield provider
        finally:
            await provider.close()

    async def until(self, provider: TpuProvider, holds: Callable[[dict[str, Machine]], bool]) -> dict[str, Machine]:
        """Moves the cloud on, state by state, until something holds of the machines."""
        for _ in range(50):
            if holds(there := {machine.name: machine for machine in await provider.list()}):
                return there
            self.cloud.advance()
        raise AssertionError(f"it never came to that; there are {there}")

    async def running(self, provider: TpuProvider, name: str, offer: Offer = SPOT.offer) -> Machine:
        """Asks for a machine and waits until it runs."""
        await provider.request(name, offer)
        there = await self.until(provider, lambda it: name in it and it[name].state is MachineState.RUNNING)
        return there[name]

    def parent(self, zone: str = HERE) -> str:
        """A zone's full name."""
        return f"projects/project-1/locations/{zone}"

    def states(self) -> dict[str, str]:
        """All requests by id."""
        return {name.rpartition("/")[2]: each.state.state.name for name, each in self.cloud.requests.items()}

    def node_states(self) -> dict[str, str]:
        """All nodes by id."""
        return {name.rpartition("/")[2]: each.state.name for name, each in self.cloud.nodes.items()}


@contextlib.asynccontextmanager
async def account(slices: int = 4, page: int = 50) -> AsyncIterator[Account]:
    """An account with so many slices in each of two zones."""
    cloud = TpuCloud({(HERE, "v5litepod-8"): slices, (THERE, "v5litepod-8"): slices}, time.time)
    service = TpuService(cloud, page)
    server, address = await start(service)
    try:
        yield Account(cloud, service, address)
    finally:
        await server.stop(0)
