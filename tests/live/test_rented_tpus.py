"""A controller rents its workers from a stand-in of Cloud TPU whose nodes are worker processes on this machine."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from live_cases import CONTROLLER, DONE_SECONDS, REQUESTS, load_on, more_tokens, worker_flags

from spotjax.fleet.status import FleetStatus
from spotjax.testing.tpu_service import order
from spotjax.tools.load import answers
from spotjax.tools.processes import Process, free_port
from spotjax.tools.service import SERVE, Service, ready, running

pytestmark = pytest.mark.timeout(300)
ZONE = "us-west4-a"
CAPACITY = """
[provider]
kind = "tpu"
project = "project-1"
runtime_version = "any"
endpoint = "{address}"
insecure = true
poll_seconds = 0.2

[provider.bootstrap]
settings = {{ insecure = true }}

[[provider.offers]]
type = "v5litepod-8"
zone = "us-west4-a"
price = 4.5

[capacity]
fleet = "rented"
least = 2
idle = 2
most = 2
on_demand = "never"
cost_per_hour = 20.0
action_seconds = 0.1
retry_seconds = 0.5
"""


class RentedFleet(Service):
    """A controller that rents its workers, and the cloud that it rents them from."""

    def __init__(self, directory: Path, controller: Sequence[str], worker: Sequence[str]) -> None:
        port = free_port("127.0.0.1")
        flags = ("--data-listen", "127.0.0.1:0", "--notices", "none", "--parameter-store", "off", *worker)
        host = f"exec {' '.join((*SERVE, *flags))} --join $NODE_JOIN --name $NODE_NAME 2>>{directory}/hosts.log"
        cloud = (sys.executable, "-m", "spotjax.testing.tpu_service", "--port", str(port), "--on-ready", host)
        self.cloud = Process("cloud", cloud, directory)
        self.cloud_address = f"127.0.0.1:{port}"
        (directory / "capacity.toml").write_text(CAPACITY.format(address=self.cloud_address))
        flags = ("--capacity", str(directory / "capacity.toml"), *controller)
        super().__init__(directory, flags, (), patience=DONE_SECONDS)

    def processes(self) -> list[Process]:
        """Controller and cloud; the cloud's nodes are below it."""
        return [self.server, self.cloud]

    async def tell_cloud(self, **what: Any) -> dict[str, Any]:
        """Sends the cloud an order; its answer has all states."""
        async with grpc.aio.insecure_channel(self.cloud_address) as channel:
            return await order(channel, **what)


@asynccontextmanager
async def rented(directory: Path, programs: Path) -> AsyncIterator[RentedFleet]:
    """A fleet of two slices that serves."""
    fleet = RentedFleet(directory, CONTROLLER, worker_flags(programs))
    async with running(fleet):
        await fleet.until("two members", lambda status: len(ready(status)) == 2 and status.ready)
        yield fleet


def knows_two(status: FleetStatus) -> bool:
    """Whether the controller counts two machines as members that stay, and no other ones."""
    return status.capacity is not None and [machine.standing for machine in status.capacity.machines] == ["up"] * 2


async def test_a_preempted_slice_is_replaced_and_a_controller_that_dies_finds_its_slices_again(
    programs: Path, tmp_path: Path
) -> None:
    """No token is lost."""
    async with rented(tmp_path, programs) as fleet:
        expected = await answers(fleet.client, REQUESTS)
        node = f"projects/project-1/locations/{ZONE}/nodes/rented--rented-0--1"
        assert (await fleet.tell_cloud(do="show"))["nodes"][node] == "READY"
        async with load_on(fleet, expected) as load:
            await fleet.tell_cloud(do="preempt", node=node)
            await fleet.until_gone(["rented-0"])
            await more_tokens(load, 40)
            await fleet.until("another member", lambda status: len(ready(status)) == 2 and status.ready)
            await more_tokens(load, 40)
            before = await fleet.tell_cloud(do="show")
            await fleet.kill_server()
            fleet.start_server()
            await fleet.until("both members again", lambda status: len(ready(status)) == 2 and status.ready)
            await fleet.until("both known to be rented", knows_two)
            await more_tokens(load, 40)
        states = await fleet.tell_cloud(do="show")
        assert sorted(states["requests"].values()) == ["ACTIVE"] * 2
        assert sorted(states["nodes"].values()) == ["READY"] * 2 and node not in states["nodes"]
        assert states == before, "nothing was rented twice, and nothing given back"
