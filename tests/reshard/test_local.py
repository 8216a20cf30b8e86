"""The cluster of one process: what breaks because an instance was lost meanwhile is that loss, and nothing else is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import jax
import pytest
from serving_cases import BUCKETS, shared_heads

from spotjax.errors import InstanceLost, SliceUnavailable
from spotjax.meshes.instance import DeviceRef, Instance, InstanceType
from spotjax.meshes.layout import split_layers
from spotjax.meshes.placement import Placement
from spotjax.meshes.shape import MeshShape, Position
from spotjax.planner.holdings import Holdings
from spotjax.planner.links import Links
from spotjax.planner.migration import plan_migration
from spotjax.planner.needs import needs_of
from spotjax.reshard.local import LocalCluster
from spotjax.reshard.transfer import Preparation

INSTANCES = [Instance(name, InstanceType("box", 1, 1 << 40, 1e10, 1e10, 1e10, 1e9)) for name in "ab"]


@pytest.fixture
async def cluster() -> AsyncIterator[LocalCluster]:
    model, weights = shared_heads()
    devices = {name: jax.devices()[n : n + 1] for n, name in enumerate("ab")}
    cluster = LocalCluster(model, BUCKETS, weights, devices, fuse=False)  # type: ignore[arg-type]
    cluster._host._compiled_for.add(1)  # no step runs here
    yield cluster
    cluster._host.clear()


def on_a() -> Preparation:
    spec, layers = shared_heads()[0].spec, split_layers(shared_heads()[0].spec.config.layers, 1)
    placement = Placement(1, MeshShape(1, 1, 1), layers, {Position(0, 0, 0): DeviceRef("a", 0)})
    needs = {placement.devices[at]: n for at, n in needs_of(spec, placement.shape, layers, ()).items()}
    plan = plan_migration(needs, Holdings.of(spec, None, (), INSTANCES), Links.of(INSTANCES))
    return Preparation(placement, needs, plan, {})


PROBLEMS = [RuntimeError("deleted"), ValueError("0 shards"), KeyError(0), SliceUnavailable("not here")]


@pytest.mark.parametrize("problem", PROBLEMS)
async def test_what_breaks_while_an_instance_is_lost_is_a_loss(cluster: LocalCluster, problem: Exception) -> None:
    loop = asyncio.get_running_loop()

    def breaks(*work: Any) -> None:
        asyncio.run_coroutine_threadsafe(lose(), loop).result()
        raise problem

    async def lose() -> None:
        cluster.lose("b")

    cluster._host.prepare = breaks  # type: ignore[method-assign,assignment]
    with pytest.raises(InstanceLost, match="instance b was lost") as lost:
        await cluster.prepare(on_a())
    assert lost.value.__cause__ is problem


@pytest.mark.parametrize("before", [False, True])
async def test_what_breaks_by_itself_is_no_loss(cluster: LocalCluster, *, before: bool) -> None:
    if before:
        cluster.lose("b")

    def breaks(*work: Any) -> None:
        raise KeyError("a bug")

    cluster._host.prepare = breaks  # type: ignore[method-assign,assignment]
    with pytest.raises(KeyError, match="a bug"):
        await cluster.prepare(on_a())


async def test_nothing_is_left_of_the_devices_of_a_process_that_ended(cluster: LocalCluster) -> None:
    assert await cluster.reunite({1: 5}) is None
    await cluster.prepare(on_a())
    pipelines, _ = await cluster.switch(())
    assert len(pipelines) == 1
    pipelines[0].close()
