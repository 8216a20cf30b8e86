"""Controllers that die at random points between and inside their calls to Cloud TPU, and what their successors find.

    python -m spotjax.tools.chaos_tpu --points 200 --processes 5

A controller wants some machines, in any of two zones, and asks for, replaces and gives back what it must. It dies
before a call is sent, after the call had its effect and before the answer, or with a call on its way that arrives when
its successor is at work. Machines are preempted meanwhile. The successor remembers nothing. Once it has come to rest
there must be as many slices as it wants, each known to it, none twice, and nothing else. Some controllers are processes
of their own that are killed (SIGKILL); the others end by an error that nothing catches.

The service is the stand-in of ``spotjax.testing.tpu_service``, over real gRPC; the real one was never asked.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc.aio
from google.cloud.tpu_v2 import CreateQueuedResourceRequest, DeleteQueuedResourceRequest, Node, TpuAsyncClient
from google.cloud.tpu_v2.services.tpu.transports import TpuGrpcAsyncIOTransport

from spotjax.errors import ProviderError
from spotjax.fleet.providers.provider import MachineState, Provider
from spotjax.fleet.providers.tpu import TpuProvider, open_client
from spotjax.fleet.providers.tpu_config import TpuConfig, TpuOffer
from spotjax.testing.tpu_cloud import Refused, TpuCloud
from spotjax.testing.tpu_service import TpuService, start

ZONES = ("us-west4-a", "europe-west4-b")
KIND = "v5litepod-8"
FLEET = "chaos"
BUSY_ROUNDS = 12
"""Rounds of a controller before it dies between two of them."""
CHANGING = (CreateQueuedResourceRequest, DeleteQueuedResourceRequest)
ROUNDS = 60
"""Rounds after which a controller must have come to rest."""
ALIVE = (MachineState.WAITING, MachineState.STARTING, MachineState.RUNNING)


class Crashed(BaseException):
    """The controller is dead from here on."""


class Doom(grpc.aio.UnaryUnaryClientInterceptor):
    """Lets a controller die at one of its calls.

    Args:
      call: which one, from 1 on.
      changing: only those count that change something.
      how: ``before`` it is sent; ``after`` its effect; ``late``: what it was to change is left for ``send_late``.
    """

    def __init__(self, call: int, changing: bool, how: str) -> None:
        self._left, self._changing, self._how = call, changing, how
        self._dead = False
        self.late: Any = None

    async def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        """Passes a call on, or ends it all."""
        self._left -= isinstance(request, CHANGING) or not self._changing
        if self._dead:
            raise Crashed  # the others of a controller that is dead already
        if self._left > 0:
            return await continuation(details, request)
        self._dead = True
        if self._how == "after":
            await (await continuation(details, request))
        elif self._how == "late":
            self.late = request
        raise Crashed


def send_late(cloud: TpuCloud, request: Any) -> None:
    """A dead controller's call arrives."""
    with contextlib.suppress(Refused):
        if isinstance(request, CreateQueuedResourceRequest):
            cloud.create_queued_resource(request)
        elif isinstance(request, DeleteQueuedResourceRequest):
            cloud.delete_queued_resource(request.name, request.force)


def config(address: str) -> TpuConfig:
    """What controllers may ask for."""
    return TpuConfig(
        project="chaos",
        runtime_version="v2-alpha-tpuv5-lite",
        offers=tuple(TpuOffer(type=KIND, zone=zone, price=4.5) for zone in ZONES),
        endpoint=address,
        insecure=True,
        settle_seconds=0.0,
    )


@contextlib.asynccontextmanager
async def controller(address: str, doom: Doom | None = None) -> AsyncIterator[Provider]:
    """A provider without any memory; with a doom it dies of it."""
    if doom is None:
        client = open_client(address, None)
    else:
        channel = grpc.aio.insecure_channel(address, interceptors=[doom])
        client = TpuAsyncClient(transport=TpuGrpcAsyncIOTransport(channel=channel))
    provider = TpuProvider(config(address), FLEET, "127.0.0.1:8470", lambda name, offer: "", client)
    try:
        yield provider
    finally:
        await provider.close()


async def reconcile(provider: Provider, wanted: int, draw: random.Random) -> bool:
    """One round: releases what is dead or too much, asks for what is missing. Whether there was nothing to do."""
    machines = await provider.list()
    names = {f"w-{number}" for number in range(wanted)}
    alive = {machine.name for machine in machines if machine.state in ALIVE}
    release = [m.name for m in machines if m.name not in alive and m.state is not MachineState.STOPPING]
    release += sorted(alive - names)
    for name in release:
        with contextlib.suppress(ProviderError):
            await provider.release(name)
    offers = await provider.offers()
    for name in sorted(names - alive - set(release)):
        with contextlib.suppress(ProviderError):
            await provider.request(name, draw.choice(offers))
    return not release and all(m.state is MachineState.RUNNING for m in machines) and alive == names


@dataclass
class Chaos:
    """One run.

    Attributes:
      cloud: the account.
      address: of the service.
      draw: all chance.
      crashes: how often controllers died, by how.
      preempted: machines that were taken.
    """

    cloud: TpuCloud
    address: str
    draw: random.Random
    crashes: dict[str, int] = field(default_factory=dict)
    preempted: int = 0

    async def crash(self, wanted: int) -> Any:
        """A controller works until it dies, which it does sooner or later. Returns: its call that is on its way."""
        how = self.draw.choice(("before", "after", "late"))
        changing = self.draw.random() < 0.7
        doom = Doom(self.draw.randint(1, 5 if changing else 24), changing, how)
        try:
            async with controller(self.address, doom) as provider:
                for _ in range(BUSY_ROUNDS):
                    await reconcile(provider, wanted, self.draw)
                    self.time_passes()
            how = "between"
        except Crashed:
            pass
        self.crashes[how] = self.crashes.get(how, 0) + 1
        return doom.late

    async def settle(self, wanted: int, late: Any = None) -> None:
        """The successor works until nothing is to do; then everything must be as it knows it.

        Raises:
          AssertionError: it is not.
        """
        arrives = self.draw.randint(0, 8)
        async with controller(self.address) as provider:
            for number in range(ROUNDS):
                if late is not None and number == arrives:
                    send_late(self.cloud, late)
                    late = None
                if await reconcile(provider, wanted, self.draw) and late is None and self._is_at_rest():
                    break
                self.cloud.advance()
            self.check({machine.name for machine in await provider.list()}, wanted)

    def time_passes(self) -> None:
        """The cloud goes on; now and then it takes a machine."""
        for _ in range(self.draw.randint(0, 3)):
            self.cloud.advance()
        ready = sorted(name for name, node in self.cloud.nodes.items() if node.state == Node.State.READY)
        if ready and self.draw.random() < 0.15:
            self.cloud.preempt(self.draw.choice(ready))
            self.preempted += 1

    def _is_at_rest(self) -> bool:
        states = {request.state.state.name for request in self.cloud.requests.values()}
        return states <= {"ACTIVE"} and len(self.cloud.nodes) == len(self.cloud.requests)

    def check(self, known: set[str], wanted: int) -> None:
        """Raises AssertionError unless what is there is what is wanted, and what a controller knows."""
        there = sorted(name.rpartition("/")[2] for name in self.cloud.nodes)
        names = [node.partition("--")[2].rpartition("--")[0] for node in there]
        requests = {name: each.state.state.name for name, each in self.cloud.requests.items()}
        what = f"wanted {wanted}, known {sorted(known)}, nodes {there}, requests {requests}"
        assert len(names) == len(set(names)) == wanted, f"not the machines that are wanted, or one twice: {what}"
        assert set(names) == known, f"something runs that nobody knows: {what}"
        assert len(requests) == wanted and set(requests.values()) <= {"ACTIVE"}, f"something is left: {what}"


@contextlib.asynccontextmanager
async def account(seed: int, step: float = 0.0) -> AsyncIterator[Chaos]:
    """An account with more slices than are ever wanted, and pages of two."""
    cloud = TpuCloud({(zone, KIND): 12 for zone in ZONES}, time.time, step)
    server, address = await start(TpuService(cloud, page=2))
    try:
        yield Chaos(cloud, address, random.Random(seed))
    finally:
        await server.stop(0)


async def crash_points(points: int, seed: int, report: Callable[[str], None] = lambda line: None) -> Chaos:
    """So many controllers die, and each has a successor that must put everything in order."""
    async with account(seed) as chaos:
        for point in range(1, points + 1):
            late = await chaos.crash(chaos.draw.randint(0, 4))
            await chaos.settle(chaos.draw.randint(0, 4), late)
            if point % 50 == 0:
                report(f"{point} crashes, {chaos.preempted} preemptions: nothing lost, nothing double")
        return chaos


async def killed_processes(count: int, seed: int) -> Chaos:
    """The same with controllers that are processes, killed at any moment."""
    async with account(seed) as chaos:
        for number in range(count):
            command = (sys.executable, "-m", "spotjax.tools.chaos_tpu", "--controller", chaos.address)
            process = await asyncio.create_subprocess_exec(
                *command, "--wanted", str(chaos.draw.randint(1, 4)), "--seed", str(number),
                stdout=asyncio.subprocess.PIPE,
            )  # fmt: skip
            assert process.stdout is not None
            await process.stdout.readline()  # it has begun
            until = time.monotonic() + chaos.draw.random() * 0.3
            while time.monotonic() < until:
                await asyncio.sleep(0.005)
                chaos.time_passes()
            process.kill()
            await process.wait()
            chaos.crashes["killed"] = chaos.crashes.get("killed", 0) + 1
            await chaos.settle(chaos.draw.randint(0, 4))
        return chaos


async def be_controller(address: str, wanted: int, seed: int) -> None:
    """Works until it is killed; wants one machine more or less now and then, so that there is always something."""
    draw = random.Random(seed)
    print("begun", flush=True)
    async with controller(address) as provider:
        while True:
            with contextlib.suppress(ProviderError):
                await reconcile(provider, max(0, wanted + draw.randint(-1, 1)), draw)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=200, help="controllers that die at a call")
    parser.add_argument("--processes", type=int, default=5, help="controllers that are killed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--controller", metavar="ADDRESS", help="be one that works until it is killed")
    parser.add_argument("--wanted", type=int, default=2, help="machines that it wants")
    arguments = parser.parse_args()
    if arguments.controller:
        asyncio.run(be_controller(arguments.controller, arguments.wanted, arguments.seed))
        return
    began = time.monotonic()
    points = asyncio.run(crash_points(arguments.points, arguments.seed, print))
    processes = asyncio.run(killed_processes(arguments.processes, arguments.seed))
    shown = ", ".join(f"{count} {how}" for how, count in sorted((points.crashes | processes.crashes).items()))
    taken = points.preempted + processes.preempted
    print(f"{shown}; {taken} preemptions; {time.monotonic() - began:.1f} s: nothing lost, nothing double")


if __name__ == "__main__":
    main()
