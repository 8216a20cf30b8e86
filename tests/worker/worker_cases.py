"""A worker on real stages, whose peers are gone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
from serving_cases import BUCKETS, POSITIONS, shared_heads

from spotjax.errors import ConnectionLost, PeerUnreachable
from spotjax.meshes.instance import DeviceRef, Instance, InstanceType
from spotjax.meshes.layout import split_layers
from spotjax.meshes.placement import Placement
from spotjax.meshes.shape import MeshShape, Position
from spotjax.planner.holdings import Holdings
from spotjax.planner.links import Links as PlannedLinks
from spotjax.planner.migration import plan_migration
from spotjax.planner.needs import StackedNeeds, needs_of
from spotjax.protocol import control
from spotjax.reshard.host import Host
from spotjax.reshard.parameter_store import ParameterStore
from spotjax.worker.backup_store import BackupStore
from spotjax.worker.copies import Copies
from spotjax.worker.executor import StageExecutor
from spotjax.worker.memory import StoreMemory
from spotjax.worker.watchdog import Watchdog
from spotjax.worker.worker import Worker

SETUP = control.ModelSetup("shared heads", "print", "float32", 33, 8, POSITIONS, 4, 16, (1,))
KIND = InstanceType("box", 2, 1 << 40, 1e10, 1e10, 1e10, 1e9)


class Links:
    """Connects to everybody but the ``gone``."""

    controller = "controller:1"

    def __init__(self) -> None:
        self.addresses: dict[str, str] = {}
        self.onward: Any = ()
        self.gone: set[str] = set()
        self.connections: list[str] = []
        self.sent: list[Any] = []

    async def connect(self, instance: str) -> None:
        if instance in self.gone:
            raise ConnectionLost(f"{instance} does not answer")
        self.connections.append(instance)

    def send(self, *frame: Any) -> None:
        self.sent.append(frame)


class Peers:
    """Nobody is there to be read from."""

    addresses: Any = None
    epoch = 0

    def begin(self) -> None:
        """Reads are wanted."""

    def supersede(self) -> None:
        """They are not."""

    def read_pages(self, instance: str, *what: Any) -> None:
        raise PeerUnreachable(instance, "it is gone")

    def read_slice(self, source: DeviceRef, *what: Any) -> None:
        raise PeerUnreachable(source.instance, "it is gone")


class Case:
    """A worker that is instance a of a and b."""

    def __init__(self, directory: Path) -> None:
        model, weights = shared_heads()
        self.store = ParameterStore.open(directory, "a", "print")
        self.links, self.peers, memory = Links(), Peers(), StoreMemory(self.store)
        self.copies = Copies(BackupStore())
        self.host = Host(model, BUCKETS, weights, {"a": tuple(jax.devices()[:2])}, self.peers, memory)  # type: ignore[arg-type]
        self.host._compiled_for.add(1)  # no step runs here
        executor = StageExecutor("a", model, POSITIONS, self.links.send, lambda problem: None, Watchdog())
        self.worker = Worker(
            "a", SETUP, self.host, executor, self.peers, self.links, self.copies, self.store, memory,  # type: ignore[arg-type]
        )  # fmt: skip

    def prepare(
        self,
        number: int,
        placement: Placement,
        current: Placement | None = None,
        heirs: Mapping[int, int] = MappingProxyType({}),
    ) -> control.Prepare:
        spec = shared_heads()[0].spec
        needs = {placement.devices[p]: n for p, n in needs_of(spec, placement.shape, placement.layers, ()).items()}
        instances = [Instance(name, KIND) for name in "ab"]
        plan = plan_migration(needs, Holdings.of(spec, current, (), instances), PlannedLinks.of(instances))
        return control.Prepare(
            number,
            control.PlacementMessage.of(placement),
            control.PlacementMessage.of(current) if current is not None else None,
            tuple(
                control.Parts(device.index, dict(StackedNeeds.of(mine).parameters))
                for device, mine in needs.items()
                if device.instance == "a"
            ),
            tuple(transfer for transfer in plan.transfers if transfer.target.instance == "a"),
            dict(heirs),
            {},
            (),
            {"a": "a:1", "b": "b:1"},
            (),
        )

    async def adopt(self, placement: Placement, pipelines: tuple[str, ...]) -> control.Done:
        command = control.decode_from_controller(control.encode(self.prepare(1, placement)))
        loaded = await self.worker.carry_out(command)  # type: ignore[arg-type]
        await self.worker.carry_out(control.Switch(2, ()))
        await self.worker.carry_out(control.Adopt(3, pipelines, "", 0))
        return loaded


def two_replicas(epoch: int = 1) -> Placement:
    """Replica 0 on a and b, replica 1 on b and a."""
    homes = [[DeviceRef("a", 0), DeviceRef("b", 0)], [DeviceRef("b", 1), DeviceRef("a", 1)]]
    devices = {Position(data, stage, 0): homes[data][stage] for data in range(2) for stage in range(2)}
    return Placement(epoch, MeshShape(2, 2, 1), split_layers(shared_heads()[0].spec.config.layers, 2), devices)
