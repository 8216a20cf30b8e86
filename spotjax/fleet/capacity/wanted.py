"""How many instances the load needs: the planner's choice as if more could be had, within the operator's limits. Pure.

Which machines these are to be, and when, is ``next_action``'s to say.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import ceil, exp, log

from spotjax.errors import NoFeasibleShape
from spotjax.fleet.capacity.file import CapacitySettings
from spotjax.fleet.capacity.load import Measured
from spotjax.fleet.change import Planning
from spotjax.meshes.instance import Instance, InstanceType
from spotjax.meshes.placement import Placement
from spotjax.meshes.shape import MeshShape
from spotjax.planner.capacity import plan_capacity
from spotjax.planner.cost import Roofline
from spotjax.planner.demand import Demand
from spotjax.planner.goal import Goal
from spotjax.planner.latency import LatencyModel, Scaled, step_seconds
from spotjax.planner.load import Load
from spotjax.planner.optimizer import Decision
from spotjax.planner.options import LatencyOf, service_seconds

STEPS, ROUGH_STEPS = 1.1, 2.0
"""Rates and their variation are rounded to powers of these, so that noise changes nothing."""
LENGTH_STEPS = 1.25
"""Lengths to powers of this."""
ALMOST_NOTHING = 1e-6
"""Sequences per second of an idle service: what one replica takes is found like everything else."""
CHEAPEST = 1e9
"""See ``Goal.near_tie``: of those that keep up, the cheapest."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to have.

    Attributes:
      instances: in all, those that were not rented by this controller included.
      why: one line.
      target: the mesh that this is for; None where no mesh was looked for.
    """

    instances: int
    why: str
    target: Decision | None = None


@dataclass(frozen=True)
class Basis:
    """What the load is planned on.

    Attributes:
      planning: the service's.
      instances: those that join or are ready.
      kind: what can be had more of, with its prices.
      scale: times are so many times those of the planner's latency model.
    """

    planning: Planning
    instances: tuple[Instance, ...]
    kind: InstanceType
    scale: float = 1.0

    def latency(self) -> LatencyOf:
        """Seconds of the model, as measured."""
        of_kind = self.planning.latency or (lambda kind: Roofline(self.planning.spec, kind))

        def scaled(kind: InstanceType) -> LatencyModel:
            return Scaled(of_kind(kind), self.scale)

        return scaled


def scale_of(planning: Planning, placement: Placement, kind: InstanceType, measured: Measured) -> float:
    """How many times as long requests take as the planner predicts for the mesh that runs; 0 while nobody can tell.

    Args:
      planning: the service's.
      placement: the mesh.
      kind: of its instances; the slowest if there are several.
      measured: sequences at once, and how long they took.
    """
    if not measured.service_seconds or not measured.batch:
        return 0.0
    model = planning.latency(kind) if planning.latency else Roofline(planning.spec, kind)
    batch = max(1, round(measured.batch / placement.shape.data))
    one = MeshShape(1, placement.shape.stage, placement.shape.tensor)
    demand = demand_of(planning.demand, measured)
    step = step_seconds(model, one, placement.layers, batch, demand.context)
    return measured.service_seconds / service_seconds(model, one, placement.layers, batch, demand, step)


def demand_of(demand: Demand, measured: Measured) -> Demand:
    """Typical requests as they were measured, as far as they were."""
    return replace(
        demand,
        prompt=round(rounded(measured.prompt, LENGTH_STEPS)) or demand.prompt,
        output=round(rounded(measured.output, LENGTH_STEPS)) or demand.output,
    )


def wanted(
    settings: CapacitySettings, measured: Measured, basis: Basis | None, *, floor: int = 0, affordable: float = 1e9
) -> Wanted:
    """How many instances there should be.

    Args:
      settings: the operator's limits.
      measured: the load.
      basis: None while no instance has ever joined, so that nothing can be planned.
      floor: instances that an operator has asked for.
      affordable: how many the caps on spending allow at most.
    """
    idle = measured.idle_seconds >= settings.idle_seconds and not floor
    if idle and not settings.idle:
        return Wanted(0, f"idle for {measured.idle_seconds:.0f} s")
    least = settings.idle if idle else max(settings.least, floor)
    most = max(least, int(min(affordable, settings.most)))
    if basis is None:
        return Wanted(least, "no instance has told yet what it can do")
    rate = measured.load.rate / settings.utilisation + measured.queued / settings.window_seconds
    scvs = (rounded(value, ROUGH_STEPS) for value in (measured.load.arrival_scv, measured.load.service_scv))
    load = Load(rounded(rate) or ALMOST_NOTHING, *scvs)
    goal = (
        Goal(load, settings.latency_seconds, settings.percentile)
        if settings.latency_seconds
        else Goal(load, near_tie=CHEAPEST)
    )
    try:
        target = _target(basis, demand_of(basis.planning.demand, measured), goal, most)
    except NoFeasibleShape as problem:
        return Wanted(most, f"the model fits on no {most} instances: {problem}")
    per_replica = target.instances / target.shape.data
    running = ceil(ceil(measured.running / basis.planning.demand.batch) * per_replica)
    count = min(most, max(least, running, target.instances + (0 if idle else settings.spares)))
    short = "" if target.rate > load.rate else ", which is too few"
    seen = f"{measured.load.rate:.3g} sequences/s, {measured.running} running, {measured.queued} queued"
    return Wanted(count, f"{seen}: mesh {target.shape}{short}", target)


def _target(basis: Basis, demand: Demand, goal: Goal, most: int) -> Decision:
    """The mesh for the load, on up to ``most`` instances."""
    instances = basis.instances[:most]
    # Those of the kind that can be had more of are as good as ones that are still to come.
    there = Counter((one.type, one.on_demand) for one in instances if one.type != basis.kind)
    return _chosen(basis.planning, tuple(there.items()), basis.kind, basis.scale, demand, goal, most)


@lru_cache(maxsize=256)
def _chosen(
    planning: Planning,
    there: tuple[tuple[tuple[InstanceType, bool], int], ...],
    kind: InstanceType,
    scale: float,
    demand: Demand,
    goal: Goal,
    most: int,
) -> Decision:
    """The same for instances by what they are: one that only has another name changes nothing."""
    instances = [
        Instance(f"{number}-{each}", what, on_demand=on_demand)
        for number, ((what, on_demand), count) in enumerate(there)
        for each in range(count)
    ]
    basis = Basis(planning, tuple(instances), kind, scale)
    return plan_capacity(
        planning.spec, instances, demand, goal, kind, most - len(instances), spares=0, latency=basis.latency(),
        wanted=planning.wanted,
    ).target  # fmt: skip


@dataclass
class Steady:
    """Follows what is wanted: up at once, down when it was no more for so long (as Kubernetes' autoscaler does).

    Args:
      seconds: how long.
    """

    seconds: float
    _past: deque[tuple[float, Wanted]] = field(default_factory=deque)

    def add(self, now: float, newest: Wanted) -> Wanted:
        """What to follow at monotonic seconds ``now``."""
        while self._past and self._past[0][0] <= now - self.seconds:
            self._past.popleft()
        while self._past and self._past[-1][1].instances <= newest.instances:
            self._past.pop()
        self._past.append((now, newest))
        return self._past[0][1]


def affordable(settings: CapacitySettings, price: float) -> float:
    """Instances at a price, in USD per hour, that the cap on an hour allows."""
    return settings.cost_per_hour // price if settings.cost_per_hour and price else float("inf")


def at_prices(kind: InstanceType, spot: float, on_demand: float) -> InstanceType:
    """An instance type at the prices of the offers; a price of nothing counts as one, for cheaper must mean fewer."""
    return replace(kind, spot_price=spot or 1.0, on_demand_price=on_demand or spot or 1.0)


def rounded(value: float, steps: float = STEPS) -> float:
    """The nearest power of ``steps``; 0 stays 0."""
    return exp(round(log(value) / log(steps)) * log(steps)) if value > 1e-9 else 0.0
