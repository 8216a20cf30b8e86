"""What a mesh shape costs: seconds of a step and bytes on a device, from an analytic roofline. Chooses nothing.

A stage takes the longer of computing and of reading its parameters and KV (the roofline of Williams et al. 2009), plus
its tensor collectives, plus a fixed overhead for each call; stages are joined by network hops. All seconds are
estimates for one kind of instance; all bytes are exact up to activations.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil, prod

from spotjax.meshes.instance import InstanceType
from spotjax.meshes.layout import LayerRanges, kv_heads_per_shard, shard_shape, stage_holds
from spotjax.meshes.shape import MeshShape
from spotjax.models.spec import ModelSpec
from spotjax.planner.demand import Demand

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
class _Work:
    """What a stage computes in one call.

    Attributes:
      tokens: positions computed.
      pairs: (position, attended position) pairs, summed over sequences.
      cached: KV positions read.
      rows: logits rows computed.
    """

    tokens: int
    pairs: int
    cached: int
    rows: int


@lru_cache(maxsize=4096)
def layer_elements(spec: ModelSpec, tensor: int) -> int:
    """Parameters of one decoder layer on one device, padding included."""
    return sum(prod(shard_shape(array, spec, tensor)) for array in spec.parameters if array.layer == 0)


@lru_cache(maxsize=4096)
def _edge_elements(spec: ModelSpec, tensor: int, layers: LayerRanges, stage: int) -> int:
    """Parameters outside the decoder layers (embedding, final norm, head) on one device of a stage."""
    return sum(
        prod(shard_shape(array, spec, tensor))
        for array in (spec.parameters[0], *spec.parameters[-2:])
        if array.layer is None and stage_holds(array, spec, layers, stage)
    )


def parameter_bytes(spec: ModelSpec, shape: MeshShape, layers: LayerRanges, stage: int) -> int:
    """Bytes of parameters on one device of a stage, padding included."""
    start, stop = layers[stage]
    elements = (stop - start) * layer_elements(spec, shape.tensor)
    return (elements + _edge_elements(spec, shape.tensor, layers, stage)) * spec.dtype_bytes


def memory_need(spec: ModelSpec, shape: MeshShape, layers: LayerRanges, demand: Demand) -> MemoryNeed:
    """Bytes on the device that needs the most: parameters and KV pages (exact), activations (estimated)."""
    return max(
        (_stage_memory(spec, shape, layers, stage, demand) for stage in range(shape.stage)), key=lambda need: need.total
    )


def _stage_memory(spec: ModelSpec, shape: MeshShape, layers: LayerRanges, stage: int, demand: Demand) -> MemoryNeed:
    c = spec.config
    start, stop = layers[stage]
    page = 2 * demand.page_size * kv_heads_per_shard(c.heads, c.kv_heads, shape.tensor) * c.head_size * spec.dtype_bytes
    # Alive at once: residual stream and its norm, gate and up, queries and their output; logits in float32.
    per_token = 2 * c.width + 2 * -(-c.mlp // shape.tensor) + 2 * c.heads // shape.tensor * c.head_size
    logits = 4 * demand.batch * c.vocab if stage == shape.stage - 1 else 0
    return MemoryNeed(
        parameters=parameter_bytes(spec, shape, layers, stage),
        kv=(stop - start) * demand.pages * page,
        activations=max(demand.step_tokens, demand.batch) * per_token * spec.dtype_bytes + logits,
    )


def decode_seconds(
    spec: ModelSpec, shape: MeshShape, layers: LayerRanges, instance_type: InstanceType, batch: int, context: int
) -> float:
    """Seconds for one micro-batch of ``batch`` sequences, ``context`` positions long, to go through all stages once."""
    return _through(spec, shape, layers, instance_type, _decode_work(batch, context))


def prefill_seconds(
    spec: ModelSpec, shape: MeshShape, layers: LayerRanges, instance_type: InstanceType, tokens: int
) -> float:
    """Seconds for one prompt of ``tokens`` tokens to go through all stages."""
    return _through(spec, shape, layers, instance_type, _Work(tokens, tokens * (tokens + 1) // 2, tokens, 1))


def step_seconds(
    spec: ModelSpec, shape: MeshShape, layers: LayerRanges, instance_type: InstanceType, batch: int, context: int
) -> float:
    """Seconds between two tokens of a sequence when a replica's ``batch`` sequences go round as P micro-batches.

    A micro-batch goes round no faster than through all stages, and the slowest stage serves every micro-batch once.
    """
    micro_batches = min(shape.stage, batch)
    work = _decode_work(ceil(batch / micro_batches), context)
    slowest = max(_stage_seconds(spec, shape, layers, instance_type, stage, work) for stage in range(shape.stage))
    return max(_through(spec, shape, layers, instance_type, work), micro_batches * slowest)


def throughput(
    spec: ModelSpec, shape: MeshShape, layers: LayerRanges, instance_type: InstanceType, batch: int, context: int
) -> float:
    """Tokens per second of all D replicas, each decoding ``batch`` sequences."""
    return shape.data * batch / step_seconds(spec, shape, layers, instance_type, batch, context)


def _decode_work(batch: int, context: int) -> _Work:
    return _Work(tokens=batch, pairs=batch * context, cached=batch * context, rows=batch)


def _through(spec: ModelSpec, shape: MeshShape, layers: LayerRanges, kind: InstanceType, work: _Work) -> float:
    """All stages one after the other, and the hops between them."""
    hop = kind.network_latency + work.tokens * spec.config.width * spec.dtype_bytes / kind.network_bandwidth
    stages = sum(_stage_seconds(spec, shape, layers, kind, stage, work) for stage in range(shape.stage))
    return stages + (shape.stage - 1) * hop


def _stage_seconds(
    spec: ModelSpec, shape: MeshShape, layers: LayerRanges, kind: InstanceType, stage: int, work: _Work
) -> float:
    """One call of one stage: roofline, collectives, overhead."""
    c, tensor = spec.config, shape.tensor
    start, stop = layers[stage]
    count = stop - start
    last = stage == shape.stage - 1
    head = c.width * -(-c.vocab // tensor) if last else 0
    weights = count * layer_elements(spec, tensor)
    attention = 4 * count * work.pairs * c.heads // tensor * c.head_size
    flops = 2 * work.tokens * weights + 2 * work.rows * head + attention
    kv = 2 * count * work.cached * kv_heads_per_shard(c.heads, c.kv_heads, tensor) * c.head_size
    read = (weights + head + kv) * spec.dtype_bytes
    seconds = CALL_SECONDS + max(flops / kind.flops, read / kind.memory_bandwidth)
    if tensor > 1:
        # Sums after attention and after the feed-forward layer, and after the split embedding; logits are gathered.
        hidden = work.tokens * c.width * spec.dtype_bytes
        seconds += (2 * count + (stage == 0)) * _all_reduce_seconds(hidden, tensor, kind)
        seconds += last * _all_gather_seconds(work.rows * c.vocab * spec.dtype_bytes, tensor, kind)
    return seconds


def _all_reduce_seconds(size: int, tensor: int, kind: InstanceType) -> float:
    """Ring all-reduce: a reduce-scatter and an all-gather."""
    return 2 * _all_gather_seconds(size, tensor, kind)


def _all_gather_seconds(size: int, tensor: int, kind: InstanceType) -> float:
    return COLLECTIVE_SECONDS + (tensor - 1) / tensor * size / kind.link_bandwidth
