"""How many instances to request or to release: SpotServe's instance delta. Requests nothing itself.

The best configuration is chosen as if more instances could be had (Miao et al. 2024, Algorithm 1). What is missing is
requested as spot and on demand at once, so that a spot request that fails costs no wait. What is too much is released,
on demand first, but a few spares are kept for the next preemption.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from spotjax.meshes.instance import Instance, InstanceState, InstanceType
from spotjax.meshes.shape import MeshShape
from spotjax.models.spec import ModelSpec
from spotjax.planner.cost import Roofline
from spotjax.planner.demand import Demand
from spotjax.planner.goal import Goal
from spotjax.planner.optimizer import Decision, choose_shape
from spotjax.planner.options import LatencyOf

SPARES = 2
"""Instances kept beyond those in use, as in SpotServe."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """What to ask of the provider.

    Attributes:
      target: the configuration to aim for, partly on instances that are not there yet.
      request_spot: spot instances to request.
      request_on_demand: on-demand instances to request at the same time; released again when spot ones come.
      release: names of instances to give back, in order.
      spares: instances that are kept although the target does not use them.
    """

    target: Decision
    request_spot: int
    request_on_demand: int
    release: tuple[str, ...]
    spares: int = 0


def plan_capacity(
    spec: ModelSpec,
    instances: Sequence[Instance],
    demand: Demand,
    goal: Goal,
    offered: InstanceType,
    most_more: int,
    *,
    spares: int = SPARES,
    on_demand: bool = True,
    latency: LatencyOf | None = None,
    wanted: MeshShape | None = None,
) -> Capacity:
    """The instance delta.

    Args:
      spec: the model.
      instances: the fleet; those that join count as there, those with a notice as gone.
      demand: typical requests.
      goal: what to choose for; its load decides how much is enough.
      offered: what can be requested.
      most_more: how many of those at most.
      spares: see SPARES.
      on_demand: whether on-demand instances may be requested.
      latency, wanted: see ``choose_shape``.

    Raises:
      NoFeasibleShape: the model fits on no mesh even with ``most_more`` more instances.
    """
    coming = (InstanceState.READY, InstanceState.JOINING)
    there = [replace(instance, state=InstanceState.READY) for instance in instances if instance.state in coming]
    more = [Instance(f"requested-{number}", offered) for number in range(most_more)]
    of_kind = latency or (lambda kind: Roofline(spec, kind))
    target = choose_shape(spec, [*there, *more], demand, wanted, goal=goal, latency=of_kind)
    missing = target.instances - len(there)
    if missing > 0:
        return Capacity(target, missing, missing if on_demand else 0, ())
    # On demand first, then the dearest; of equals the last, so that the order of the fleet stays.
    order = sorted(range(len(there)), key=lambda number: (not there[number].on_demand, -there[number].price, -number))
    surplus = max(0, -missing - spares)
    release = tuple(there[number].name for number in order[:surplus])
    return Capacity(target, 0, 0, release, spares=-missing - surplus)
