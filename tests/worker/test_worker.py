"""A worker carries out commands on real stages: what it adopts runs, whoever of the others is gone."""

from __future__ import annotations

import numpy as np
import pytest
from serving_cases import shared_heads
from worker_cases import Case, two_replicas

from spotjax.errors import PeerUnreachable, SliceUnavailable, TransportError
from spotjax.meshes.instance import DeviceRef
from spotjax.meshes.layout import split_layers
from spotjax.meshes.placement import Placement
from spotjax.meshes.shape import MeshShape, Position
from spotjax.protocol import control, reads
from spotjax.worker.executor import CONTROLLER


async def test_a_worker_has_the_roles_of_its_devices_and_keeps_what_they_need(case: Case) -> None:
    done = await case.adopt(two_replicas(), ("1.0", "1.1"))
    assert done.id == 1 and done.loaded > 0 and done.moved == 0
    roles = {key: post.role for key, post in case.worker.executor._posts.items()}
    assert {key: (role.last, role.next) for key, role in roles.items()} == {
        ("1.0", 0): (False, "b"),
        ("1.1", 1): (True, CONTROLLER),
    }
    assert sorted(case.links.connections) == [CONTROLLER, "b"]
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
    assert CONTROLLER in case.links.connections


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
    assert await case.worker.carry_out(control.Clear(9)) == control.Done(9, compiled=case.worker.compiled)
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
    with pytest.raises(TransportError, match="cannot be understood"):
        case.worker.provide(b"\xc1")
