"""Each way to recover does what it says and nothing better, keeps every token, and leaves the default as it is."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from random import Random

import pytest
from fleet_cases import SPEC, TIGHT, PureCluster, Service, instances, kind, make_service, read
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pure_model import turns
from test_change import DEMAND, GONE, NOTICED, READY, first_mesh, live_on, used, with_states
from test_controller import LIVES, finish, life
from virtual_time import run

from spotjax.config import ServeConfig, refuse_contradictions
from spotjax.errors import ConfigError, NoFeasibleShape
from spotjax.fleet.change import Planning, Recovery, is_in_place, plan_change
from spotjax.fleet.recovery_policies import POLICIES, SPOTJAX, plan_reload, plan_rerouting
from spotjax.fleet.status import Reconfiguration
from spotjax.meshes.instance import DeviceRef, Instance, InstanceState
from spotjax.meshes.placement import Placement
from spotjax.meshes.shape import MeshShape
from spotjax.reshard.transfer import PageTransfer, Preparation, Traffic

PAIRS = Planning(SPEC, DEMAND, MeshShape(8, 2, 1))
"""As many replicas of two stages as fit."""
BASELINES: tuple[Recovery, ...] = ("reparallelization", "rerouting")


class Watched(PureCluster):
    """Counts what is brought, and says whether replicas decoded meanwhile."""

    def __init__(self, random: Random) -> None:
        super().__init__(random)
        self.preparations: list[Preparation] = []
        self.pages_moved = 0
        self.service: Service | None = None
        self.decoding: list[int] = []

    async def prepare(self, preparation: Preparation) -> Traffic:
        self.preparations.append(preparation)
        assert self.service is not None
        self.decoding.append(len(self.service.controller._dispatcher.running()))
        return await super().prepare(preparation)

    async def switch(self, transfers: Sequence[PageTransfer]) -> object:  # type: ignore[override]
        self.pages_moved += sum(len(transfer.pages) for transfer in transfers)
        return await super().switch(transfers)

    async def copy_pages(self, transfers: Sequence[PageTransfer]) -> Traffic:
        self.pages_moved += sum(len(transfer.pages) for transfer in transfers)
        return await super().copy_pages(transfers)


def started(recovery: Recovery, count: int, alive: int | None = None) -> tuple[Service, Watched]:
    """A service of replicas of two stages each, as one instance does not hold the model."""
    random = Random(3)
    cluster = Watched(random)
    service = make_service(random, instances(count, 1, TIGHT), alive, cluster=cluster, recovery=recovery)
    cluster.service = service
    return service, cluster


async def decoding(service: Service, requests: int) -> None:
    """Has so many requests begun."""
    for number in range(requests):
        service.submit(f"r{number}", max_tokens=16, ignore_eos=True)
    while service.controller._dispatcher.waiting:
        await turns(1)
    await turns(12)


def data_of(service: Service) -> int:
    placement = service.controller.status().placement
    return placement.shape.data if placement is not None else 0


# --- plans -----------------------------------------------------------------------------------------------------------


def test_the_default_is_the_planner_itself() -> None:
    assert Planning(SPEC, DEMAND).recovery == ServeConfig().recovery == "spotjax"
    assert POLICIES["spotjax"] is SPOTJAX and SPOTJAX.plan is plan_change
    assert SPOTJAX.keeps_kv and not SPOTJAX.stops_first and not SPOTJAX.in_turns


def states() -> st.SearchStrategy[list[InstanceState]]:
    return st.lists(st.sampled_from([READY, READY, READY, NOTICED, GONE]), min_size=6, max_size=6)


def check_loads(preparation: Preparation, carried: frozenset[DeviceRef]) -> None:
    """All parameters of whatever is not carried over come from the checkpoint, and all of them do."""
    assert all(move.source is None for move in preparation.plan.moves)
    for device, needs in preparation.needs.items():
        brought = sum(move.slice.size for move in preparation.plan.moves if move.target == device)
        whole = sum(_size(index) for index in dict(needs).values())
        assert brought == (0 if device in carried else whole)


def _size(index: Sequence[tuple[int, int]]) -> int:
    size = 1
    for start, stop in index:
        size *= stop - start
    return size


@given(states(), states(), st.lists(st.integers(1, 12), max_size=2))
def test_reparallelization_loads_everything_onto_the_best_mesh(
    before: list[InstanceState], after: list[InstanceState], progress: list[int]
) -> None:
    machines = instances(6, 1, TIGHT)
    if before.count(READY) < 2 or after.count(READY) < 2:
        return
    current = first_mesh(with_states(machines, *before))
    now = with_states(machines, *after)
    plan = plan_reload(Planning(SPEC, DEMAND), current, now, live_on(current, *progress), 2)
    best = plan_change(Planning(SPEC, DEMAND), current, now, live_on(current, *progress), 2)
    assert plan.placement.shape == best.placement.shape
    assert used(plan.placement) <= {machine.name for machine in now if machine.state is READY}
    assert plan.heirs == plan.carried == {}
    check_loads(plan, frozenset())
    stays = used(current) <= {machine.name for machine in now if machine.state is READY}
    assert is_in_place(plan, current) == (stays and best.placement.shape == current.shape)


@given(states(), states(), st.sets(st.integers(0, 2)), st.sampled_from([1, 2]))
def test_rerouting_keeps_shape_and_intact_replicas(
    before: list[InstanceState], after: list[InstanceState], stopped: set[int], devices: int
) -> None:
    machines = instances(6, devices, TIGHT)
    if devices * before.count(READY) < 2:
        return
    current = first_mesh(with_states(machines, *before), PAIRS)
    now = with_states(machines, *after)
    ready = {machine.name for machine in now if machine.state is READY}
    running = set(range(current.shape.data)) - stopped
    intact = [old for old in range(current.shape.data) if old in running and current.instances(old) <= ready]
    try:
        plan = plan_rerouting(PAIRS, current, now, {}, 2, running)
    except NoFeasibleShape:
        assert not intact and devices * len(ready) < 2
        return
    placement = plan.placement
    assert (placement.shape.stage, placement.shape.tensor, placement.layers) == (2, 1, current.layers)
    assert used(placement) <= ready
    assert list(plan.carried) == intact and plan.heirs == plan.carried
    for old, new in plan.carried.items():
        assert [current.group(old, n) for n in range(2)] == [placement.group(new, n) for n in range(2)]
    check_loads(plan, frozenset(device for at, device in placement.devices.items() if at.data in plan.carried.values()))
    if intact and len(intact) < current.shape.data:
        assert placement.shape.data == len(intact), "hurt replicas close before others open"
    else:
        assert placement.shape.data == devices * len(ready) // 2


def test_rerouting_takes_no_other_shape_though_one_would_fit() -> None:
    machines = instances(4, 1, 2**30)
    planning = Planning(SPEC, DEMAND, MeshShape(1, 4, 1))
    current = first_mesh(machines, planning)
    now = with_states(machines, READY, READY, READY, GONE)
    assert plan_change(planning, current, now, {}, 2).placement.shape != current.shape
    with pytest.raises(NoFeasibleShape, match="1x4x1"):
        plan_rerouting(planning, current, now, {}, 2, {0})


def test_rerouting_keeps_to_the_shape_that_is_wanted_however_many_are_there_first() -> None:
    machines = instances(4, 1, 2**30)
    planning = Planning(SPEC, DEMAND, MeshShape(2, 2, 1))
    with pytest.raises(NoFeasibleShape, match="1x2x1"):
        plan_rerouting(planning, None, machines[:1], {}, 1)
    assert plan_rerouting(planning, None, machines[:3], {}, 1).placement.shape == MeshShape(1, 2, 1)
    other = first_mesh(machines, Planning(SPEC, DEMAND, MeshShape(1, 4, 1)))
    changed = plan_rerouting(planning, other, machines, {}, 2, {0})
    assert changed.placement.shape == MeshShape(2, 2, 1) and changed.carried == {}


def test_rerouting_gives_no_place_to_an_instance_that_is_too_small() -> None:
    machines = instances(2, 1, TIGHT)
    current = first_mesh(machines, PAIRS)
    small = [Instance(f"s{number}", kind(1, TIGHT // 100)) for number in range(2)]
    assert plan_rerouting(PAIRS, current, [*machines, *small], {}, 2, {0}).placement.shape == MeshShape(1, 2, 1)
    more = [replace(machine, name=f"m{machine.name}") for machine in machines]
    assert plan_rerouting(PAIRS, current, [*machines, *small, *more], {}, 2, {0}).placement.shape == MeshShape(2, 2, 1)


@pytest.mark.parametrize("recovery", BASELINES)
def test_the_first_mesh_is_the_planners(recovery: Recovery) -> None:
    machines, planning = instances(4, 1, TIGHT), Planning(SPEC, DEMAND)
    assert POLICIES[recovery].plan(planning, None, machines, {}, 1) == plan_change(planning, None, machines, {}, 1)


# --- services --------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@example("reparallelization", (2, 1, False), 11, ["submit", "grace", *["submit"] * 9], 2, 41)  # lost in the switch
@given(recovery=st.sampled_from(BASELINES), **LIVES)
def test_whatever_happens_every_request_gets_exactly_its_tokens(
    recovery: Recovery, fleet: tuple[int, int, bool], pages: int, operations: list[str], faults: int, seed: int
) -> None:
    run(life(fleet, pages, operations, faults, Random(seed), recovery))


@pytest.mark.parametrize("grace", [0.0, 1000.0])
async def test_reparallelization_stops_everything_loads_all_and_moves_no_kv(grace: float) -> None:
    service, cluster = started("reparallelization", 5)
    await service.controller.start()
    await decoding(service, 4)
    report = await service.controller.preempt("i0", grace)
    assert cluster.decoding == [0, 0], "nothing decodes while parameters are loaded"
    assert report.bytes_in_place == report.bytes_moved == report.requests_kept == 0
    assert report.bytes_loaded == report.after.shape.data * SPEC.parameter_bytes  # type: ignore[union-attr]
    assert report.requests_recomputed > 0 and cluster.pages_moved == 0
    await finish(service)
    service.check_complete()


async def test_reparallelization_leaves_the_mesh_alone_when_a_spare_comes_or_goes() -> None:
    service, cluster = started("reparallelization", 3, alive=2)
    await service.controller.start()
    await decoding(service, 2)
    await service.controller.preempt("i0", 0)
    changes = len(cluster.preparations)
    await service.controller.add(2)
    assert len(cluster.preparations) == changes + 1
    spare = ({"i0", "i1", "i2"} - used(service.controller.status().placement)).pop()  # type: ignore[arg-type]
    await service.controller.preempt(spare, 0)
    assert len(cluster.preparations) == changes + 1
    await finish(service)
    service.check_complete()


@pytest.mark.parametrize("grace", [0.0, 1000.0])
async def test_rerouting_closes_the_hurt_replica_and_disturbs_no_other(grace: float) -> None:
    service, cluster = started("rerouting", 4)
    await service.controller.start()
    assert data_of(service) == 2
    await decoding(service, 4)
    others = service.controller._dispatcher.replicas[1]
    before: Placement | None = service.controller.status().placement
    assert before is not None
    hurt = min(before.instances(0))
    report: Reconfiguration = await service.controller.preempt(hurt, grace)
    assert service.controller._dispatcher.replicas == (others,) and not others.stopping
    assert report.after is not None and report.after.shape == MeshShape(1, 2, 1)
    assert cluster.preparations[-1].plan.moves == () and cluster.pages_moved == 0
    await finish(service)
    service.check_complete()


async def test_rerouting_opens_a_replica_in_a_change_of_its_own() -> None:
    service, cluster = started("rerouting", 5)
    await service.controller.start()
    await decoding(service, 4)
    before = service.controller.status().placement
    assert before is not None
    await service.controller.preempt(min(before.instances(0)), 0)
    _, closing, opening = cluster.preparations
    assert (closing.placement.shape.data, opening.placement.shape.data) == (1, 2)
    assert closing.plan.bytes_loaded == 0 and opening.plan.bytes_loaded == SPEC.parameter_bytes
    assert dict(closing.carried) == {1: 0} and dict(opening.carried) == {0: 0}
    await finish(service)
    service.check_complete()


async def test_rerouting_waits_for_instances_when_no_replica_is_left() -> None:
    service, _ = started("rerouting", 3, alive=2)
    await service.controller.start()
    await decoding(service, 3)
    report = await service.controller.preempt("i0", 0)
    assert report.after is None
    report = await service.controller.add(2)
    await asyncio.gather(*(read(service.controller, name) for name in service.requests))
    assert data_of(service) == 1
    await finish(service)
    service.check_complete()


@pytest.mark.parametrize("recovery", BASELINES)
def test_settings_that_keep_kv_are_refused_with_a_baseline(recovery: Recovery) -> None:
    refuse_contradictions(ServeConfig(recovery=recovery, workers=2, commit_log="log"))
    with pytest.raises(ConfigError, match=f"checkpoint .* recovery {recovery}"):
        refuse_contradictions(ServeConfig(recovery=recovery, workers=2, checkpoint="there"))
    with pytest.raises(ConfigError, match=f"leave .* recovery {recovery}"):
        refuse_contradictions(ServeConfig(recovery=recovery, leave="late"))
