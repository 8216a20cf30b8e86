"""A cloud's metadata server says that a machine is taken: real processes, and no token is lost or said twice."""

from __future__ import annotations

import asyncio
import dataclasses
import subprocess
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from live_cases import CONTROLLER, REQUESTS, SlowFleet, eventually, heard, load_on, more_tokens, said, worker_flags

from spotjax.fleet.status import FleetStatus
from spotjax.tools.load import answers
from spotjax.tools.metadata import MetadataProcess
from spotjax.tools.request_mix import Output
from spotjax.tools.service import CHANGE_SECONDS, running, serving

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]


@dataclasses.dataclass(frozen=True)
class Cloud:
    """One cloud's way to take a machine.

    Attributes:
      source: of the notice; also the name of the machine.
      module: its metadata server.
      order: that has it say so.
      values: of the order.
      said: part of the answer that says so.
    """

    source: str
    module: str
    order: str
    values: Mapping[str, Any]
    said: str


CLOCK_SECONDS = 0.02
"""An answer is on its way before it is noted down that it was written."""
GCE = Cloud("gce", "metadata_gce", "tell", {"key": "instance/preempted", "value": "TRUE"}, "TRUE")
CLOUDS = [
    GCE,
    Cloud("aws", "metadata_aws", "interrupt", {"seconds": 60}, '"action"'),
    Cloud("azure", "metadata_azure", "schedule", {"type": "Preempt", "seconds": 60}, '"Preempt"'),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def servers(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[dict[str, MetadataProcess]]:
    """A metadata server for each machine."""
    directory = tmp_path_factory.mktemp("metadata")
    servers = {cloud.source: MetadataProcess(cloud.module, directory) for cloud in CLOUDS}
    try:
        for server in servers.values():
            await server.start()
        yield servers
    finally:
        for server in servers.values():
            server.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(
    programs: Path, tmp_path_factory: pytest.TempPathFactory, servers: Mapping[str, MetadataProcess]
) -> AsyncIterator[SlowFleet]:
    """A machine of every cloud, which finds out by itself where it is, and one that stays."""
    flags = (*worker_flags(programs), "--instance-memory-bytes", "1000000000")
    controller = (*CONTROLLER, "--mesh", "1x4x2")
    fleet = SlowFleet(tmp_path_factory.mktemp("fleet"), ["stays", *servers], controller, flags)
    fleet.arguments_of |= {
        name: ("--notices", "auto", "--metadata-url", server.url) for name, server in servers.items()
    }
    fleet.arguments_of["azure"] += ("--acknowledge-notices",)
    async with running(fleet):
        await fleet.until("all are in the mesh", lambda status: serving(status) == set(fleet.names))
        for name in servers:
            tail = fleet.workers[name].tail
            await eventually("it knows its cloud", lambda: f"this machine is on {name}" in tail(1000))  # noqa: B023
        yield fleet


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def expected(fleet: SlowFleet) -> Mapping[str, Output]:
    return await answers(fleet.client, REQUESTS)


async def test_advice_is_known_maintenance_is_waited_for_and_a_notice_is_taken_back_while_tokens_flow(
    fleet: SlowFleet, expected: Mapping[str, Output], servers: Mapping[str, MetadataProcess]
) -> None:
    metadata = servers["gce"]
    async with load_on(fleet, expected) as load:
        since = len(fleet.events)
        await metadata.order("tell", key="instance/maintenance-event", value="MIGRATE_ON_HOST_MAINTENANCE")
        await fleet.until("the fleet is advised", lambda status: advised(status) == {"gce"})
        upcoming = '{"maintenance_status": "PENDING", "window_start_time": "2200-01-01T00:00:00Z"}'
        await metadata.order("tell", key="instance/upcoming-maintenance", value=upcoming)
        await metadata.order("tell", key="instance/maintenance-event", value="NONE")
        await fleet.until_said({"withdrawn"}, since)
        assert advised(await fleet.status()) == {"gce"}
        await metadata.order("tell", key="instance/upcoming-maintenance", value="{}")
        await fleet.until("all is well", lambda status: advised(status) == set())
        await more_tokens(load, 20)
        kinds = {str(event.fields["kind"]) for event in said(fleet, "notice", since)}
        assert kinds == {"rebalance", "maintenance"}
        assert not said(fleet, "lost", since) and not said(fleet, "switch", since)


@pytest.mark.parametrize("cloud", CLOUDS, ids=lambda cloud: cloud.source)
async def test_a_machine_that_its_cloud_takes_is_left_in_order(
    fleet: SlowFleet, expected: Mapping[str, Output], servers: Mapping[str, MetadataProcess], cloud: Cloud
) -> None:
    name, metadata = cloud.source, servers[cloud.source]
    async with load_on(fleet, expected, clients=4) as load:
        since, worker, began = len(fleet.events), fleet.workers[name], time.time()
        await fleet.until("requests run", lambda status: sum(replica.running for replica in status.replicas) >= 3)
        await metadata.order(cloud.order, **cloud.values)
        notice = await heard(fleet, "notice", since)
        try:
            assert await asyncio.to_thread(worker.wait, CHANGE_SECONDS) == 0
        except subprocess.TimeoutExpired:
            pytest.fail(f"the worker was not released:\n{fleet.story()}")
        await fleet.until_gone([name])
        switch, lost = await heard(fleet, "switch", since), await heard(fleet, "lost", since)
        await more_tokens(load, 40)
    assert {field: notice.fields[field] for field in ("instance", "source", "kind")} == {
        "instance": name, "source": cloud.source, "kind": "preempt",
    }  # fmt: skip
    told = await metadata.answered(cloud.said, began)
    assert told is not None, "it never said so"
    assert told - CLOCK_SECONDS <= notice.time <= switch.time <= lost.time, "the timeline"
    assert switch.fields["recomputed"] == 0
    assert lost.fields["notice_seconds"] == pytest.approx(lost.time - notice.time, abs=0.5)
    record = {record.source: record for record in (await fleet.status()).notices}[cloud.source]
    assert (record.given, record.left, record.taken) == (1, 1, 0)
    if cloud.source == "azure":
        assert "Started" in await azure_events(metadata), "it was not told that the machine is free"


async def azure_events(metadata: MetadataProcess) -> str:
    async with httpx.AsyncClient(trust_env=False) as client:
        url = f"{metadata.url}/metadata/scheduledevents?api-version=2020-07-01"
        return (await client.get(url, headers={"Metadata": "true"})).text


def advised(status: FleetStatus) -> set[str]:
    return {instance.name for instance in status.instances if instance.advised}
