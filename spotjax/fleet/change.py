"""Plans one change of the mesh: from the instances and what runs on them to a placement and where its bytes come from.

Pure: the same inputs give the same plan. Calls the planner's parts in their order and owns no algorithm of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from spotjax.fleet.staying import could_stay, stay
from spotjax.meshes.instance import DeviceRef, Instance
from spotjax.meshes.placement import Placement
from spotjax.meshes.shape import MeshShape, Position
from spotjax.models.spec import ModelSpec
from spotjax.planner.cohorts import assign_cohorts, choose_heirs
from spotjax.planner.cost import MemoryNeed, memory_need
from spotjax.planner.demand import Demand
from spotjax.planner.goal import Goal, Running
from spotjax.planner.holdings import Holdings, lost_cohorts
from spotjax.planner.kv_cohorts import KvCohort, LiveSequence, distinct_pages
from spotjax.planner.matcher import match
from spotjax.planner.migration import TRANSFERS, Links, MigrationPlan, plan_migration
from spotjax.planner.needs import Needs, kv_needs_of, needs_of
from spotjax.planner.optimizer import Decision, choose_shape
from spotjax.planner.options import LatencyOf
from spotjax.reshard.transfer import Preparation, Survivors

NO_SURVIVORS = Survivors()
Recovery = Literal["spotjax", "reparallelization", "rerouting"]
"""How a service gets over changes of its instances: see ``recovery_policies``."""
Match = Callable[[MeshShape, Mapping[Position, Needs], Sequence[Instance], Holdings], dict[Position, DeviceRef]]
"""A device for every position: see ``matcher.match``."""
Live = Mapping[int, Sequence[LiveSequence]]
"""The sequences with KV of every current replica, replicas without any included."""


@dataclass(frozen=True)
class Planning:
    """What every change of one service's mesh is planned with.

    Attributes:
      spec: the model.
      demand: load that a shape is chosen for; its ``kv_pages`` are those of one replica.
      wanted: a shape that the operator pinned, taken while it fits.
      goal, latency: see ``choose_shape``.
      checkpoint_bandwidth: bytes per second at which one instance reads the checkpoint.
      transfers: see ``plan_migration``.
      bounded: parameters that find no room beside what a device has move after the stop; see ``plan_migration``.
      match: puts positions on devices in the matcher's place; no replica is kept where it is then but by chance.
      recovery: how changes are made; the baselines are for comparison.
    """

    spec: ModelSpec
    demand: Demand
    wanted: MeshShape | None = None
    goal: Goal | None = None
    latency: LatencyOf | None = None
    checkpoint_bandwidth: float = 1e9
    transfers: int = TRANSFERS
    bounded: bool = False
    match: Match | None = None
    recovery: Recovery = "spotjax"


def plan_change(
    planning: Planning,
    current: Placement | None,
    instances: Sequence[Instance],
    live: Live,
    epoch: int,
    running: Collection[int] = (),
    held: Mapping[DeviceRef, Needs] = MappingProxyType({}),
    survivors: Survivors = NO_SURVIVORS,
    decision: Decision | None = None,
) -> Preparation:
    """The next placement on the ready instances, and how to get there.

    KV of the sequences that run now weighs in the matching; which of it really moves is decided by ``plan_kv`` when
    decoding has stopped.

    Args:
      planning: what every change is planned with.
      current: the mesh as it is.
      instances: all that have joined.
      live: sequences with KV.
      epoch: of the new placement.
      running: replicas that could go on without stopping if they stay as they are.
      held: parts of parameters by device; counts for devices that the current placement does not use.
      survivors: KV of replicas that lost an instance.
      decision: the shape, if it is chosen already; its hosts must be ready.

    Raises:
      NoFeasibleShape: the model fits on no mesh of the ready instances.
    """
    spec, demand = planning.spec, planning.demand
    decision = decision or decide(planning, instances)
    able = could_stay(current, decision, running) if planning.match is None else frozenset[int]()
    heirs = choose_heirs(live, decision.shape.data, able)
    staying = (
        {} if current is None else stay(current, decision, {old: new for old, new in heirs.items() if old in able})
    )
    stopping = {old: sequences for old, sequences in live.items() if old not in staying}
    room = [demand.pages] * decision.shape.data
    for old, new in staying.items():
        room[new] -= distinct_pages(live[old])
    cohorts = assign_cohorts(stopping, decision.shape.data, room, demand.page_size, heirs).cohorts
    holdings = Holdings.of(spec, current, cohorts, instances, held, survivors.backups)
    needs = needs_of(spec, decision.shape, decision.layers, cohorts)
    lost = lost_cohorts(needs.values(), holdings)
    if lost:
        kept = [cohort for cohort in cohorts if cohort.name not in lost]
        needs = needs_of(spec, decision.shape, decision.layers, kept)
    devices = place(planning, current, decision, needs, holdings, staying)
    placement = Placement(epoch, decision.shape, decision.layers, devices)
    parameters = {devices[position]: arrays.of_parameters() for position, arrays in needs.items()}
    links = Links.of(instances, planning.checkpoint_bandwidth)
    plan = plan_migration(parameters, holdings, links, transfers=planning.transfers)
    if planning.bounded:
        beside = room_beside(planning, current, placement, instances)
        arriving: Counter[DeviceRef] = Counter()
        for transfer in plan.transfers:
            arriving[transfer.target] += transfer.bytes
        if any(size > beside[device] for device, size in arriving.items()):
            plan = plan_migration(parameters, holdings, links, beside, transfers=planning.transfers)
    return Preparation(placement, parameters, plan, heirs, carried_over(current, placement, heirs, running), survivors)


def room_beside(
    planning: Planning, current: Placement | None, new: Placement, instances: Sequence[Instance]
) -> dict[DeviceRef, int]:
    """Bytes for parameters on every device of a new mesh, beside what it needs in the current one and the new KV."""
    types = {instance.name: instance.type for instance in instances}

    def need(mesh: Placement) -> MemoryNeed:
        shape = MeshShape(1, mesh.shape.stage, mesh.shape.tensor)
        return memory_need(planning.spec, shape, mesh.layers, planning.demand)

    coming, there = need(new), None if current is None else need(current)
    used = set() if current is None else set(current.devices.values())
    having = coming.activations if there is None else there.parameters + there.kv + there.activations
    return {
        device: max(
            0, types[device.instance].memory_bytes - coming.kv - (having if device in used else coming.activations)
        )
        for device in new.devices.values()
    }


def place(
    planning: Planning,
    current: Placement | None,
    decision: Decision,
    needs: Mapping[Position, Needs],
    holdings: Holdings,
    staying: Mapping[int, int],
) -> dict[Position, DeviceRef]:
    """A device for every position: that of before for replicas that stay, the best of the others for the rest."""
    shape = decision.shape
    if planning.match is not None:
        return planning.match(shape, needs, decision.hosts, holdings)
    if current is None or not staying:
        return match(shape, needs, decision.hosts, holdings)
    before = {
        Position(staying[at.data], at.stage, at.tensor): device
        for at, device in current.devices.items()
        if at.data in staying
    }
    taken = {device.instance for device in before.values()}
    hosts = [host for host in decision.hosts if host.name not in taken]
    others = set(range(shape.data)).difference(staying.values())
    placed = before | (match(shape, needs, hosts, holdings, others) if others else {})
    return {position: placed[position] for position in shape.positions()}


def decide(planning: Planning, instances: Sequence[Instance], serving: Running | None = None) -> Decision:
    """The shape of the next mesh: ``choose_shape`` with what the service is planned with.

    Raises:
      NoFeasibleShape: see there.
    """
    return choose_shape(
        planning.spec, instances, planning.demand, planning.wanted,
        goal=planning.goal, latency=planning.latency, running=serving,
    )  # fmt: skip


def carried_over(
    current: Placement | None, new: Placement, heirs: Mapping[int, int], running: Collection[int]
) -> dict[int, int]:
    """Old to new number of the running replicas that stand on the same devices, in the same roles, in both meshes."""
    if current is None or current.layers != new.layers or current.shape.tensor != new.shape.tensor:
        return {}
    return {
        old: data
        for old, data in heirs.items()
        if old in running and all(current.group(old, n) == new.group(data, n) for n in range(new.shape.stage))
    }


def is_in_place(preparation: Preparation, current: Placement | None) -> bool:
    """Whether the planned placement is the current one but for its epoch."""
    new = preparation.placement
    return current is not None and (new.shape, new.layers, new.devices) == (
        current.shape,
        current.layers,
        current.devices,
    )


@dataclass(frozen=True)
class KvChange:
    """What becomes of the KV of running sequences.

    Attributes:
      cohorts: those that keep their KV.
      plan: the moves that takes.
    """

    cohorts: tuple[KvCohort, ...]
    plan: MigrationPlan


def plan_kv(
    planning: Planning,
    preparation: Preparation,
    current: Placement | None,
    instances: Sequence[Instance],
    live: Live,
    room: Sequence[int],
) -> KvChange:
    """Decides for the sequences of stopped replicas whose KV goes on, and where it comes from.

    Sequences that are in no cohort have lost their KV or find no room for it: it is computed again. Those of replicas
    that are carried over stay where they are.

    Args:
      planning, current, instances: as for ``plan_change``.
      preparation: what it planned.
      live: sequences with KV, by old replica.
      room: free KV pages of every new replica.
    """
    spec, demand, placement, carried = planning.spec, planning.demand, preparation.placement, preparation.carried
    stopped = {old: sequences for old, sequences in live.items() if old not in carried}
    heirs = {old: new for old, new in preparation.heirs.items() if old not in carried}
    cohorts = assign_cohorts(stopped, placement.shape.data, room, demand.page_size, heirs).cohorts
    holdings = Holdings.of(spec, current, cohorts, instances, backups=preparation.survivors.backups).of_kv()
    needs = {
        placement.devices[position]: arrays
        for position, arrays in kv_needs_of(spec, placement.shape, placement.layers, cohorts).items()
    }
    links = Links.of(instances, planning.checkpoint_bandwidth)
    plan = plan_migration(needs, holdings, links, transfers=planning.transfers)
    return KvChange(tuple(cohort for cohort in cohorts if cohort.name not in plan.lost), plan)
