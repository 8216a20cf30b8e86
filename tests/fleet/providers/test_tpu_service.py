"""The stand-in of Cloud TPU as a process, whose nodes are processes."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.api_core.exceptions import FailedPrecondition, InvalidArgument, NotFound
from tpu_cases import HERE, SPOT, Account, account, config_for, plain

from spotjax.fleet.providers.tpu import TpuProvider, open_client
from spotjax.testing.tpu_service import order

SECONDS = 60


@pytest.fixture
async def there() -> AsyncIterator[Account]:
    async with account() as it:
        yield it


async def until(ask: Callable[[], Any], holds: Callable[[Any], bool]) -> Any:
    """Asks until it holds."""
    async with asyncio.timeout(SECONDS):
        while not holds(answer := await ask()):
            await asyncio.sleep(0.02)
    return answer


async def test_a_node_is_a_process_that_ends_with_it(tmp_path: Path) -> None:
    command = f"echo $NODE_NAME $NODE_JOIN $$ >> {tmp_path}/began; exec sleep 600"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "spotjax.testing.tpu_service", "--capacity", f"{HERE}:v5litepod-8:2",
        "--step", "0.01", "--on-ready", command, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    address = (await process.stdout.readline()).decode().strip()
    config = config_for(address, offers=(SPOT,))
    provider = TpuProvider(config, "fleet", "10.0.0.1:8470", plain, open_client(address, None))
    try:
        await provider.request("a", SPOT.offer)
        await until(provider.list, lambda machines: machines[0].state == "running")

        async def began() -> list[str]:
            return (tmp_path / "began").read_text().split() if (tmp_path / "began").exists() else []

        name, join, pid = await until(began, lambda words: len(words) == 3)
        assert (name, join) == ("a", "10.0.0.1:8470") and Path(f"/proc/{pid}").exists()
        async with grpc.aio.insecure_channel(address) as channel:
            node = f"projects/project-1/locations/{HERE}/nodes/fleet--a--1"
            states = await order(channel, do="preempt", node=node)
            assert states["nodes"] == {node: "PREEMPTED"}
            await until(provider.list, lambda machines: machines[0].state == "preempted")
            await until(lambda: order(channel, do="show"), lambda states: not states["nodes"])
        assert not Path(f"/proc/{pid}").exists()
    finally:
        await provider.close()
        process.terminate()
        await process.wait()


@pytest.mark.parametrize(
    ("what", "problem"), [({"do": "fly"}, "cannot fly"), ({"do": "preempt", "node": "no/such"}, "was not found")]
)
async def test_an_order_that_makes_no_sense_is_refused(what: dict[str, str], problem: str) -> None:
    async with account() as there, grpc.aio.insecure_channel(there.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError, match=problem):
            await order(channel, **what)


async def test_orders_make_faults_change_health_and_capacity(there: Account) -> None:
    async with grpc.aio.insecure_channel(there.address) as channel, there.provider() as provider:
        await order(channel, do="capacity", zone=HERE, type="v5litepod-8", count=1)
        assert there.cloud.capacity[HERE, "v5litepod-8"] == 1
        await there.running(provider, "a")
        node = f"{there.parent()}/nodes/fleet--a--1"
        await order(channel, do="health", node=node, health="UNHEALTHY_MAINTENANCE", why="soon")
        (machine,) = await provider.list()
        assert machine.detail == "node READY, UNHEALTHY_MAINTENANCE: soon"
        await order(channel, do="fault", method="ListNodes", code="INTERNAL", times=2)
        assert there.service.faults[0].times == 2


async def test_it_is_as_strict_as_the_service(there: Account) -> None:
    client = open_client(there.address, None)
    parent = there.parent()
    with pytest.raises(NotFound, match="was not found"):
        await client.list_nodes(parent="projects/project-1/locations/nowhere-1")
    with pytest.raises(InvalidArgument, match="Invalid resource id"):
        await client.create_queued_resource(parent=parent, queued_resource={}, queued_resource_id="No_Id")
    with pytest.raises(InvalidArgument, match="one node_spec"):
        await client.create_queued_resource(parent=parent, queued_resource={}, queued_resource_id="id")
    async with there.provider() as provider:
        await there.running(provider, "a")
    with pytest.raises(FailedPrecondition, match="cannot be deleted in state ACTIVE"):
        await client.delete_queued_resource(name=f"{parent}/queuedResources/fleet--a--1")
    for ask in (client.get_node, client.get_queued_resource):
        with pytest.raises(NotFound):
            await ask(name=f"{parent}/x/none")
    node = await client.get_node(name=f"{parent}/nodes/fleet--a--1")
    assert node.queued_resource == f"{parent}/queuedResources/fleet--a--1" and node.health.name == "HEALTHY"
    await client.transport.close()  # type: ignore[no-untyped-call]
