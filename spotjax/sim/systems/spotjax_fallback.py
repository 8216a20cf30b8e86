"""On-demand instances for a simulated Spotjax: requested when the fleet is too small for the load, given back after.

How many is ``planner.capacity``'s to say. Off unless asked for: a comparison gives all systems the same instances.
"""

from __future__ import annotations

from dataclasses import replace

from spotjax.errors import NoFeasibleShape
from spotjax.fleet.change import Planning
from spotjax.meshes.instance import InstanceState
from spotjax.planner.capacity import plan_capacity
from spotjax.planner.goal import Goal
from spotjax.planner.load import Load
from spotjax.sim.systems.spotjax_options import SpotjaxOptions
from spotjax.sim.world import System, World

PREFIX = "on-demand"


class Fallback:
    """Keeps the fleet large enough.

    Args:
      world: where instances are.
      system: told about those that come.
      planning: what meshes are planned with.
      options: see there.
    """

    def __init__(self, world: World, system: System, planning: Planning, options: SpotjaxOptions) -> None:
        self._world, self._system, self._planning, self._options = world, system, planning, options
        self._requests = 0

    def adapt(self, load: Load | None) -> bool:
        """Requests what is missing, and marks what is too much as leaving. Returns: whether anything is."""
        if load is None:
            return False
        world, options = self._world, self._options
        there = [one for one in world.instances.values() if one.state is not InstanceState.DRAINING]
        rented = sum(one.on_demand for one in there)
        goal = Goal(load, near_tie=options.fallback_tie)
        most = max(0, options.most_on_demand - rented)
        try:
            capacity = plan_capacity(
                self._planning.spec, there, self._planning.demand, goal, world.scenario.kind, most,
                spares=0, latency=self._planning.latency,
            )  # fmt: skip
        except NoFeasibleShape:
            return False
        if missing := min(most, capacity.request_on_demand):
            self._requests += 1
            world.request_on_demand(self._system, missing, f"{PREFIX}-{self._requests}")
        leaving = [name for name in capacity.release if world.instances[name].on_demand]
        for name in leaving:
            world.instances[name] = replace(world.instances[name], state=InstanceState.DRAINING)
        return bool(leaving)

    def give_back(self, standing: frozenset[str]) -> list[str]:
        """Releases those that are leaving and that the mesh does not stand on. Returns: their names."""
        draining = [one.name for one in self._world.instances.values() if one.state is InstanceState.DRAINING]
        left = [name for name in draining if name not in standing]
        for name in left:
            self._world.release(name)
        return left
