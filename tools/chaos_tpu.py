"""Controllers that die at random points while they keep a fleet of TPU slices, and what their successors make of it.

    python -m spotjax.tools.chaos_tpu --points 200 --seed 0

Each is the real capacity loop with its ledger on disk and the real provider. It wants some machines, spot in two zones
and on demand in one, and dies before a call is sent, after its effect, with the call on its way that arrives when the
successor is at work, or before, in and after a write of its ledger. Machines are preempted, zones run out, requests
fail. The successor has the ledger, which is now and then lost with its disk. Once it has come to rest there must be as
many slices as it wants, each in its ledger, none twice, and nothing else. At no second may more be paid than the caps
allow, and the ledger must have counted at least what the stand-in has.

The service is the stand-in of ``spotjax.testing.tpu_service``, over real gRPC; the real one was never asked. Time
jumps.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import random
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import grpc.aio
import msgspec
from google.cloud.tpu_v2 import CreateQueuedResourceRequest, DeleteQueuedResourceRequest, Node, TpuAsyncClient
from google.cloud.tpu_v2.services.tpu.transports import TpuGrpcAsyncIOTransport
from google.rpc.status_pb2 import Status

from spotjax.fleet.capacity.file import CapacitySettings
from spotjax.fleet.capacity.ledger import DAY, counted
from spotjax.fleet.capacity.ledger_file import NAME
from spotjax.fleet.providers.provider import Provider
from spotjax.fleet.providers.tpu import TpuProvider
from spotjax.fleet.providers.tpu_config import TpuConfig, TpuOffer
from spotjax.meshes.instance import PriceClass
from spotjax.testing.tpu_cloud import Refused, TpuCloud
from spotjax.testing.tpu_service import TpuService, start
from spotjax.tools.controller_deaths import EPOCH, Bill, Controller, Crashed, Doom, JumpingLoop, Workers

ZONES = ("us-west4-a", "europe-west4-b")
KIND = "v5litepod-8"
OFFERS: tuple[tuple[str, PriceClass, float], ...] = (
    (ZONES[0], "spot", 4.5),
    (ZONES[1], "spot", 4.7),
    (ZONES[0], "on_demand", 9.6),
)
FLEET = "chaos"
LIMITS = CapacitySettings(
    fleet=FLEET, most=8, cost_per_hour=30.0, cost_per_day=60.0, idle_seconds=0.0, shrink_seconds=0.0, join_seconds=90.0,
    return_seconds=40.0, retry_seconds=5.0, most_retry_seconds=20.0, stop_seconds=300.0,
)  # fmt: skip
CHANGING = (CreateQueuedResourceRequest, DeleteQueuedResourceRequest)
BUSY_SECONDS = 150.0
"""After which a controller dies that has not met its point."""
REST_SECONDS = 1800.0
"""After which its successor must have come to rest."""
STAYS_SECONDS = 20.0
"""For which it must remain so."""
SOON_SECONDS = 25.0
"""After which a call on its way arrives; the caps need hold only for those: a ledger waits 30 s for a machine."""


class Dying(grpc.aio.UnaryUnaryClientInterceptor):
    """Lets a controller die at one of its calls."""

    def __init__(self, doom: Doom, cloud: TpuCloud, loop: JumpingLoop) -> None:
        self._doom, self._cloud, self._loop = doom, cloud, loop

    async def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        """Passes a call on, or ends it all."""
        changes = isinstance(request, CHANGING)
        strikes = self._doom.strikes("change" if changes else "look")
        if strikes and self._doom.how == "late" and changes:
            self._doom.late = partial(send_late, self._cloud, request)
        if strikes and self._doom.how != "after":
            raise Crashed
        with self._loop.calling():
            call = await continuation(details, request)
            with contextlib.suppress(grpc.RpcError):
                await call
        if self._doom.dead.is_set():
            raise Crashed
        return call


def send_late(cloud: TpuCloud, request: Any) -> None:
    """A dead controller's call arrives."""
    with contextlib.suppress(Refused):
        if isinstance(request, CreateQueuedResourceRequest):
            cloud.create_queued_resource(request)
        elif isinstance(request, DeleteQueuedResourceRequest):
            cloud.delete_queued_resource(request.name, request.force)


@dataclass
class Chaos:
    """One run.

    Attributes:
      cloud: the account.
      address: of the service.
      loop: time.
      directory: of the ledger.
      draw: all chance.
      bill: what is really paid.
      crashes: how often controllers died, by what they did.
      preempted: machines that were taken.
      lost: disks.
      capped: how often the day's money was spent.
      calm: nothing is taken and nothing fails.
      world: what goes on by itself; ends only by a cap that was exceeded.
    """

    cloud: TpuCloud
    address: str
    loop: JumpingLoop
    directory: Path
    draw: random.Random
    bill: Bill = field(default_factory=lambda: Bill(LIMITS.cost_per_hour, LIMITS.cost_per_day))
    crashes: dict[str, int] = field(default_factory=dict)
    preempted: int = 0
    lost: int = 0
    capped: int = 0
    calm: bool = True

    def __post_init__(self) -> None:
        self.workers = Workers(self._running, self.draw)
        self.world = asyncio.create_task(self._world())

    @property
    def wall(self) -> float:
        """Unix seconds."""
        return EPOCH + self.loop.now

    def controller(self, wanted: int, doom: Doom) -> Controller:
        """A controller on what is on disk."""
        settings = msgspec.structs.replace(LIMITS, least=max(1, wanted), idle=wanted)
        return Controller(
            settings, self.provider(doom), self.directory, self.workers, doom, self.draw.randint(0, 2**32)
        )

    def provider(self, doom: Doom) -> Provider:
        """Of a controller."""
        channel = grpc.aio.insecure_channel(self.address, interceptors=[Dying(doom, self.cloud, self.loop)])
        config = TpuConfig(
            project="chaos", runtime_version="v2-alpha-tpuv5-lite", endpoint=self.address, insecure=True,
            settle_seconds=0.0,
            offers=tuple(TpuOffer(type=KIND, zone=zone, price_class=kind, price=usd) for zone, kind, usd in OFFERS),
        )  # fmt: skip
        client = TpuAsyncClient(transport=TpuGrpcAsyncIOTransport(channel=channel))
        return TpuProvider(config, FLEET, "127.0.0.1:8470", lambda name, offer: "", client)

    async def crash(self, wanted: int) -> Callable[[], None] | None:
        """A controller works until it dies, which it does sooner or later. Returns: its call that is on its way."""
        what, how = (
            self.draw.choice(("change", "change", "write", "any")),
            self.draw.choice(("before", "after", "late")),
        )
        doom = Doom(what, self.draw.randint(1, {"change": 5, "write": 12, "any": 60}[what]), how)
        self.calm = False
        doomed = await self.controller(wanted, doom).until_dead(BUSY_SECONDS)
        self.calm = True
        kind = f"{how} {what}" if doomed else "between"
        self.crashes[kind] = self.crashes.get(kind, 0) + 1
        self.cloud.failing.clear()
        self.cloud.capacity.update({(zone, KIND): 12 for zone in ZONES})
        return doom.late

    async def settle(self, wanted: int, late: Callable[[], None] | None = None) -> None:
        """The successor works until nothing is to do; then everything must be as it knows it.

        Raises:
          AssertionError: it is not.
        """
        if late is not None:
            very = self.draw.random() < 0.2
            self.bill.excused |= very
            self.loop.call_later(self.draw.uniform(0, 4 * SOON_SECONDS if very else SOON_SECONDS), late)
        soonest = self.loop.now + (4 * SOON_SECONDS if late is not None else 0.0)
        controller = self.controller(wanted, Doom())
        until, rests = self.loop.now + REST_SECONDS, 0.0
        while rests < STAYS_SECONDS:
            await asyncio.sleep(1.0)
            if self.world.done():
                self.world.result()
            problem = self.problem(controller, wanted)
            rests = rests + 1.0 if not problem and self.loop.now > soonest else 0.0
            assert self.loop.now < until, problem
        ledger = counted(controller.keeper.ledger, self.wall, (), {})
        assert ledger.total >= self.bill.spent() - 1e-6, f"{self.bill.spent()} USD were spent, the ledger has {ledger}"
        await controller.kill()
        self.bill.excused &= self.bill.spent(int(self.wall // DAY)) > LIMITS.cost_per_day
        if not self.prices() and self.spent_up(controller):
            self.capped += 1
            self.loop.now = (self.wall // DAY + 1) * DAY - EPOCH  # nothing can be had before midnight

    @staticmethod
    def spent_up(controller: Controller) -> bool:
        """Whether nothing more may be rented today."""
        status = controller.loop.status()
        return "spent today" in status.waiting or (status.most_per_day - status.spent_today < 5.0)

    def lose_disk(self) -> None:
        """The ledger is gone, and with it what machines have cost that are gone."""
        self.lost += 1
        (self.directory / NAME).unlink(missing_ok=True)
        self.bill.forget(self.prices())
        self.bill.excused = True

    def problem(self, controller: Controller, wanted: int) -> str:
        """What is not as it must be; empty if all is."""
        nodes = sorted(name.rpartition("/")[2] for name in self.cloud.nodes)
        names = [name_of(node) for node in nodes]
        known = set(controller.keeper.ledger.entries)
        requests = {name.rpartition("/")[2]: each.state.state.name for name, each in self.cloud.requests.items()}
        what = (
            f"wanted {wanted}, ledger {sorted(known)}, nodes {nodes}, requests {requests}, {controller.loop.status()}"
        )
        if len(names) != len(set(names)) or len(names) > wanted:
            return f"one twice, or too many: {what}"
        if len(names) < wanted and not self.spent_up(controller):
            return f"too few: {what}"
        if set(names) != known:
            return f"something runs that nobody knows, or is known and does not run: {what}"
        if set(requests) != set(nodes) or not set(requests.values()) <= {"ACTIVE"}:
            return f"something is left: {what}"
        return ""

    def prices(self) -> Mapping[str, float]:
        """USD per hour of everything that is there, by life."""
        prices = {(zone, kind): usd for zone, kind, usd in OFFERS}
        return {
            f"{name} {node.create_time}": prices[name.split("/")[3], "spot" if self._is_spot(node) else "on_demand"]
            for name, node in self.cloud.nodes.items()
        }

    async def _world(self) -> None:
        """The cloud goes on, and is paid; while controllers die it takes machines, runs out of them, and fails."""
        while True:
            await asyncio.sleep(1.0)
            self.bill.pay(self.prices(), self.wall - 1.0, 1.0)
            self.cloud.advance()
            if self.calm:
                continue
            spot = sorted(n for n, node in self.cloud.nodes.items() if node.state == Node.State.READY)
            if spot and self.draw.random() < 0.02:
                self.cloud.preempt(self.draw.choice(spot))
                self.preempted += 1
            if self.draw.random() < 0.01:
                self.cloud.capacity[self.draw.choice(ZONES), KIND] = self.draw.choice((0, 0, 1, 12))
            if self.draw.random() < 0.01:
                self.cloud.failing.append(
                    Status(code=grpc.StatusCode.RESOURCE_EXHAUSTED.value[0], message="no capacity")
                )

    def _running(self) -> Mapping[str, tuple[str, bool]]:
        return {
            f"{name} {node.create_time}": (name_of(name), not self._is_spot(node))
            for name, node in self.cloud.nodes.items()
            if node.state == Node.State.READY
        }

    def _is_spot(self, node: Node) -> bool:
        queued = self.cloud.requests.get(node.queued_resource)
        return bool(node.scheduling_config.spot) if queued is None else "spot" in queued


def name_of(node: str) -> str:
    """The machine's name in a node's."""
    return node.rpartition("/")[2].partition("--")[2].rpartition("--")[0]


@contextlib.asynccontextmanager
async def account(seed: int, directory: Path) -> AsyncIterator[Chaos]:
    """An account with more slices than are ever wanted, and pages of two."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, JumpingLoop), "in time that jumps"
    cloud = TpuCloud({(zone, KIND): 12 for zone in ZONES}, lambda: EPOCH + loop.now, 2.0)
    server, address = await start(TpuService(cloud, page=2))
    chaos = Chaos(cloud, address, loop, directory, random.Random(seed))
    try:
        yield chaos
    finally:
        chaos.world.cancel()
        await asyncio.gather(chaos.world, return_exceptions=True)
        await server.stop(0)


async def crash_points(
    points: int, seed: int, directory: Path, report: Callable[[str], None] = lambda line: None
) -> Chaos:
    """So many controllers die, and each has a successor that must put everything in order."""
    async with account(seed, directory) as chaos:
        for point in range(1, points + 1):
            late = await chaos.crash(chaos.draw.randint(0, 4))
            if chaos.draw.random() < 0.1:
                chaos.lose_disk()
            await chaos.settle(chaos.draw.randint(0, 4), late)
            if point % 50 == 0:
                report(
                    f"{point} crashes, {chaos.preempted} preemptions, {chaos.lost} disks: {chaos.bill.dearest} USD/h"
                )
        return chaos


def run(points: int, seed: int, report: Callable[[str], None] = lambda line: None) -> Chaos:
    """The same in a directory and an event loop of its own."""
    with tempfile.TemporaryDirectory() as directory, asyncio.Runner(loop_factory=JumpingLoop) as runner:
        return runner.run(crash_points(points, seed, Path(directory), report))


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=200, help="controllers that die")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.getLogger("spotjax").setLevel(logging.CRITICAL + 1)
    began = time.monotonic()
    chaos = run(arguments.points, arguments.seed, print)
    shown = ", ".join(f"{count} {how}" for how, count in sorted(chaos.crashes.items()))
    print(
        f"{shown}; {chaos.preempted} preemptions, {chaos.lost} disks lost, at most {chaos.bill.dearest:g} of "
        f"{LIMITS.cost_per_hour:g} USD per hour, {chaos.capped} times the day's money was spent; "
        f"{time.monotonic() - began:.0f} s: nothing lost, nothing double"
    )


if __name__ == "__main__":
    main()
