"""Machines of a Ray cluster of several nodes on this machine, with stand-ins for the worker."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
from provider_contract import Case, ProviderContract
from ray_cases import RayNodes, ray_nodes

from spotjax.config import ServeConfig
from spotjax.fleet.providers.provider import FleetIdentity, Provider
from spotjax.fleet.providers.ray import RayConfig, RayOffer, RayProvider

SPOT = RayOffer(type="small", price=0.5)
DEMAND = RayOffer(type="small", price_class="on_demand", price=2.0)
PROGRAM = ("-S", "-c", "import signal; signal.pause()")
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayNodes]:
    with ray_nodes() as cluster:
        cluster.add(3)
        cluster.add(2)
        yield cluster


class TestContract(ProviderContract):
    """See ``ProviderContract``."""

    @pytest.fixture
    async def case(self, nodes: RayNodes) -> AsyncIterator[Case]:
        opened: list[RayProvider] = []

        async def open_(fleet: FleetIdentity) -> Provider:
            config = RayConfig(address=nodes.address, offers=(SPOT, DEMAND), poll_seconds=0.1)
            opened.append(RayProvider(config, fleet, ServeConfig(parameter_store="off"), program=PROGRAM))
            return opened[-1]

        yield (case := Case(open_))
        for provider in opened:
            for machine in await provider.list():
                await provider.release(machine.name)
            await case.until(provider, lambda m: not m)
            await provider.close()
