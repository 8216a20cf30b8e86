"""What becomes of a service when its instances change: Spotjax's way, and two that it is compared with. Pure.

The baselines are those of SpotServe (Miao et al. 2024, section 6.1). They plan as if less were there than is: nothing
that a device holds is of use to another mesh, neither parameters nor KV. A policy is data; ``reconfigure`` carries it
out, and owns everything that they have in common.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from types import MappingProxyType
from typing import Protocol

from spotjax.errors import NoFeasibleShape
from spotjax.fleet.change import NO_SURVIVORS, Live, Planning, Recovery, decide, plan_change
from spotjax.meshes.instance import DeviceRef, Instance, InstanceState
from spotjax.meshes.layout import split_layers
from spotjax.meshes.placement import Placement
from spotjax.meshes.shape import MeshShape, Position
from spotjax.planner.holdings import Holdings
from spotjax.planner.migration import Links, plan_migration
from spotjax.planner.needs import Needs, needs_of
from spotjax.reshard.transfer import Preparation, Survivors

NOTHING: Mapping[DeviceRef, Needs] = MappingProxyType({})


class Plan(Protocol):
    """Plans a change: see ``change.plan_change``."""

    def __call__(
        self,
        planning: Planning,
        current: Placement | None,
        instances: Sequence[Instance],
        live: Live,
        epoch: int,
        running: Collection[int] = (),
        held: Mapping[DeviceRef, Needs] = NOTHING,
        survivors: Survivors = NO_SURVIVORS,
    ) -> Preparation: ...


@dataclass(frozen=True)
class RecoveryPolicy:
    """How changes of the mesh are made.

    Attributes:
      plan: the next mesh.
      keeps_kv: KV goes along where it can, and is backed up for that; else all of it is computed again.
      stops_first: nothing is decoded from the moment that a change is planned.
      in_turns: every change of the mesh is followed by a look whether there is another to make.
    """

    plan: Plan
    keeps_kv: bool = False
    stops_first: bool = False
    in_turns: bool = False


def plan_reload(
    planning: Planning,
    current: Placement | None,
    instances: Sequence[Instance],
    live: Live,
    epoch: int,
    running: Collection[int] = (),
    held: Mapping[DeviceRef, Needs] = NOTHING,
    survivors: Survivors = NO_SURVIVORS,
) -> Preparation:
    """The best mesh of the ready instances, all parameters of which are loaded from the checkpoint.

    A mesh whose shape is the best, and whose instances are ready, stays where it is, whoever else is there.

    Raises:
      NoFeasibleShape: see ``plan_change``.
    """
    anew = plan_change(planning, None, instances, {}, epoch)
    if current is None or current.shape != anew.placement.shape or not _standing(current, instances):
        return anew
    return _loading(planning, replace(current, epoch=epoch), instances)


def plan_rerouting(
    planning: Planning,
    current: Placement | None,
    instances: Sequence[Instance],
    live: Live,
    epoch: int,
    running: Collection[int] = (),
    held: Mapping[DeviceRef, Needs] = NOTHING,
    survivors: Survivors = NO_SURVIVORS,
) -> Preparation:
    """Replicas of the wanted P and M, or else the first mesh's: hurt ones close, others go on, new ones are loaded.

    As long as any goes on, hurt ones close in one change and new ones open in the next: nobody waits for loading who
    can be served elsewhere.

    Raises:
      NoFeasibleShape: no replica goes on, and the ready instances have no room for a new one of that P and M.
    """
    shape = planning.wanted or (current.shape if current is not None else None)
    if shape is None:
        return plan_change(planning, None, instances, {}, epoch)
    one, stages, tensor = replace(shape, data=1), shape.stage, shape.tensor
    layers = split_layers(planning.spec.config.layers, stages)
    going_on: dict[int, list[tuple[DeviceRef, ...]]] = {}
    if current is not None and (current.layers, current.shape.tensor) == (layers, tensor):
        going_on = _intact(current, instances, running)
    groups = list(chain.from_iterable(going_on.values()))
    if current is None or len(going_on) in (0, current.shape.data):
        fitting = _hosts(planning, instances, one)
        groups += _free_groups(fitting, set(chain.from_iterable(groups)), stages, tensor)
    if not groups:
        raise NoFeasibleShape(
            f"the ready instances have no room for a replica of shape {one}, which rerouting keeps to"
        )
    data = len(groups) // stages
    devices = {
        Position(place // stages, place % stages, m): group[m]
        for place, group in enumerate(groups)
        for m in range(tensor)
    }
    placement = Placement(epoch, MeshShape(data, stages, tensor), layers, devices)
    carried = {old: new for new, old in enumerate(going_on)}
    return _loading(planning, placement, instances, carried)


SPOTJAX = RecoveryPolicy(plan_change, keeps_kv=True)
POLICIES: Mapping[Recovery, RecoveryPolicy] = {
    "spotjax": SPOTJAX,
    "reparallelization": RecoveryPolicy(plan_reload, stops_first=True),
    "rerouting": RecoveryPolicy(plan_rerouting, in_turns=True),
}


def _standing(placement: Placement, instances: Sequence[Instance], data: int | None = None) -> bool:
    """Whether all instances of a mesh, or of one of its replicas, are ready."""
    ready = {instance.name for instance in instances if instance.state is InstanceState.READY}
    replicas = range(placement.shape.data) if data is None else (data,)
    return all(placement.instances(replica) <= ready for replica in replicas)


def _intact(
    current: Placement, instances: Sequence[Instance], running: Collection[int]
) -> dict[int, list[tuple[DeviceRef, ...]]]:
    """The groups of every replica that runs and that no instance leaves."""
    return {
        old: [current.group(old, stage) for stage in range(current.shape.stage)]
        for old in sorted(running)
        if _standing(current, instances, old)
    }


def _hosts(planning: Planning, instances: Sequence[Instance], one: MeshShape) -> Sequence[Instance]:
    """The ready instances that can be part of a replica of that shape; none if they have no room for one."""
    try:
        decision = decide(replace(planning, wanted=one), instances)
    except NoFeasibleShape:
        return ()
    return decision.hosts if decision.shape == one else ()


def _free_groups(
    hosts: Sequence[Instance], taken: Collection[DeviceRef], stages: int, tensor: int
) -> list[tuple[DeviceRef, ...]]:
    """Groups of devices for as many whole replicas as there is room for, stage after stage."""
    groups = [
        host.devices[start : start + tensor]
        for host in hosts
        for start in range(0, host.type.devices - tensor + 1, tensor)
    ]
    free = [group for group in groups if not set(group) & set(taken)]
    return free[: len(free) // stages * stages]


def _loading(
    planning: Planning,
    placement: Placement,
    instances: Sequence[Instance],
    carried: Mapping[int, int] = MappingProxyType({}),
) -> Preparation:
    """The way to a mesh of which every replica that is not carried over is loaded from the checkpoint."""
    needs = {
        placement.devices[position]: arrays.of_parameters()
        for position, arrays in needs_of(planning.spec, placement.shape, placement.layers, ()).items()
    }
    there = {device for at, device in placement.devices.items() if at.data in carried.values()}
    loaded = {device: arrays for device, arrays in needs.items() if device not in there}
    links = Links.of(instances, planning.checkpoint_bandwidth)
    plan = plan_migration(loaded, Holdings.of(planning.spec, None, (), instances), links)
    return Preparation(placement, needs, plan, carried, carried)
