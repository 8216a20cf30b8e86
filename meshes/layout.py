"""Which index ranges of which array belong at position (d, p, m): what loading, planning, moving and running share.

Parameters and KV follow the same rules. Owns no devices and no bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from spotjax.meshes.rules import DEFAULT_RULES, EXPERT_RULES, AxisRules
from spotjax.meshes.shape import MeshShape, Position
from spotjax.meshes.slices import Index, Range
from spotjax.models.spec import ArraySpec, ModelSpec

_DEFAULT_AXES, _EXPERT_AXES = DEFAULT_RULES.split_by("tensor"), EXPERT_RULES.split_by("tensor")

NARROWEST_EXPERT = 128
"""Least width of a shard of an expert: what the matrix units of accelerators take at once."""

LayerRanges = tuple[Range, ...]
"""For every stage, the half-open range of decoder layers it runs."""


def split_layers(layers: int, stages: int) -> LayerRanges:
    """Splits decoder layers over stages as evenly as whole layers allow, the longer stages first.

    The last stage also computes the logits, so it is never among the longer ones.

    Raises:
      ValueError: more stages than layers.
    """
    if stages > layers:
        raise ValueError(f"{layers} layers cannot fill {stages} stages")
    short, longer = divmod(layers, stages)
    ranges: list[Range] = []
    start = 0
    for stage in range(stages):
        stop = start + short + (stage < longer)
        ranges.append((start, stop))
        start = stop
    return tuple(ranges)


def rules_of(spec: ModelSpec, tensor: int) -> AxisRules:
    """Which logical axes ``tensor`` shards split.

    Every shard has a part of each expert: all then have the same to do, whatever the router chooses, where whole
    experts would keep most shards idle at small batches. Only where the parts would be too narrow for the hardware,
    whole experts are dealt out, if they can be evenly.
    """
    c = spec.config
    if c.experts is None or tensor == 1 or c.experts.count % tensor or c.mlp >= NARROWEST_EXPERT * tensor:
        return DEFAULT_RULES
    return EXPERT_RULES


def tensor_axes(spec: ModelSpec, tensor: int) -> frozenset[str]:
    """Logical axes that ``tensor`` shards split; all others are whole at every position."""
    return _EXPERT_AXES if rules_of(spec, tensor) is EXPERT_RULES else _DEFAULT_AXES


def tensor_range(extent: int, axis: str, spec: ModelSpec, tensor: int, m: int) -> Range:
    """The part of a split axis that tensor shard ``m`` of ``tensor`` holds.

    ``heads`` split exactly. ``kv_heads`` follow the query heads that use them, so they are shared by neighbours where
    ``tensor`` does not divide them; every shard gets the same number. Other axes split into equal chunks of which the
    last ones may be shorter, even empty (they are padded with zeros on the device).

    Raises:
      ValueError: ``tensor`` does not divide the query heads.
    """
    heads, kv_heads = spec.config.heads, spec.config.kv_heads
    if heads % tensor:
        raise ValueError(f"tensor degree {tensor} must divide the {heads} query heads")
    if axis == "kv_heads":
        held = kv_heads_per_shard(heads, kv_heads, tensor)
        start = min(m * (heads // tensor) * kv_heads // heads, kv_heads - held)
        return start, start + held
    chunk = -(-extent // tensor)
    return min(m * chunk, extent), min((m + 1) * chunk, extent)


@lru_cache(maxsize=4096)
def kv_heads_per_shard(heads: int, kv_heads: int, tensor: int) -> int:
    """How many key/value heads one tensor shard holds: the most that any shard's query heads need."""
    mine = heads // tensor
    firsts = [m * mine * kv_heads // heads for m in range(tensor)]
    lasts = [((m + 1) * mine - 1) * kv_heads // heads for m in range(tensor)]
    return max(last - first + 1 for first, last in zip(firsts, lasts, strict=True))


def shard_index(array: ArraySpec, spec: ModelSpec, tensor: int, m: int) -> Index:
    """The logical index ranges of ``array`` that tensor shard ``m`` holds, wherever its stage is."""
    split = tensor_axes(spec, tensor)
    return tuple(
        tensor_range(extent, axis, spec, tensor, m) if axis in split else (0, extent)
        for extent, axis in zip(array.shape, array.axes, strict=True)
    )


def shard_shape(array: ArraySpec, spec: ModelSpec, tensor: int) -> tuple[int, ...]:
    """Shape of one shard on the device, padding included; the same for every ``m``."""
    index = shard_index(array, spec, tensor, 0)
    return tuple(stop - start for start, stop in index)


def stage_holds(array: ArraySpec, spec: ModelSpec, ranges: LayerRanges, stage: int) -> bool:
    """Whether a stage needs the array: its layers' arrays; the first stage the inputs, the last one the outputs.

    A tied embedding is both.
    """
    if array.layer is not None:
        start, stop = ranges[stage]
        return start <= array.layer < stop
    last = len(ranges) - 1
    return (stage == 0 and array.name in spec.inputs) or (stage == last and array.name in spec.outputs)


def slices_at(
    arrays: Iterable[ArraySpec], spec: ModelSpec, shape: MeshShape, ranges: LayerRanges, position: Position
) -> dict[str, Index]:
    """Array name to the index ranges that belong at ``position``. All replicas ``d`` hold the same parameters."""
    return {
        array.name: shard_index(array, spec, shape.tensor, position.tensor)
        for array in arrays
        if stage_holds(array, spec, ranges, position.stage)
    }


def tensor_degrees(spec: ModelSpec, limit: int) -> list[int]:
    """Tensor degrees that the model allows up to ``limit``: the divisors of its query heads."""
    return [m for m in range(1, limit + 1) if spec.config.heads % m == 0]
