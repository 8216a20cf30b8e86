"""Why a configuration was chosen, why others lost, and what would fit where nothing does: sentences for people."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import TYPE_CHECKING

from spotjax.meshes.instance import Instance, InstanceType
from spotjax.meshes.layout import split_layers, tensor_degrees
from spotjax.meshes.shape import MeshShape
from spotjax.models.spec import ModelSpec
from spotjax.planner.cost import memory_need
from spotjax.planner.demand import Demand
from spotjax.planner.goal import Goal, Running
from spotjax.planner.options import places_offered

if TYPE_CHECKING:
    from spotjax.planner.optimizer import Candidate


def why_chosen(best: Candidate, goal: Goal, wanted: MeshShape | None, kept: Running | None) -> str:
    """One line."""
    if wanted == best.shape:
        return "as wanted"
    if kept is not None:
        return (
            f"serves now; a change stalls {kept.stall_seconds:.3g} s and does not pay back within "
            f"{kept.horizon_seconds:.4g} s"
        )
    most = _merit(best, goal)
    if wanted is None:
        return most
    if (best.shape.stage, best.shape.tensor) == (wanted.stage, wanted.tensor):
        return f"wanted {wanted} does not fit, {best.shape.data} of its replicas do"
    return f"wanted {wanted} does not fit with any number of replicas; {most}"


def _merit(best: Candidate, goal: Goal) -> str:
    if goal.load is None:
        return f"most throughput, {best.throughput:.4g} tokens/s"
    if best.seconds == inf:
        return (
            f"nothing keeps up with {goal.load.rate:.4g} requests/s; this serves the most, {best.rate:.4g} requests/s"
        )
    if goal.latency_seconds is not None and best.percentile_seconds <= goal.latency_seconds:
        return (
            f"cheapest that keeps {goal.percentile:.4g} of requests under {goal.latency_seconds:.4g} s: "
            f"{best.percentile_seconds:.4g} s, {best.cost_per_hour:.4g} USD/h"
        )
    missed = "" if goal.latency_seconds is None else f"nothing meets {goal.latency_seconds:.4g} s; "
    return (
        f"{missed}least latency, {best.seconds:.4g} s with {best.seconds - best.latency:.3g} s of waiting, "
        f"cheapest within {100 * goal.near_tie:.3g}%"
    )


def why_lost(loser: Candidate, best: Candidate, goal: Goal) -> str:
    """One line."""
    if goal.load is not None:
        return _why_lost_under_load(loser, best, goal)
    if goal.loss_probability > 0 and loser.expected_rate < best.expected_rate * (1 - goal.near_tie):
        return _loses_more(loser, best)
    if loser.throughput < best.throughput:
        less = 100 * (1 - loser.throughput / best.throughput)
        return f"{less:.2g}% less throughput: {loser.throughput:.4g} tokens/s, not {best.throughput:.4g}"
    if loser.throughput > best.throughput:
        return f"another shape was preferred; this one has {loser.throughput:.4g} tokens/s, not {best.throughput:.4g}"
    if loser.latency > best.latency:
        return f"same throughput, higher latency: {loser.latency:.4g} s, not {best.latency:.4g} s"
    if loser.shape.devices > best.shape.devices:
        return f"same throughput and latency on more devices: {loser.shape.devices}, not {best.shape.devices}"
    return "same throughput, latency and devices; more stages or a higher tensor degree"


def _why_lost_under_load(loser: Candidate, best: Candidate, goal: Goal) -> str:
    assert goal.load is not None
    if loser.seconds == inf:
        if best.seconds == inf:
            return f"serves less, {loser.rate:.4g} requests/s, not {best.rate:.4g}"
        return f"cannot keep up with {goal.load.rate:.4g} requests/s, serves {loser.rate:.4g}"
    if goal.loss_probability > 0 and loser.expected_rate < best.expected_rate * (1 - goal.near_tie):
        return _loses_more(loser, best)
    target = goal.latency_seconds
    if target is not None and best.percentile_seconds <= target < loser.percentile_seconds:
        return f"misses the target: {loser.percentile_seconds:.4g} s for {goal.percentile:.4g} of requests"
    if loser.cost_per_hour > best.cost_per_hour:
        than = f"{loser.seconds:.4g} s, not {best.seconds:.4g} s"
        return f"costs more: {loser.cost_per_hour:.4g} USD/h, not {best.cost_per_hour:.4g} ({than})"
    if loser.seconds > best.seconds:
        return f"higher latency: {loser.seconds:.4g} s, not {best.seconds:.4g} s"
    return "as fast and as cheap; more devices, more stages or a higher tensor degree"


def _loses_more(loser: Candidate, best: Candidate) -> str:
    return (
        f"expected to serve less if an instance goes: {loser.expected_rate:.4g} requests/s, not "
        f"{best.expected_rate:.4g}"
    )


def what_would_fit(spec: ModelSpec, ready: Sequence[Instance], demand: Demand) -> str:
    """The least number of devices, or the least memory, that one replica would need."""
    if not ready:
        return "no instance is ready; add at least one"
    shapes = [
        MeshShape(1, stages, tensor)
        for tensor in tensor_degrees(spec, max(i.type.devices * i.type.tensor_instances for i in ready))
        for stages in range(1, spec.config.layers + 1)
    ]
    needs = {shape: memory_need(spec, shape, split_layers(spec.config.layers, shape.stage), demand) for shape in shapes}
    short: list[tuple[int, MeshShape, InstanceType]] = [
        (shape.stage * shape.tensor, shape, kind)
        for kind in dict.fromkeys(instance.type for instance in ready)
        for shape in shapes
        if kind.span(shape.tensor) and needs[shape].total <= kind.memory_bytes
    ]
    if not short:
        shape = min(shapes, key=lambda shape: (needs[shape].total, shape.devices))
        most = max(instance.type.memory_bytes for instance in ready)
        return (
            f"even split as {shape} the model needs {_gib(needs[shape].total)} on a device (parameters "
            f"{_gib(needs[shape].parameters)}, KV {_gib(needs[shape].kv)}), devices have at most {_gib(most)}: "
            "use devices with more memory, or fewer KV pages"
        )
    _, shape, kind = min(short, key=lambda entry: (entry[0], entry[1]))
    fits = [i for i in ready if i.type.memory_bytes >= needs[shape].total]
    more = shape.stage - places_offered(fits, shape.tensor)
    return (
        f"one replica needs at least {shape.devices} devices like those of {kind.name} ({shape}, "
        f"{_gib(needs[shape].total)} each): add {more} more {'place' if more == 1 else 'places'} of {shape.tensor} "
        f"such {'device' if shape.tensor == 1 else 'devices'}"
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.3g} GiB"
