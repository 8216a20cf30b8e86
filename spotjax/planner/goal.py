"""What the operator wants of the service, and what it costs to change it. Data only."""

from __future__ import annotations

from dataclasses import dataclass

from spotjax.meshes.shape import MeshShape
from spotjax.planner.load import Load


@dataclass(frozen=True, slots=True)
class Goal:
    """What a mesh is chosen for.

    Attributes:
      load: what arrives; without it the shape with the most throughput is chosen.
      latency_seconds: target for the latency of a request, waiting included, or None.
      percentile: share of requests, in (0, 1), that the target is for.
      cost_per_hour: most USD per hour that the instances in use may cost, or None.
      near_tie: latencies, or expected rates, that differ by less than this share count as equal, and cost decides.
      loss_probability: chance, in [0, 1], that one instance goes before the next decision. Above 0, shapes are
        preferred that are expected to serve the most requests with that, until the mesh is changed.

    Raises:
      ValueError: a number is out of range.
    """

    load: Load | None = None
    latency_seconds: float | None = None
    percentile: float = 0.99
    cost_per_hour: float | None = None
    near_tie: float = 0.02
    loss_probability: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.percentile < 1:
            raise ValueError(f"percentile must be between 0 and 1, got {self.percentile}")
        if not 0 <= self.loss_probability <= 1:
            raise ValueError(f"loss_probability must be in [0, 1], got {self.loss_probability}")
        if self.latency_seconds is not None and self.load is None:
            raise ValueError("a latency target needs a load: without one nobody waits")


@dataclass(frozen=True, slots=True)
class Running:
    """The mesh that serves now, and what a change would cost.

    Attributes:
      shape: degrees (D, P, M).
      stall_seconds: expected pause of all requests while the mesh changes.
      horizon_seconds: expected time until the next change is forced, such as the mean time between preemptions.
      stalls_same: a change of D alone stalls requests too. Where it does not, since replicas that stay as they are go
        on without stopping, D is always free to change.
      least_gain: share of its latency that a request must be spared at least: so good are predictions.
    """

    shape: MeshShape
    stall_seconds: float
    horizon_seconds: float
    stalls_same: bool = True
    least_gain: float = 0.0
