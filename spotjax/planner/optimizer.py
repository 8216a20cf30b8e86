"""Chooses the mesh shape: every (D, P, M) that fits the instances, and the one with the most throughput.

SpotServe's Algorithm 1 (Miao et al. 2024) without its load term. Unlike the original, tensor degrees are all divisors
of the query heads and layers split unevenly, so instances that a power of two leaves idle are used.
Says which instances may carry the shape, not which device serves which position.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from spotjax.errors import NoFeasibleShape
from spotjax.meshes.instance import Instance, InstanceState, InstanceType
from spotjax.meshes.layout import LayerRanges, split_layers, tensor_degrees
from spotjax.meshes.shape import MeshShape
from spotjax.models.spec import ModelSpec
from spotjax.planner.cost import MemoryNeed, memory_need, prefill_seconds, step_seconds, throughput
from spotjax.planner.demand import Demand

RUNNER_UPS = 8
"""How many candidates that lost a decision tells of."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A shape that fits.

    Attributes:
      shape: degrees (D, P, M).
      layers: decoder layers of every stage.
      hosts: instances that may carry it; together they offer at least D * P places of M devices.
      throughput: tokens per second of all replicas.
      latency: seconds of a typical request once it runs, at full batch.
      memory: bytes on the device that needs the most.
      reason: one line that says why it was chosen, or why it lost.
    """

    shape: MeshShape
    layers: LayerRanges
    hosts: tuple[Instance, ...]
    throughput: float
    latency: float
    memory: MemoryNeed
    reason: str = ""

    @property
    def _rank(self) -> tuple[float, float, int, int, int]:
        shape = self.shape
        return -self.throughput, self.latency, shape.devices, shape.stage, shape.tensor


@dataclass(frozen=True, slots=True)
class Decision(Candidate):
    """The shape that was chosen, and the best that lost, best first."""

    runner_ups: tuple[Candidate, ...] = ()


def places_offered(instances: Sequence[Instance], tensor: int) -> int:
    """How many disjoint groups of ``tensor`` devices the instances offer; a group never crosses instances."""
    return sum(instance.type.devices // tensor for instance in instances)


def choose_shape(
    spec: ModelSpec, instances: Sequence[Instance], demand: Demand, wanted: MeshShape | None = None
) -> Decision:
    """The shape with the most throughput on the instances that are ready.

    Equal throughput: lower latency, then fewer devices, then smaller P, then smaller M. A ``wanted`` shape is taken
    while it fits, else the same P and M with as many replicas as fit, else any shape.

    Raises:
      NoFeasibleShape: nothing fits; the message says what would.
      ValueError: ``wanted`` is no shape of this model.
    """
    ready = tuple(instance for instance in instances if instance.state is InstanceState.READY)
    if wanted is not None:
        _check_wanted(spec, wanted)
    found = sorted(_candidates(spec, ready, demand), key=lambda candidate: candidate._rank)
    if not found:
        raise NoFeasibleShape(_what_would_fit(spec, ready, demand))
    best = found[0] if wanted is None else _nearest(found, wanted)
    losers = [candidate for candidate in found if candidate.shape != best.shape][:RUNNER_UPS]
    return Decision(
        shape=best.shape,
        layers=best.layers,
        hosts=best.hosts,
        throughput=best.throughput,
        latency=best.latency,
        memory=best.memory,
        reason=_why_chosen(best, wanted),
        runner_ups=tuple(replace(loser, reason=_why_lost(loser, best)) for loser in losers),
    )


def _candidates(spec: ModelSpec, ready: Sequence[Instance], demand: Demand) -> Iterator[Candidate]:
    """Every shape that fits, once, on the fastest instances that offer enough places for it."""
    kinds = _kinds(ready)
    for tensor in tensor_degrees(spec, max((kind.devices for kind in kinds), default=0)):
        for stages in range(1, min(spec.config.layers, places_offered(ready, tensor)) + 1):
            layers = split_layers(spec.config.layers, stages)
            one = MeshShape(1, stages, tensor)
            memory = memory_need(spec, one, layers, demand)
            seconds = {
                kind: step_seconds(spec, one, layers, kind, demand.batch, demand.context)
                for kind in kinds
                if kind.devices >= tensor and kind.memory_bytes >= memory.total
            }
            counted = 0
            for slowest in sorted(seconds, key=lambda kind: (seconds[kind], kind.name)):
                hosts = tuple(i for i in ready if i.type in seconds and seconds[i.type] <= seconds[slowest])
                replicas = places_offered(hosts, tensor) // stages
                prefill = prefill_seconds(spec, one, layers, slowest, demand.prompt)
                for data in range(counted + 1, replicas + 1):
                    shape = MeshShape(data, stages, tensor)
                    rate = throughput(spec, shape, layers, slowest, demand.batch, demand.context)
                    latency = prefill + demand.output * seconds[slowest]
                    yield Candidate(shape, layers, hosts, rate, latency, memory)
                counted = max(counted, replicas)


def _kinds(instances: Sequence[Instance]) -> tuple[InstanceType, ...]:
    """Distinct instance types in order of first appearance."""
    return tuple(dict.fromkeys(instance.type for instance in instances))


def _check_wanted(spec: ModelSpec, wanted: MeshShape) -> None:
    c = spec.config
    if c.heads % wanted.tensor:
        raise ValueError(f"wanted mesh {wanted}: tensor degree {wanted.tensor} must divide the {c.heads} query heads")
    if wanted.stage > c.layers:
        raise ValueError(f"wanted mesh {wanted}: {c.layers} layers cannot fill {wanted.stage} stages")


def _nearest(found: Sequence[Candidate], wanted: MeshShape) -> Candidate:
    """The wanted shape; else its P and M with as many replicas as fit; else the best of all."""
    same = [
        candidate
        for candidate in found
        if (candidate.shape.stage, candidate.shape.tensor) == (wanted.stage, wanted.tensor)
        and candidate.shape.data <= wanted.data
    ]
    return max(same, key=lambda candidate: candidate.shape.data) if same else found[0]


def _why_chosen(best: Candidate, wanted: MeshShape | None) -> str:
    if wanted == best.shape:
        return "as wanted"
    most = f"most throughput, {best.throughput:.4g} tokens/s"
    if wanted is None:
        return most
    if (best.shape.stage, best.shape.tensor) == (wanted.stage, wanted.tensor):
        return f"wanted {wanted} does not fit, {best.shape.data} of its replicas do"
    return f"wanted {wanted} does not fit with any number of replicas; {most}"


def _why_lost(loser: Candidate, best: Candidate) -> str:
    if loser.throughput < best.throughput:
        less = 100 * (1 - loser.throughput / best.throughput)
        return f"{less:.2g}% less throughput: {loser.throughput:.4g} tokens/s, not {best.throughput:.4g}"
    if loser.throughput > best.throughput:
        return f"another shape was wanted; this one has {loser.throughput:.4g} tokens/s, not {best.throughput:.4g}"
    if loser.latency > best.latency:
        return f"same throughput, higher latency: {loser.latency:.4g} s, not {best.latency:.4g} s"
    if loser.shape.devices > best.shape.devices:
        return f"same throughput and latency on more devices: {loser.shape.devices}, not {best.shape.devices}"
    return "same throughput, latency and devices; more stages or a higher tensor degree"


def _what_would_fit(spec: ModelSpec, ready: Sequence[Instance], demand: Demand) -> str:
    """For people: the least number of devices, or the least memory, that one replica would need."""
    if not ready:
        return "no instance is ready; add at least one"
    shapes = [
        MeshShape(1, stages, tensor)
        for tensor in tensor_degrees(spec, max(instance.type.devices for instance in ready))
        for stages in range(1, spec.config.layers + 1)
    ]
    needs = {shape: memory_need(spec, shape, split_layers(spec.config.layers, shape.stage), demand) for shape in shapes}
    short: list[tuple[int, MeshShape, InstanceType]] = [
        (shape.stage * shape.tensor, shape, kind)
        for kind in _kinds(ready)
        for shape in shapes
        if shape.tensor <= kind.devices and needs[shape].total <= kind.memory_bytes
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
