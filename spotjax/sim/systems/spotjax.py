"""Spotjax in the simulator: the server's planner and its ways of changing a mesh, over simulated replicas.

What is decided here is decided by the functions that the server calls; only effects are simulated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from spotjax.fleet.capacity.loop import LOOK_SECONDS
from spotjax.fleet.change import Planning
from spotjax.fleet.recovery_policies import POLICIES
from spotjax.meshes.instance import Instance, InstanceState
from spotjax.meshes.placement import Placement
from spotjax.meshes.shape import MeshShape
from spotjax.planner.goal import Goal
from spotjax.sim.replica_continuous import ContinuousReplica
from spotjax.sim.systems.spotjax_backup import Backups
from spotjax.sim.systems.spotjax_boundary import Boundary
from spotjax.sim.systems.spotjax_buying import Buying
from spotjax.sim.systems.spotjax_fallback import Fallback
from spotjax.sim.systems.spotjax_options import Feature, SpotjaxOptions, in_order, require_feature
from spotjax.sim.systems.spotjax_reconfigure import Reconfigurer
from spotjax.sim.systems.spotjax_replicas import Replicas
from spotjax.sim.systems.spotjax_shapes import Shapes, of_one_kind, typical_demand
from spotjax.sim.times import ReplicaTimes
from spotjax.sim.world import World

TRANSFERS = 256
"""Parts of a migration: layer by layer, where the server cuts down to single arrays."""


class Spotjax:
    """This system, whole or without one of its features. A ``System``.

    Args:
      without: see ``spotjax_options.Feature``.
      options: see there.

    Raises:
      ConfigError: there is no such feature.
    """

    def __init__(self, without: Feature | None = None, options: SpotjaxOptions | None = None) -> None:
        require_feature(without)
        self._without, self._options = without, options or SpotjaxOptions()
        self.name = self._options.recovery if without is None else f"spotjax-no-{without}"

    def begin(self, world: World) -> None:
        """The first mesh, with parameters in place; its workers have to start."""
        scenario, options = world.scenario, self._options
        demand = options.demand or typical_demand(world.book.prompt, world.book.output, options.batch, options.kv_room)
        demand = replace(demand, kv_pages=demand.pages)
        assumed = scenario.assumptions
        times: dict[object, ReplicaTimes] = {}

        def times_of(placement: Placement) -> ReplicaTimes:
            one = MeshShape(1, placement.shape.stage, placement.shape.tensor)
            key = one, placement.layers
            if key not in times:
                times[key] = ReplicaTimes(scenario.latency, one, placement.layers, assumed.scale)
            return times[key]

        def make(placement: Placement) -> ContinuousReplica:
            return ContinuousReplica(
                times_of(placement), demand.batch, demand.pages + 1, demand.page_size, world.book, world.queue,
                prefill_tokens=demand.step_tokens,
            )  # fmt: skip

        planning = Planning(
            scenario.spec,
            demand,
            options.wanted,
            latency=of_one_kind(scenario.latency, assumed.scale),
            checkpoint_bandwidth=assumed.checkpoint_bandwidth,
            transfers=TRANSFERS,
            bounded=True,
            match=in_order if self._without == "matcher" else None,
            recovery=options.recovery,
        )
        self._world = world
        self._shapes = Shapes(
            planning, Goal(near_tie=options.near_tie), self._without == "optimizer", options.smoothing_seconds,
            stall_seconds=2 * assumed.switch_seconds,
        )  # fmt: skip
        backups = Backups(
            scenario.spec.kv_bytes_per_position, options.backup_bandwidth, options.backup_lag_seconds,
            lambda placement: times_of(placement).step(1, demand.context),
        )  # fmt: skip
        self._replicas = Replicas(
            make, demand.pages + 1, demand.page_size, backups if self._backs_up else None, world.book
        )
        self._boundary = Boundary(world, self._replicas, times_of, demand, options.leave == "late")
        self._reconfigurer = Reconfigurer(
            world, planning, self._shapes, self._replicas, self._boundary, options, self._without
        )
        self._fallback = Fallback(world, self, planning, options) if options.fallback else None
        self._buying = Buying(world, self, planning, options.capacity, self._replicas) if options.capacity else None
        self._start_workers([instance.name for instance in world.ready_instances()])
        world.at(world.now + assumed.engine_start_seconds, self._reconfigurer.begin)
        world.at(world.now + options.look_seconds, self._look)
        if self._buying is not None:
            world.at(world.now + assumed.engine_start_seconds, self._buy)

    @property
    def _backs_up(self) -> bool:
        return self._without != "backup" and POLICIES[self._options.recovery].keeps_kv

    def arrived(self, request: int) -> None:
        """Goes to the replica with the least load."""
        self._shapes.arrived(self._world.now)
        if self._buying is not None:
            self._buying.arrived(request)
        self._replicas.add(request)

    def coming(self, names: Sequence[str], ready_at: float) -> None:
        """Nothing can be done with them before they are ready."""

    def ready(self, names: Sequence[str]) -> None:
        """Their workers start."""
        self._start_workers(names)

    def noticed(self, names: Sequence[str], deadline: float) -> None:
        """Leaves them in time."""
        self._boundary.deadlines |= dict.fromkeys(names, deadline)
        forced = not self._replicas.standing_on().isdisjoint(names)
        self._reconfigurer.interrupted(f"{len(names)} noticed", forced=forced)

    def lost(self, names: Sequence[str]) -> None:
        """Goes on without them, whatever they were doing."""
        for name in names:
            self._boundary.deadlines.pop(name, None)
        forced = self._replicas.lose(names, self._world.instances, self._world.now)
        self._reconfigurer.interrupted(f"{len(names)} lost", forced=forced)

    def ended(self) -> None:
        """All that runs is in the middle."""
        self._replicas.stop(self._replicas.running(), self._world.now)

    def _start_workers(self, names: Sequence[str]) -> None:
        """Instances join when their processes have started; until then nothing is planned with them."""
        there, starting = self._world.instances, dict[str, Instance]()
        for name in names:
            starting[name] = there[name] = replace(there[name], state=InstanceState.JOINING)
        if names:
            self._world.at(
                self._world.now + self._world.scenario.assumptions.engine_start_seconds, self._joined, starting
            )

    def _joined(self, starting: Mapping[str, Instance]) -> None:
        """Looks for a better mesh with those that were neither noticed nor lost since."""
        there = self._world.instances
        joined = [name for name, instance in starting.items() if there.get(name) is instance]
        for name in joined:
            there[name] = replace(there[name], state=InstanceState.READY)
        if joined:
            self._reconfigurer.look(f"{len(joined)} joined")

    def _buy(self) -> None:
        assert self._buying is not None, "nobody buys"
        if self._buying.look():
            self._reconfigurer.interrupted("wanted no more", forced=False)
        self._world.at(self._world.now + LOOK_SECONDS, self._buy)

    def _look(self) -> None:
        if self._fallback is not None:
            given_back = self._fallback.give_back(self._replicas.standing_on())
            leaving = self._fallback.adapt(self._shapes.load(self._world.now))
            if given_back or leaving:
                self._reconfigurer.interrupted("on demand no more", forced=False)
        self._reconfigurer.look("load")
        self._world.at(self._world.now + self._options.look_seconds, self._look)
