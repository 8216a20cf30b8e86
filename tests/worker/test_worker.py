"""A worker carries out commands on real stages: what it adopts runs, whoever of the others is gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import jax
import msgspec
import numpy as np
import pytest
from serving_cases import BUCKETS, POSITIONS, shared_heads

from spotjax.errors import ConnectionLost, PeerUnreachable, SliceUnavailable
from spotjax.meshes.instance import DeviceRef, Instance, InstanceType
from spotjax.meshes.layout import split_layers
from spotjax.meshes.placement import Placement
from spotjax.meshes.shape import MeshShape, Position
from spotjax.planner.holdings import Holdings, StackedNeeds, needs_of
from spotjax.planner.links import Links as PlannedLinks
from spotjax.planner.migration import plan_migration
from spotjax.protocol import control, reads
from spotjax.reshard.host import Host
from spotjax.reshard.parameter_store import ParameterStore
from spotjax.worker.backup_store import BackupStore
from spotjax.worker.executor import CONTROLLER, StageExecutor
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
        self.connected: list[str] = []

    async def connect(self, instance: str) -> None:
        if instance in self.gone:
            raise ConnectionLost(f"{instance} does not answer")
        self.connected.append(instance)

    def send(self, *frame: Any) -> None:
        raise AssertionError("no steps run here")


class Peers:
    """Nobody is there to be read from."""

    addresses: Any = None
    epoch = 0

    def begin(self) -> None:
        """Reads are wanted."""

    def supersede(self) -> None:
        """They are not."""

    def read_slice(self, source: DeviceRef, *what: Any) -> None:
        raise PeerUnreachable(source.instance, "it is gone")


class Case:
    """A worker that is instance a of a and b."""

    def __init__(self, directory: Path) -> None:
        model, weights = shared_heads()
        self.store = ParameterStore.open(directory, "a", "print")
        self.links, self.peers, memory = Links(), Peers(), StoreMemory(self.store)
        self.host = Host(model, BUCKETS, weights, {"a": tuple(jax.devices()[:2])}, self.peers, memory)  # type: ignore[arg-type]
        self.host._compiled_for.add(1)  # no step runs here
        executor = StageExecutor("a", model, POSITIONS, self.links.send, lambda problem: None, Watchdog())
        self.worker = Worker(
            "a", SETUP, self.host, executor, self.peers, self.links, BackupStore(), self.store, memory,  # type: ignore[arg-type]
        )  # fmt: skip

    def prepare(self, number: int, placement: Placement, current: Placement | None = None) -> control.Prepare:
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
            {},
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


@pytest.fixture
async def case(tmp_path: Path) -> AsyncIterator[Case]:
    case = Case(tmp_path)
    yield case
    await asyncio.to_thread(case.worker.clear)
    case.store.close()


def two_replicas(epoch: int = 1) -> Placement:
    """Replica 0 on a and b, replica 1 on b and a."""
    homes = [[DeviceRef("a", 0), DeviceRef("b", 0)], [DeviceRef("b", 1), DeviceRef("a", 1)]]
    devices = {Position(data, stage, 0): homes[data][stage] for data in range(2) for stage in range(2)}
    return Placement(epoch, MeshShape(2, 2, 1), split_layers(shared_heads()[0].spec.config.layers, 2), devices)


async def test_a_worker_has_the_roles_of_its_devices_and_keeps_what_they_need(case: Case) -> None:
    done = await case.adopt(two_replicas(), ("1.0", "1.1"))
    assert done.id == 1 and done.loaded > 0 and done.moved == 0
    roles = {key: post.role for key, post in case.worker.executor._posts.items()}
    assert {key: (role.last, role.next) for key, role in roles.items()} == {
        ("1.0", 0): (False, "b"),
        ("1.1", 1): (True, CONTROLLER),
    }
    assert sorted(case.links.connected) == [CONTROLLER, "b"]
    assert set(case.links.onward) == {CONTROLLER, "b"}
    assert case.links.addresses == {"a": "a:1", "b": "b:1", CONTROLLER: "controller:1"}
    held = {DeviceRef("a", parts.device): parts.arrays for parts in case.worker.ready().held}
    assert held == case.host.held() and len(held) == 2
    stored = {shard.key for shard in case.store.attached()}
    assert stored == {(d.index, name, index) for d, arrays in held.items() for name, index in arrays.items()}


async def test_the_next_stage_that_is_gone_is_blamed_and_other_replicas_run_all_the_same(case: Case) -> None:
    case.links.gone.add("b")
    with pytest.raises(PeerUnreachable) as failed:
        await case.adopt(two_replicas(), ("1.0", "1.1"))
    assert failed.value.instance == "b"
    assert case.worker.executor._posts.keys() == {("1.0", 0), ("1.1", 1)}
    assert CONTROLLER in case.links.connected


async def test_what_comes_from_somebody_who_is_gone_names_whom(case: Case) -> None:
    layers = split_layers(shared_heads()[0].spec.config.layers, 1)
    current = Placement(1, MeshShape(1, 1, 1), layers, {Position(0, 0, 0): DeviceRef("b", 0)})
    with pytest.raises(PeerUnreachable) as failed:
        await case.worker.carry_out(case.prepare(1, two_replicas(2), current))
    assert failed.value.instance == "b"
    assert case.peers.epoch == 1 and case.host.placement == current
    assert case.host.prepared is None


async def test_giving_up_the_mesh_keeps_parameters_and_ends_what_is_sent_on(case: Case) -> None:
    await case.adopt(two_replicas(), ("1.0", "1.1"))
    held = case.worker.ready().held
    assert await case.worker.carry_out(control.Clear(9)) == control.Done(9, compiled=case.worker._compiled)
    assert not case.host.stages and case.host.placement is None
    assert not case.worker.executor._posts and not case.links.onward
    assert case.worker.ready().held == held


async def test_others_are_given_what_is_here_and_told_what_is_not(case: Case) -> None:
    await case.adopt(two_replicas(), ("1.0", "1.1"))
    (name, index), *_ = case.host.held()[DeviceRef("a", 0)].items()
    (content,) = case.worker.provide(reads.encode(reads.ReadSlice(0, name, index)))
    expected = shared_heads()[1].read(name, index)
    np.testing.assert_array_equal(np.frombuffer(content, np.float32).reshape(expected.shape), expected)
    layers = case.host.stages[0, 0].layers
    (pages,) = case.worker.provide(reads.encode(reads.ReadPages(1, 0, layers, (1, 2))))
    assert not np.frombuffer(pages, np.uint8).any()
    for refused in (
        reads.ReadSlice(0, "unknown", index),
        reads.ReadPages(2, 0, layers, (1,)),
        reads.ReadPages(1, 1, layers, (1,)),
        reads.ReadBackup(layers, ((1, 0),)),
    ):
        with pytest.raises(SliceUnavailable):
            case.worker.provide(reads.encode(refused))
    with pytest.raises(msgspec.DecodeError):
        case.worker.provide(b"\xc1")
