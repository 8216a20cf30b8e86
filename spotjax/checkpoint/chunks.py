"""How an array is cut into chunks, the unit of reading, so that the shards of any mesh read little more than theirs."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from spotjax.meshes.layout import tensor_axes, tensor_degrees, tensor_range
from spotjax.meshes.slices import Range
from spotjax.models.spec import ArraySpec, ModelSpec

OVERHEAD = 0.1
"""What a shard may read too much, as a part of what it needs."""
LARGEST = 1 << 20
"""Bytes of a chunk, at most, where it is not a head: what fits a processor's cache is checked and copied faster."""
WHOLE = 64 << 10
"""Bytes of an array up to which it is one chunk: reading all of it costs no more than reading a part."""


def chunk_shape(array: ArraySpec, spec: ModelSpec, itemsize: int) -> tuple[int, ...]:
    """Extents of an array's chunks: whole but for the axes that the mesh splits, some of them at some tensor degrees.

    Heads and experts are chunks of their own, because every shard holds whole ones. Feed-forward width and vocabulary
    split at other places for every tensor degree; their chunks are the largest that suit all degrees.
    """
    if array.size * itemsize <= WHOLE:
        return array.shape
    units = ("heads", "kv_heads", "expert")
    chunk = tuple(1 if name in units else extent for extent, name in zip(array.shape, array.axes, strict=True))
    degrees = tensor_degrees(spec, spec.config.heads)
    for axis, name in enumerate(array.axes):
        splitting = [tensor for tensor in degrees if name in tensor_axes(spec, tensor)]
        if chunk[axis] > 1 and splitting:
            extent = chunk[axis]
            shards = [[tensor_range(extent, name, spec, tensor, m) for m in range(tensor)] for tensor in splitting]
            limit = LARGEST // (prod(chunk) // extent * itemsize)
            overhead = OVERHEAD / (_layer_share(spec, name) if array.layer is not None else 1)
            chunk = (*chunk[:axis], chunk_extent(shards, max(1, limit), overhead), *chunk[axis + 1 :])
    return chunk


def _layer_share(spec: ModelSpec, axis: str) -> float:
    """What part of a layer the arrays with that axis are; the others read nothing too much."""
    sizes = {name: prod(shape) for name, (shape, _) in spec.layer_arrays.items()}
    return sum(sizes[name] for name, (_, axes) in spec.layer_arrays.items() if axis in axes) / sum(sizes.values())


def chunk_extent(degrees: Sequence[Sequence[Range]], limit: int, overhead: float) -> int:
    """The largest extent, up to ``limit``, at which no shard of any degree reads too much; at least 1.

    Tried are whole parts of the shards, which fit those of one degree exactly.

    Args:
      degrees: ranges of all shards, for every tensor degree; the first shard is never shorter than the others.
      limit: in elements.
      overhead: what a shard may read too much, as a part of what it needs.
    """
    smallest = min(stop - start for (start, stop), *_ in degrees)
    tried = {-(-(ranges[0][1] - ranges[0][0]) // parts) for ranges in degrees for parts in range(1, 65)}
    fitting = (extent for extent in sorted(tried, reverse=True) if extent <= limit)
    return next(
        (extent for extent in fitting if all(_suits(extent, ranges, overhead) for ranges in degrees)),
        max(1, min(limit, int(smallest * overhead / 2))),  # two chunks that are needed only in part
    )


def _suits(extent: int, ranges: Sequence[Range], overhead: float) -> bool:
    """Whether shards read no more than ``overhead`` too much; of a full shard, because the last ones may be short."""
    allowed = (ranges[0][1] - ranges[0][0]) * overhead
    for start, stop in ranges:
        read = (-(-stop // extent) - start // extent) * extent if stop > start else 0
        if read - (stop - start) > allowed:
            return False
    return True
