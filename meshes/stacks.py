"""The arrays of the same name in all layers as one array with a leading layer axis: a stack.

All layers of a stage are cut alike, so planning handles one index per stack where there are dozens of arrays.
``layers.3.mlp.gate`` is layer 3 of ``layers.*.mlp.gate``, and ``kv.3@0-1`` of ``kv.*@0-1``; arrays outside the layers
are stacks of their own without that axis. Owns names and indices, no bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from math import inf

from spotjax.meshes.layout import LayerRanges, shard_index, stage_holds
from spotjax.meshes.shape import MeshShape, Position
from spotjax.meshes.slices import ArraySlice, Index
from spotjax.models.spec import INPUTS, ArraySpec, ModelSpec

_NUMBERED = re.compile(r"(layers|kv)\.(\d+)(.*)", re.DOTALL)


def stack_of(array: str) -> tuple[str, int | None]:
    """The stack that an array is part of, and its layer in it; None outside the layers."""
    numbered = _NUMBERED.fullmatch(array)
    return (f"{numbered[1]}.*{numbered[3]}", int(numbered[2])) if numbered else (array, None)


def is_layered(stack: str) -> bool:
    """Whether a stack has a layer axis."""
    return ".*" in stack


def in_stack(piece: ArraySlice) -> ArraySlice:
    """A slice of an array as a slice of its stack."""
    stack, layer = stack_of(piece.name)
    return ArraySlice(stack, piece.index if layer is None else ((layer, layer + 1), *piece.index))


def arrays_in(piece: ArraySlice) -> Iterator[ArraySlice]:
    """A slice of a stack as slices of its arrays, by layer."""
    if not is_layered(piece.name):
        yield piece
        return
    before, after = piece.name.split("*", 1)
    for layer in range(*piece.index[0]):
        yield ArraySlice(f"{before}{layer}{after}", piece.index[1:])


def depth(array: str) -> float:
    """How far along the model an array is: its layer; what comes before or after all layers is below 0 or infinite."""
    layer = stack_of(array)[1]
    if layer is not None:
        return layer
    return -1 if array in INPUTS else inf


def other_bytes(spec: ModelSpec) -> dict[str, int]:
    """Bytes of one element of every stack that is not kept at the model's dtype: matrices in int8 and their scales."""
    stacks = (*(f"layers.*.{name}" for name in spec.layer_arrays), *(array.name for array in spec.edges))
    return {stack: spec.element_bytes(stack) for stack in stacks if spec.element_type(stack) is not None}


def stacks_at(spec: ModelSpec, shape: MeshShape, ranges: LayerRanges, position: Position) -> dict[str, Index]:
    """Parameters that belong at ``position``: stack name to index ranges. ``layout.slices_at``, stacked."""
    layers = ranges[position.stage]
    stacks = {
        f"layers.*.{name}": (layers, *shard_index(ArraySpec(name, extents, axes), spec, shape.tensor, position.tensor))
        for name, (extents, axes) in spec.layer_arrays.items()
    }
    return stacks | {
        array.name: shard_index(array, spec, shape.tensor, position.tensor)
        for array in spec.edges
        if stage_holds(array, spec, ranges, position.stage)
    }
