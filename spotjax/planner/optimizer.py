"""Chooses the mesh: SpotServe's Algorithm 1 (Miao et al. 2024), complete and with a price on the change itself.

With a load: among the configurations that keep up with it, the one of least request latency, waiting included;
near-ties by cost. If none keeps up: the most requests per second. Without a load: the most tokens per second.
Says which instances may carry the mesh, not which device serves which position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from spotjax.errors import NoFeasibleShape
from spotjax.meshes.instance import Instance, InstanceState
from spotjax.meshes.layout import LayerRanges
from spotjax.meshes.shape import MeshShape
from spotjax.models.spec import ModelSpec
from spotjax.planner import reasons
from spotjax.planner.cost import MemoryNeed, Roofline
from spotjax.planner.demand import Demand
from spotjax.planner.goal import Goal, Running
from spotjax.planner.options import LatencyOf, Options, options, places_offered
from spotjax.planner.switching import pays_back

__all__ = ["RUNNER_UPS", "Candidate", "Decision", "choose_shape", "places_offered"]

RUNNER_UPS = 8
"""How many candidates that lost a decision tells of."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A configuration that fits.

    Attributes:
      shape: degrees (D, P, M).
      layers: decoder layers of every stage.
      batch: B, sequences that a replica decodes at once.
      hosts: instances that may carry it; together they offer at least D * P places of M devices.
      throughput: tokens per second of all replicas.
      latency: seconds of a typical request once it runs, at full batch.
      memory: bytes on the device that needs the most.
      rate: phi, requests per second that it can serve.
      seconds: latency with the wait for its turn; infinite under overload; equal to ``latency`` if no load is given.
      percentile_seconds: the same for the goal's percentile.
      expected_rate: requests per second expected to be served, losses included (see ``Goal.loss_probability``).
      cost_per_hour: USD for the instances in use.
      instances: number of instances in use.
      reason: one line that says why it was chosen, or why it lost.
    """

    shape: MeshShape
    layers: LayerRanges
    batch: int
    hosts: tuple[Instance, ...]
    throughput: float
    latency: float
    memory: MemoryNeed
    rate: float
    seconds: float
    percentile_seconds: float
    expected_rate: float
    cost_per_hour: float
    instances: int
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Decision(Candidate):
    """The configuration that was chosen, and the best that lost, one for each P and M, best first."""

    runner_ups: tuple[Candidate, ...] = ()


def choose_shape(
    spec: ModelSpec,
    instances: Sequence[Instance],
    demand: Demand,
    wanted: MeshShape | None = None,
    *,
    goal: Goal | None = None,
    latency: LatencyOf | None = None,
    running: Running | None = None,
) -> Decision:
    """The best configuration on the instances that are ready.

    Args:
      spec: the model.
      instances: the fleet.
      demand: typical requests; ``demand.batch`` is the greatest B. Smaller ones, the powers of two, are considered when
        the goal has a load.
      wanted: is taken while it fits, else the same P and M with as many replicas as fit, else any shape.
      goal: what to choose for. Equal otherwise: lower latency, then fewer devices, then smaller P, then smaller M.
      latency: where latencies come from; the analytic roofline by default.
      running: the mesh that serves now. It is kept while it fits unless changing it pays back.

    Raises:
      NoFeasibleShape: nothing fits, or only above the cost ceiling; the message says what would.
      ValueError: ``wanted`` is no shape of this model.
    """
    goal = goal or Goal()
    ready = tuple(instance for instance in instances if instance.state is InstanceState.READY)
    if wanted is not None:
        _check_wanted(spec, wanted)
    batches = [demand.batch] if goal.load is None else _batches(demand.batch)
    of_kind = latency or (lambda kind: Roofline(spec, kind))
    table = Options(list(options(spec, ready, demand, batches, of_kind)), goal)
    if not len(table):
        raise NoFeasibleShape(reasons.what_would_fit(spec, ready, demand))
    order = _ranked(table, goal)
    best = int(order[0]) if wanted is None else _nearest(table, order, wanted)
    kept = _current_row(table, order, running) if wanted is None else None
    if kept is not None and running is not None and not pays_back(table, kept, best, goal, running):
        best = kept
    chosen = _candidate(table, best)
    return Decision(
        **{name: getattr(chosen, name) for name in Candidate.__slots__ if name != "reason"},
        reason=reasons.why_chosen(chosen, goal, wanted, running if best == kept else None),
        runner_ups=tuple(
            replace(loser, reason=reasons.why_lost(loser, chosen, goal)) for loser in _losers(table, order, best)
        ),
    )


def _batches(most: int) -> list[int]:
    return sorted({*(1 << exponent for exponent in range(most.bit_length())), most})


def _ranked(table: Options, goal: Goal) -> NDArray[np.intp]:
    """Row numbers, best first; those above the cost ceiling are left out.

    Raises:
      NoFeasibleShape: all are above it.
    """
    devices = table.data * table.stage * table.tensor
    last = (table.tensor, table.stage, devices)
    worse = np.zeros(len(table))
    if goal.loss_probability > 0:
        most = table.expected_rate.max()
        worse = np.where(table.expected_rate >= most * (1 - goal.near_tie), 0.0, 1 - table.expected_rate / most)
    if goal.load is None:
        order = np.lexsort((*last, table.service, -table.tokens, worse))
    else:
        keeps_up = (table.rate > goal.load.rate) & (worse == 0)
        target = goal.latency_seconds
        meets = keeps_up & (table.percentile_seconds <= (np.inf if target is None else target))
        if target is None or not meets.any():
            # Near-ties with the least latency: the cheapest comes first.
            least = np.where(keeps_up, table.seconds, np.inf).min()
            meets = keeps_up & (table.seconds <= least * (1 + goal.near_tie))
        kind = np.select([meets, keeps_up], [0, 1], 2)
        first = np.select([meets, keeps_up], [table.cost, table.seconds], worse)
        second = np.select([meets, keeps_up], [table.seconds, table.cost], -table.rate)
        order = np.lexsort((*last, table.cost, second, first, kind))
    if goal.cost_per_hour is not None:
        affordable = order[table.cost[order] <= goal.cost_per_hour]
        if not len(affordable):
            raise NoFeasibleShape(
                f"the cheapest configuration costs {table.cost.min():.2f} USD per hour, the ceiling is "
                f"{goal.cost_per_hour:.2f}: raise it or use cheaper instances"
            )
        return affordable
    return order


def _candidate(table: Options, row: int) -> Candidate:
    option = table.options[table.option[row]]
    return Candidate(
        shape=table.shape(row),
        layers=option.layers,
        batch=option.batch,
        hosts=option.hosts.instances,
        throughput=float(table.tokens[row]),
        latency=option.service,
        memory=option.memory,
        rate=float(table.rate[row]),
        seconds=float(table.seconds[row]),
        percentile_seconds=float(table.percentile_seconds[row]),
        expected_rate=float(table.expected_rate[row]),
        cost_per_hour=float(table.cost[row]),
        instances=int(table.instances[row]),
    )


def _losers(table: Options, order: NDArray[np.intp], best: int) -> list[Candidate]:
    """The best of every other P and M, and of the chosen ones' other replicas and batches, in order of rank."""
    seen: set[tuple[int, int]] = set()
    losers: list[Candidate] = []
    for row in map(int, order):
        kind = int(table.stage[row]), int(table.tensor[row])
        if kind in seen or table.shape(row) == table.shape(best):
            continue
        seen.add(kind)
        losers.append(_candidate(table, row))
        if len(losers) == RUNNER_UPS:
            break
    return losers


def _check_wanted(spec: ModelSpec, wanted: MeshShape) -> None:
    c = spec.config
    if c.heads % wanted.tensor:
        raise ValueError(f"wanted mesh {wanted}: tensor degree {wanted.tensor} must divide the {c.heads} query heads")
    if wanted.stage > c.layers:
        raise ValueError(f"wanted mesh {wanted}: {c.layers} layers cannot fill {wanted.stage} stages")


def _nearest(table: Options, order: NDArray[np.intp], wanted: MeshShape) -> int:
    """The wanted shape; else its P and M with as many replicas as fit; else the best of all."""
    same = order[
        (table.stage[order] == wanted.stage)
        & (table.tensor[order] == wanted.tensor)
        & (table.data[order] <= wanted.data)
    ]
    return int(same[np.argmax(table.data[same])] if len(same) else order[0])


def _current_row(table: Options, order: NDArray[np.intp], running: Running | None) -> int | None:
    """The best row of the shape that runs now, if that still fits; of any D, if changing that stalls nobody."""
    if running is None:
        return None
    shape = running.shape
    alike = (table.stage[order] == shape.stage) & (table.tensor[order] == shape.tensor)
    same = order[alike & ((table.data[order] == shape.data) | (not running.stalls_same))]
    return int(same[0]) if len(same) else None
