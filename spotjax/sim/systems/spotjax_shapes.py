"""Which mesh Spotjax takes: the planner's choice for the load that was seen, made once for every situation.

Loads and horizons are rounded, so that noise changes no mesh and equal situations are equal. Places nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import exp, log

from spotjax.errors import NoFeasibleShape
from spotjax.fleet.change import Planning, decide
from spotjax.meshes.instance import Instance, InstanceType
from spotjax.meshes.shape import MeshShape
from spotjax.planner.demand import Demand
from spotjax.planner.goal import Goal, Running
from spotjax.planner.latency import LatencyModel, Scaled
from spotjax.planner.load import Load, LoadEstimator
from spotjax.planner.optimizer import Decision

FEWEST_ARRIVALS = 16
"""Before so many requests came, the load is not known, and the mesh is the one of the highest throughput."""
RATE_STEPS, ROUGH_STEPS = 1.1, 2.0
"""Rates, and all else, are rounded to powers of these."""
LEAST_GAIN = 0.1
"""See ``Running``."""
ANY_NUMBER = 1 << 20


def typical_demand(prompts: Sequence[int], outputs: Sequence[int], batch: int, room: float) -> Demand:
    """What operators would configure: the mean request, and KV for ``batch`` of these, ``room`` times, or the longest.

    Prompts and outputs are those of all requests to come; only their number over time is left to be observed.
    """
    if not prompts:
        return replace(Demand(batch), kv_pages=int(room * Demand(batch).pages))
    prompt, output = (max(1, round(sum(lengths) / len(lengths))) for lengths in (prompts, outputs))
    demand = Demand(batch, prompt, output)
    longest = max(map(sum, zip(prompts, outputs, strict=True)))
    return replace(demand, kv_pages=max(int(room * demand.pages), -(-longest // demand.page_size)))


@dataclass
class Shapes:
    """Chooses meshes on a fleet of one instance type.

    Args:
      planning: what every change is planned with, but for the load.
      goal: what meshes are chosen for, but for the load.
      fixed: P and M of the first choice are kept, only D changes.
      smoothing_seconds: see ``LoadEstimator``.
    """

    planning: Planning
    goal: Goal
    fixed: bool
    smoothing_seconds: float
    stall_seconds: float
    _arrivals: int = 0
    _chosen: dict[object, Decision | str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._estimator = LoadEstimator(self.smoothing_seconds)

    def arrived(self, now: float) -> None:
        """A request came."""
        self._arrivals += 1
        self._estimator.arrived(now)

    def load(self, now: float) -> Load | None:
        """As far as it was observed, rounded; None while that is not far enough."""
        if self._arrivals < FEWEST_ARRIVALS:
            return None
        seen = self._estimator.load(now)
        return Load(_rounded(seen.rate, RATE_STEPS), _rounded(seen.arrival_scv), _rounded(seen.service_scv))

    def decide(
        self, now: float, ready: Sequence[Instance], serving: MeshShape | None, horizon_seconds: float
    ) -> Decision:
        """The mesh to have on these instances.

        Args:
          now: simulated seconds.
          ready: all of one type.
          serving: the mesh that runs.
          horizon_seconds: until the next change is forced, as far as one can tell.

        Raises:
          NoFeasibleShape: none fits.
        """
        load, horizon = self.load(now), _rounded(horizon_seconds)
        on_demand = sum(instance.on_demand for instance in ready)
        situation = len(ready), on_demand, load, serving, horizon
        if situation not in self._chosen:
            self._chosen[situation] = self._decide(ready, load, serving, horizon)
        chosen = self._chosen[situation]
        if isinstance(chosen, str):
            raise NoFeasibleShape(chosen)
        return replace(chosen, hosts=tuple(sorted(ready, key=lambda instance: instance.price)))

    def _decide(
        self, ready: Sequence[Instance], load: Load | None, serving: MeshShape | None, horizon: float
    ) -> Decision | str:
        """A decision, or why there is none."""
        planning = replace(self.planning, goal=replace(self.goal, load=load))
        running = (
            None
            if serving is None
            else Running(serving, self.stall_seconds, horizon, stalls_same=False, least_gain=LEAST_GAIN)
        )
        wanted = self.planning.wanted
        try:
            decision = decide(planning, ready, running)
        except NoFeasibleShape as problem:
            return str(problem)
        if self.fixed and wanted is None:
            wanted = MeshShape(ANY_NUMBER, decision.shape.stage, decision.shape.tensor)
            self.planning = replace(self.planning, wanted=wanted)
        if wanted is not None and (decision.shape.stage, decision.shape.tensor) != (wanted.stage, wanted.tensor):
            return f"no replica of {wanted.stage} stages of {wanted.tensor} devices fits"
        return decision


def of_one_kind(model: LatencyModel, scale: float) -> Callable[[InstanceType], LatencyModel]:
    """The same times for every instance type: there is only one in a simulation."""
    scaled = Scaled(model, scale)
    return lambda kind: scaled


def _rounded(value: float, steps: float = ROUGH_STEPS) -> float:
    return exp(round(log(value) / log(steps)) * log(steps)) if value > 1e-9 else 0.0
