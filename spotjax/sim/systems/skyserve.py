"""Whole replicas on spot instances, more of them than are needed, with on-demand ones in reserve: after SkyServe.

SpotHedge (Mao et al., EuroSys 2025) keeps N replicas that the load needs and E more, on spot instances where it gets
them; while fewer than N + E of these are ready, up to N replicas on demand stand in. A replica that loses an instance
is lost as a whole and its requests begin again elsewhere; a notice is only used to send it no more requests. Nothing is
moved: a new replica starts an engine and then reads its parameters from storage. The engine is the continuous batching
that Spotjax has, on the smallest mesh that holds the model; a replica has its instances to itself. Of one zone here;
spreading over zones is not simulated. All instances of the trace are taken, as by all systems here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil

from spotjax.errors import ConfigError, NoFeasibleShape
from spotjax.meshes.instance import Instance, InstanceState
from spotjax.meshes.shape import MeshShape
from spotjax.planner.demand import Demand
from spotjax.planner.goal import Goal
from spotjax.planner.load import LoadEstimator
from spotjax.planner.optimizer import Decision, choose_shape
from spotjax.sim.dispatch import least_loaded
from spotjax.sim.replica_continuous import ContinuousReplica
from spotjax.sim.systems.spotjax_shapes import of_one_kind, typical_demand
from spotjax.sim.times import ReplicaTimes
from spotjax.sim.world import Change, World

BATCH = 8
EXTRA = 2
"""E: spot replicas beyond those that the load needs."""
USED = 0.7
"""Share of what a replica can serve that it is planned to be given; an assumption."""
LOOK_SECONDS = 30.0
PREFIX = "fallback"


@dataclass(eq=False)
class Standing:
    """A replica and where it stands.

    Attributes:
      names: its instances.
      replica: None while its engine starts and parameters are read.
      leaving: it gets no more requests while others can take them.
    """

    names: tuple[str, ...]
    replica: ContinuousReplica | None = None
    leaving: bool = False


class SkyServe:
    """The peer. A ``System``.

    Args:
      extra: E.
    """

    name = "skyserve"

    def __init__(self, extra: int = EXTRA) -> None:
        self._extra = extra
        self._standing: list[Standing] = []
        self._parked: list[int] = []
        self._requests = 0
        self._rented: set[str] = set()
        self._load = LoadEstimator()

    def begin(self, world: World) -> None:
        """As many replicas as the instances carry, with parameters in place; their engines have to start.

        Raises:
          ConfigError: no instances of the type, however many, hold the model.
        """
        self._world, scenario = world, world.scenario
        demand = typical_demand(world.book.prompt, world.book.output, BATCH, 1.0)
        shape = _smallest(world, demand)
        self._shape, self._capacity = shape.shape, shape.rate / shape.shape.data
        self._size = -(-shape.shape.stage * shape.shape.tensor // scenario.kind.devices)
        times = ReplicaTimes(scenario.latency, shape.shape, shape.layers, scenario.assumptions.scale)

        def make() -> ContinuousReplica:
            return ContinuousReplica(
                times, BATCH, demand.pages + 1, demand.page_size, world.book, world.queue,
                prefill_tokens=demand.step_tokens,
            )  # fmt: skip

        self._make: Callable[[], ContinuousReplica] = make
        self._start(scenario.assumptions.engine_start_seconds, "start")
        world.at(world.now + LOOK_SECONDS, self._look)

    def arrived(self, request: int) -> None:
        """Goes to the replica with the least load."""
        self._load.arrived(self._world.now)
        self._add(request)

    def coming(self, names: Sequence[str], ready_at: float) -> None:
        """Nothing can be done with them before they are ready."""

    def ready(self, names: Sequence[str]) -> None:
        """Another replica, if there are enough."""
        self._open()

    def noticed(self, names: Sequence[str], deadline: float) -> None:
        """Their replicas get no more requests; those that had not begun never will."""
        for one in self._on(names):
            one.leaving = True
            if one.replica is None:
                self._standing.remove(one)
        self._open()

    def lost(self, names: Sequence[str]) -> None:
        """Their replicas are gone; requests begin again elsewhere."""
        book, hurt = self._world.book, self._on(names)
        self._standing = [one for one in self._standing if one not in hurt]
        left = [progress for one in hurt if one.replica is not None for progress in one.replica.stop()]
        if hurt:
            self._record("lost")
        for request, computed in sorted(left):
            if book.generated[request]:
                book.restart(request)
            else:
                book.recomputed[request] += computed
            self._add(request)
        self._open()

    def ended(self) -> None:
        """All that runs is in the middle."""
        for one in self._standing:
            if one.replica is not None:
                one.replica.stop()

    def _add(self, request: int) -> None:
        serving = [one.replica for one in self._standing if one.replica is not None and not one.leaving]
        serving = serving or [one.replica for one in self._standing if one.replica is not None]
        if serving:
            least_loaded(serving).add(request)
        else:
            self._parked.append(request)

    def _look(self) -> None:
        """Adapts the number of on-demand instances to the load and to the spot replicas that are ready."""
        world = self._world
        needed = max(1, ceil(self._load.load(world.now).rate / (self._capacity * USED)))
        spot = sum(one.replica is not None and not one.leaving for one in self._standing if not self._is_rented(one))
        wanted = min(needed, max(0, needed + self._extra - spot))
        if (missing := wanted * self._size - len(self._rented)) > 0:
            self._requests += 1
            self._rented |= set(world.request_on_demand(self, missing, f"{PREFIX}-{self._requests}"))
        rented = [one for one in self._standing if self._is_rented(one)]
        rented.sort(key=lambda one: (one.replica is None, one.leaving))  # those that serve stay
        for number, one in enumerate(rented):
            one.leaving = number >= wanted
            if one.leaving:
                self._close(one)
        world.at(world.now + LOOK_SECONDS, self._look)

    def _close(self, one: Standing) -> None:
        """Gives a replica's on-demand instances back, if it has nothing to do."""
        if one.replica is None or one.replica.load == 0:
            self._standing.remove(one)
            self._rented.difference_update(one.names)
            for name in one.names:
                self._world.release(name)
            self._record("released")

    def _open(self) -> None:
        """Starts replicas on the instances that none stands on."""
        assumed, spec = self._world.scenario.assumptions, self._world.scenario.spec
        reading = spec.parameter_bytes / self._size / assumed.checkpoint_bandwidth
        self._start(assumed.engine_start_seconds + reading, "opened", spec.parameter_bytes)

    def _start(self, seconds: float, reason: str, loaded: int = 0) -> None:
        """Replicas that serve after so many seconds, if nothing happens to them until then."""
        if new := [Standing(names) for names in self._free_groups()]:
            self._standing += new
            self._world.at(self._world.now + seconds, self._opened, new, reason, loaded)

    def _opened(self, new: Sequence[Standing], reason: str, loaded: int) -> None:
        opened = [one for one in new if one in self._standing]
        for one in opened:
            one.replica = self._make()
        if opened:
            self._record(reason, loaded * len(opened))
            parked, self._parked = self._parked, []
            for request in parked:
                self._add(request)

    def _free_groups(self) -> list[tuple[str, ...]]:
        """Instances that no replica stands on, in groups for one replica each; those in reserve are not mixed in."""
        taken = {name for one in self._standing for name in one.names}
        groups = []
        for in_reserve in (False, True):
            free = [
                one.name
                for one in self._world.ready_instances()
                if one.name not in taken and (one.name in self._rented) == in_reserve
            ]
            groups += [
                tuple(free[n : n + self._size]) for n in range(0, len(free) // self._size * self._size, self._size)
            ]
        return groups

    def _is_rented(self, one: Standing) -> bool:
        return one.names[0] in self._rented

    def _on(self, names: Sequence[str]) -> list[Standing]:
        """Those that stand on any of these instances."""
        return [one for one in self._standing if not set(names).isdisjoint(one.names)]

    def _record(self, reason: str, loaded: int = 0) -> None:
        serving = sum(one.replica is not None for one in self._standing)
        shape = MeshShape(serving, self._shape.stage, self._shape.tensor) if serving else None
        self._world.changes.append(Change(self._world.now, shape, reason, loaded=loaded))


def _smallest(world: World, demand: Demand) -> Decision:
    """The mesh of one replica on the fewest instances."""
    scenario = world.scenario
    latency = of_one_kind(scenario.latency, scenario.assumptions.scale)
    for count in range(1, 65):
        there = [Instance(f"i-{number}", scenario.kind, InstanceState.READY) for number in range(count)]
        try:
            return choose_shape(scenario.spec, there, demand, goal=Goal(), latency=latency)
        except NoFeasibleShape:
            continue
    raise ConfigError(f"the model fits on no 64 instances of {scenario.kind.name}")
