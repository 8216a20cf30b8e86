"""What a mesh shape costs: seconds of a step and bytes on a device, from an analytic roofline. Chooses nothing.

A stage takes the longer of computing and of reading its parameters and KV (the roofline of Williams et al. 2009), plus
its tensor collectives, plus a fixed overhead for each call; ``latency`` joins stages. All seconds are
estimates for one kind of instance; all bytes are exact up to activations.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, log, prod, sqrt

from spotjax.meshes.instance import InstanceType
from spotjax.meshes.layout import LayerRanges, kv_heads_per_shard, shard_shape, stage_holds, tensor_axes
from spotjax.meshes.shape import MeshShape
from spotjax.meshes.slices import Range
from spotjax.models.spec import ArraySpec, ModelSpec
from spotjax.planner import latency
from spotjax.planner.demand import Demand
from spotjax.planner.latency import Stage, Work

CALL_SECONDS = 1e-4
"""Overhead of starting one stage's computation on its devices."""

COLLECTIVE_SECONDS = 1e-5
"""Latency of one collective between the devices of an instance, beside its bytes."""

MEMORY_MARGIN = 0.1
"""Share of what is needed that is kept free for the runtime, fragmentation and migration buffers."""


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """Bytes on the device that needs the most."""

    parameters: int
    kv: int
    activations: int

    @property
    def total(self) -> int:
        """All of it and the margin."""
        return ceil((self.parameters + self.kv + self.activations) * (1 + MEMORY_MARGIN))


@dataclass(frozen=True, slots=True)
class Size:
    """Parameters on one device, padding included."""

    elements: int
    bytes: int


def _size(arrays: Iterable[ArraySpec], spec: ModelSpec, tensor: int) -> Size:
    shards = [(prod(shard_shape(array, spec, tensor)), spec.element_bytes(array.name)) for array in arrays]
    return Size(sum(count for count, _ in shards), sum(count * size for count, size in shards))


@lru_cache(maxsize=4096)
def layer_size(spec: ModelSpec, tensor: int) -> Size:
    """One decoder layer on one device."""
    return _size(_layer_arrays(spec), spec, tensor)


@lru_cache(maxsize=4096)
def expert_size(spec: ModelSpec, tensor: int) -> Size:
    """Of that what is one or other expert's: the rest computes every token."""
    return _size((array for array in _layer_arrays(spec) if "expert" in array.axes), spec, tensor)


def _layer_arrays(spec: ModelSpec) -> Iterator[ArraySpec]:
    return (ArraySpec(f"layers.*.{name}", extents, axes) for name, (extents, axes) in spec.layer_arrays.items())


def experts_read(spec: ModelSpec, tensor: int, tokens: int) -> float:
    """Which part of its experts a device reads for so many tokens, if a router chose at random.

    Tokens with k experts each then leave out (1 - k/E)^tokens of the E; real routers leave out more. Where shards hold
    whole experts, all wait for the one that has the most to do: about sqrt(2 n ln M) more than the mean n of M shards
    (Raab and Steger 1998).
    """
    experts = spec.config.experts
    if experts is None:
        return 0.0
    chosen = experts.count * (1 - (1 - experts.per_token / experts.count) ** tokens)
    if "expert" not in tensor_axes(spec, tensor):
        return chosen / experts.count
    mean, held = chosen / tensor, experts.count / tensor
    return min(1.0, (mean + sqrt(2 * mean * log(tensor))) / held)


@lru_cache(maxsize=4096)
def _edge_size(spec: ModelSpec, tensor: int, layers: LayerRanges, stage: int) -> Size:
    """What is before and after the decoder layers (embedding, final norm, head) on one device of a stage."""
    return _size((array for array in spec.edges if stage_holds(array, spec, layers, stage)), spec, tensor)


@lru_cache(maxsize=4096)
def _head_size(spec: ModelSpec, tensor: int) -> Size:
    """The matrices that make logits of a hidden vector, on one device."""
    return _size((array for array in spec.outputs.values() if len(array.shape) > 1), spec, tensor)


def parameter_bytes(spec: ModelSpec, shape: MeshShape, layers: LayerRanges, stage: int) -> int:
    """Bytes of parameters on one device of a stage, padding included."""
    start, stop = layers[stage]
    edge = _edge_size(spec, shape.tensor, layers, stage)
    return (stop - start) * layer_size(spec, shape.tensor).bytes + edge.bytes


@lru_cache(maxsize=4096)
def memory_need(spec: ModelSpec, shape: MeshShape, layers: LayerRanges, demand: Demand) -> MemoryNeed:
    """Bytes on the device that needs the most: parameters and KV pages (exact), activations (estimated)."""
    stages = (layers.index(stage) for stage in _distinct(layers))
    return max((_stage_memory(spec, shape, layers, stage, demand) for stage in stages), key=lambda need: need.total)


def _distinct(layers: LayerRanges) -> list[Range]:
    """One stage of every length, and the first and the last, which have arrays of their own."""
    lengths = {stop - start: (start, stop) for start, stop in layers[1:-1]}
    return list(dict.fromkeys([layers[0], *lengths.values(), layers[-1]]))


def _stage_memory(spec: ModelSpec, shape: MeshShape, layers: LayerRanges, stage: int, demand: Demand) -> MemoryNeed:
    c = spec.config
    start, stop = layers[stage]
    page = 2 * demand.page_size * kv_heads_per_shard(c.heads, c.kv_heads, shape.tensor) * c.head_size * spec.dtype_bytes
    # Alive at once: residual stream and its norm, gate and up (or up before and after its activation), queries and
    # their output; logits in float32.
    inner = _inner_elements(spec, shape.tensor)
    per_token = 2 * c.width + inner + 2 * c.heads // shape.tensor * c.head_size
    logits = 4 * demand.batch * c.vocab if stage == shape.stage - 1 else 0
    return MemoryNeed(
        parameters=parameter_bytes(spec, shape, layers, stage),
        kv=(stop - start) * demand.pages * page,
        activations=max(demand.step_tokens, demand.batch) * per_token * spec.dtype_bytes + logits,
    )


def _inner_elements(spec: ModelSpec, tensor: int) -> int:
    """What the feed-forward layer keeps of a token; experts each have a copy of it and a result, too."""
    c = spec.config
    if c.experts is None:
        return 2 * -(-c.mlp // tensor)
    width = c.mlp if "expert" in tensor_axes(spec, tensor) else -(-c.mlp // tensor)
    return 2 * c.experts.per_token * (c.width + width) + 2 * -(-c.experts.shared_mlp // tensor)


@dataclass(frozen=True, slots=True)
class Roofline:
    """Analytic latencies of a model on one kind of instance. A ``LatencyModel``."""

    spec: ModelSpec
    kind: InstanceType

    def stage_seconds(self, stage: Stage, tensor: int, work: Work) -> float:
        """One call of one stage: roofline, collectives, overhead."""
        c, kind = self.spec.config, self.kind
        head = _head_size(self.spec, tensor) if stage.last else Size(0, 0)
        layer = layer_size(self.spec, tensor)
        attention = 4 * stage.layers * work.pairs * c.heads // tensor * c.head_size
        experts = expert_size(self.spec, tensor)
        share = c.experts.per_token / c.experts.count if c.experts is not None else 0
        computed = stage.layers * (layer.elements - experts.elements * (1 - share))
        flops = 2 * work.tokens * computed + 2 * work.sequences * head.elements + attention
        kv = 2 * stage.layers * work.cached * kv_heads_per_shard(c.heads, c.kv_heads, tensor) * c.head_size
        unread = experts.bytes * (1 - experts_read(self.spec, tensor, work.tokens))
        read = stage.layers * (layer.bytes - unread) + head.bytes + kv * self.spec.dtype_bytes
        seconds = CALL_SECONDS + max(flops / kind.flops, read / kind.memory_bandwidth)
        if tensor > 1:
            # Sums after attention and after the feed-forward layer, and after the split embedding; logits are gathered.
            hidden = work.tokens * c.width * self.spec.dtype_bytes
            seconds += (2 * stage.layers + stage.first) * _all_reduce_seconds(hidden, tensor, kind)
            logits = work.sequences * c.vocab * self.spec.dtype_bytes
            seconds += stage.last * _all_gather_seconds(logits, tensor, kind)
        return seconds

    def hop_seconds(self, tokens: int) -> float:
        """Hidden vectors of ``tokens`` tokens from one stage to the next."""
        size = tokens * self.spec.config.width * self.spec.dtype_bytes
        return self.kind.network_latency + size / self.kind.network_bandwidth


def decode_seconds(
    spec: ModelSpec, shape: MeshShape, layers: LayerRanges, instance_type: InstanceType, batch: int, context: int
) -> float:
    """Seconds for one micro-batch of ``batch`` sequences, ``context`` positions long, to go through all stages once."""
    return latency.through(Roofline(spec, instance_type), shape, layers, Work.decode(batch, context))


def prefill_seconds(
    spec: ModelSpec, shape: MeshShape, layers: LayerRanges, instance_type: InstanceType, tokens: int
) -> float:
    """Seconds for one prompt of ``tokens`` tokens to go through all stages."""
    return latency.prefill_seconds(Roofline(spec, instance_type), shape, layers, tokens)


def step_seconds(
    spec: ModelSpec, shape: MeshShape, layers: LayerRanges, instance_type: InstanceType, batch: int, context: int
) -> float:
    """Seconds between two tokens of a sequence, see ``latency.step_seconds``."""
    return latency.step_seconds(Roofline(spec, instance_type), shape, layers, batch, context)


def throughput(
    spec: ModelSpec, shape: MeshShape, layers: LayerRanges, instance_type: InstanceType, batch: int, context: int
) -> float:
    """Tokens per second of all D replicas, each decoding ``batch`` sequences."""
    return shape.data * batch / step_seconds(spec, shape, layers, instance_type, batch, context)


def _all_reduce_seconds(size: int, tensor: int, kind: InstanceType) -> float:
    """Ring all-reduce: a reduce-scatter and an all-gather."""
    return 2 * _all_gather_seconds(size, tensor, kind)


def _all_gather_seconds(size: int, tensor: int, kind: InstanceType) -> float:
    """Over the slowest link of the ring, which is the network's where the group spans instances."""
    latency, bandwidth = COLLECTIVE_SECONDS, kind.link_bandwidth
    if tensor > kind.devices:
        latency, bandwidth = latency + kind.network_latency, min(bandwidth, kind.network_bandwidth)
    return latency + (tensor - 1) / tensor * size / bandwidth
