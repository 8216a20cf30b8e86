"""How the tensors of published checkpoints relate to the arrays of a ModelSpec. Owns no file format and no names.

Published checkpoints keep a projection as (out, in) with the heads merged into one axis, some also several projections
in one tensor; Spotjax keeps it as (in, out) with the heads apart. All importers read through the functions here, so
this is said once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import prod

import numpy as np
from numpy.typing import NDArray

from spotjax.errors import CheckpointError
from spotjax.meshes.slices import Index
from spotjax.models.checkpoint import check_index
from spotjax.models.spec import ArraySpec, Axes, ModelSpec

PART = -1
"""In ``StorageAxes`` the axis along which a tensor joins several arrays of the same shape."""

StorageAxes = tuple[tuple[int, ...], ...]
"""For every axis of a published tensor, which axes of our array it is the product of, major first."""

ReadTensor = Callable[[str, Index], NDArray[np.float32]]
"""Reads index ranges of a tensor by its name."""

Part = tuple[int, int]
"""Which of the arrays that a tensor joins is ours, from 0, and how many there are."""

STORAGE_AXES: dict[Axes, StorageAxes] = {
    ("vocab", "embed"): ((0,), (1,)),
    ("positions", "embed"): ((0,), (1,)),
    ("embed", "embed"): ((1,), (0,)),
    ("embed", "vocab"): ((1,), (0,)),
    ("embed", "heads", "head_size"): ((1, 2), (0,)),
    ("embed", "kv_heads", "head_size"): ((1, 2), (0,)),
    ("heads", "head_size", "embed"): ((2,), (0, 1)),
    ("embed", "mlp"): ((1,), (0,)),
    ("mlp", "embed"): ((1,), (0,)),
    ("embed", "choices"): ((1,), (0,)),
    ("expert", "embed", "expert_mlp"): ((0,), (2,), (1,)),
    ("expert", "expert_mlp", "embed"): ((0,), (2,), (1,)),
    ("heads", "head_size"): ((0, 1),),
    ("kv_heads", "head_size"): ((0, 1),),
    ("embed",): ((0,),),
    ("mlp",): ((0,),),
    ("head_size",): ((0,),),
}
"""By the logical axes of our array, unless a layout says otherwise."""


@dataclass(frozen=True, slots=True)
class TensorLayout:
    """How checkpoints of a family keep their arrays.

    Attributes:
      names: published name of each array outside of the layers, and of each array within a layer. With ``{}`` in it,
        one tensor for each index of the array's first axis, whose number stands there.
      layer_prefix: format of what stands before the latter, given the layer's number.
      axes: of arrays, named as in ``names``, that are not kept as ``STORAGE_AXES`` says.
      parts: of arrays that share a tensor with others.
      skipped: leading rows of tensors that are no part of our arrays.
      prefixes: how names of tensors may begin in the checkpoint, and what ``names`` and ``layer_prefix`` say instead.
      unused: how names begin of tensors that are no part of the decoder.
    """

    names: Mapping[str, str]
    layer_prefix: str
    axes: Mapping[str, StorageAxes] = field(default_factory=dict)
    parts: Mapping[str, Part] = field(default_factory=dict)
    skipped: Mapping[str, int] = field(default_factory=dict)
    prefixes: Mapping[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Storage:
    """Where an array is in a checkpoint.

    Attributes:
      array: ours.
      tensor: name of the published tensor.
      axes: of the tensor.
      part: which of the arrays in the tensor ours is.
      skipped: leading rows of the tensor that are no part of our array.
    """

    array: ArraySpec
    tensor: str
    axes: StorageAxes
    part: Part = (0, 1)
    skipped: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""
        extents = (*self.array.shape, self.part[1])
        rows, *others = (prod(extents[axis] for axis in axes) for axes in self.axes)
        return self.skipped + rows, *others

    @property
    def tensors(self) -> Mapping[str, tuple[int, ...]]:
        """Name and shape of every tensor that the array is in."""
        return {self.tensor: self.shape}

    def read(self, index: Index, read_tensor: ReadTensor) -> NDArray[np.float32]:
        """The part of the array that ``index`` covers.

        Args:
          index: index ranges of the array; where several axes are merged in the tensor, all of the minor ones are read.
          read_tensor: reads index ranges of a tensor.

        Raises:
          ValueError: ``index`` reaches outside the array.
        """
        check_index(self.array, index)
        shape = tuple(stop - start for start, stop in index)
        if 0 in shape:
            return np.empty(shape, np.float32)
        # Seen as one of several arrays that lie along a last axis, of which one index is read.
        last, (number, parts) = len(shape), self.part
        extents, wanted = (*self.array.shape, parts), (*index, (number, number + 1))
        groups = [tuple(last if axis == PART else axis for axis in group) for group in self.axes]
        ranges: list[tuple[int, int]] = []
        stored: list[int] = []
        for major, *minor in groups:
            (start, stop), inner = wanted[major], [extents[axis] for axis in minor]
            ranges.append((start * prod(inner), stop * prod(inner)))
            stored += [stop - start, *inner]
        ranges[0] = (ranges[0][0] + self.skipped, ranges[0][1] + self.skipped)
        block = read_tensor(self.tensor, tuple(ranges)).reshape(stored)
        order = [axis for group in groups for axis in group]
        majors = {major for major, *_ in groups}
        picks = [slice(None) if axis in majors else slice(*wanted[axis]) for axis in order]
        return np.ascontiguousarray(block[tuple(picks)].transpose(np.argsort(order)).reshape(shape), np.float32)


@dataclass(frozen=True, slots=True)
class JoinedStorage:
    """An array of which every index of the first axis is a tensor of its own.

    Attributes:
      array: ours.
      members: where it is at each index, as arrays of one axis less.
    """

    array: ArraySpec
    members: tuple[Storage, ...]

    @property
    def tensors(self) -> Mapping[str, tuple[int, ...]]:
        """See ``Storage.tensors``."""
        return {member.tensor: member.shape for member in self.members}

    def read(self, index: Index, read_tensor: ReadTensor) -> NDArray[np.float32]:
        """See ``Storage.read``."""
        check_index(self.array, index)
        content = np.empty([stop - start for start, stop in index], np.float32)
        for place, member in enumerate(self.members[slice(*index[0])]):
            content[place] = member.read(index[1:], read_tensor)
        return content


def storages(spec: ModelSpec, layout: TensorLayout) -> dict[str, Storage | JoinedStorage]:
    """Where every array of the model is in a checkpoint of that layout."""
    found: dict[str, Storage | JoinedStorage] = {}
    for array in spec.parameters:
        name, prefix = array.name, ""
        if array.layer is not None:
            name = name.removeprefix(f"layers.{array.layer}.")
            prefix = layout.layer_prefix.format(array.layer)
        axes = layout.axes.get(name, STORAGE_AXES[array.axes])
        part, skipped = layout.parts.get(name, (0, 1)), layout.skipped.get(name, 0)
        tensor = prefix + layout.names[name]
        if "{}" not in tensor:
            found[array.name] = Storage(array, tensor, axes, part, skipped)
            continue
        member = ArraySpec(array.name, array.shape[1:], array.axes[1:], array.layer)
        inner = tuple(tuple(axis - 1 for axis in group) for group in axes[1:])
        members = tuple(Storage(member, tensor.format(number), inner) for number in range(array.shape[0]))
        found[array.name] = JoinedStorage(array, members)
    return found


def check_tensors(
    storages: Iterable[Storage | JoinedStorage],
    stored: Mapping[str, tuple[int, ...]],
    where: object,
    ignored: Iterable[str] = (),
) -> None:
    """Checks that exactly the tensors of a model are there, each in its shape.

    Args:
      storages: of all arrays of the model.
      stored: name and shape of every tensor of the checkpoint.
      where: the checkpoint, for messages.
      ignored: tensors that may be there and are not needed.

    Raises:
      CheckpointError: a tensor is missing, has another shape, or is one that the model does not have.
    """
    needed = {name: shape for storage in storages for name, shape in storage.tensors.items()}
    for name, wanted in needed.items():
        if name not in stored:
            raise CheckpointError(f"{where}: tensor {name} {wanted} is missing")
        if stored[name] != wanted:
            raise CheckpointError(f"{where}: tensor {name} has shape {stored[name]}, the configuration says {wanted}")
    if unknown := sorted(stored.keys() - needed.keys() - set(ignored)):
        shown = ", ".join(unknown[:3]) + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else "")
        raise CheckpointError(f"{where}: the model that the configuration describes has no tensor {shown}")
