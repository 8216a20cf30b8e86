"""A controller that buys its own capacity, with processes as machines: grows, replaces, survives its own death."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import pytest
import pytest_asyncio
from live_cases import CONTROLLER, REQUESTS, load_on, more_tokens, said

from spotjax.fleet.status import CapacityStatus, FleetStatus
from spotjax.tools.load import answers
from spotjax.tools.local_fleet import ChildrenFleet
from spotjax.tools.request_mix import Output
from spotjax.tools.service import ready, running

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]
FILE = """
[provider]
kind = "local"
most = 6
[provider.worker]
devices_per_instance = 1
instance_memory_bytes = 1073741824
grace_seconds = 5.0
compilation_cache = "{programs}"
[[provider.offers]]
type = "process"
price = 1.0

[capacity]
fleet = "live"
most = 2
on_demand = "never"
cost_per_hour = 5.0
window_seconds = 10.0
utilisation = 0.001  # a load that two processors can carry is to look like much
return_seconds = 5.0
"""
SECONDS = 120.0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(programs: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ChildrenFleet]:
    """A controller without a worker."""
    directory = tmp_path_factory.mktemp("capacity")
    file = directory / "capacity.toml"
    file.write_text(FILE.format(programs=programs))
    flags = (*CONTROLLER, "--capacity", str(file))
    fleet = ChildrenFleet(directory, flags, (), patience=SECONDS)
    async with running(fleet):
        yield fleet


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def expected(fleet: ChildrenFleet) -> Mapping[str, Output]:
    """What the fleet says undisturbed."""
    return await answers(fleet.client, REQUESTS)


def capacity(status: FleetStatus) -> CapacityStatus:
    assert status.capacity is not None
    return status.capacity


async def test_the_fleet_grows_with_its_load_replaces_what_is_killed_and_goes_on_after_its_controllers_death(
    fleet: ChildrenFleet, expected: Mapping[str, Output]
) -> None:
    async with load_on(fleet, expected, clients=4) as load:
        await fleet.until("two instances", lambda status: len(ready(status)) == 2, SECONDS)
        before = await fleet.status()
        assert {machine.standing for machine in capacity(before).machines} == {"up"}
        assert capacity(before).cost_per_hour == 2.0 and capacity(before).wanted == 2

        killed = min(ready(before))
        await fleet.kill([killed])
        await fleet.until(
            "another one", lambda status: len(ready(status)) == 2 and killed not in ready(status), SECONDS
        )
        assert [event.fields["instance"] for event in said(fleet, "released", 0)] == [killed]
        await more_tokens(load, 20)

        spent, names = capacity(await fleet.status()).spent_today, {f"live-{number}" for number in range(3)}
        account = fleet.commit_log / "spending.json"
        assert set(json.loads(account.read_text())["entries"]) == ready(await fleet.status())
        await fleet.kill_server()
        fleet.start_server()
        await fleet.until("a new machine", lambda status: status.ready and bool(ready(status)), SECONDS)
        after = await fleet.status()
        assert not ready(after) & names, "no name is used again"
        assert capacity(after).spent_today >= spent > 0
        await more_tokens(load, 20)
        await fleet.until(
            "the old ones are accounted for",
            lambda status: not {machine.name for machine in capacity(status).machines} & names,
            SECONDS,
        )
    assert await fleet.stop() == 0
    assert fleet.left() == []
