"""What a checkpoint is to Spotjax, and how published tensors relate to the arrays of a ModelSpec. Owns no file format.

Published Llama-family checkpoints keep a projection as (out, in) with the heads merged into one axis; Spotjax keeps it
as (in, out) with the heads apart. Both importers read through the functions here, so this is said once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from math import prod
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from spotjax.errors import CheckpointError
from spotjax.meshes.slices import ArraySlice, Index
from spotjax.models.spec import ArraySpec, Axes, ModelSpec

StorageAxes = tuple[tuple[int, ...], ...]
"""For every axis of a published tensor, which axes of our array it is the product of, major first."""

STORAGE_AXES: dict[Axes, StorageAxes] = {
    ("vocab", "embed"): ((0,), (1,)),
    ("embed", "vocab"): ((1,), (0,)),
    ("embed", "heads", "head_size"): ((1, 2), (0,)),
    ("embed", "kv_heads", "head_size"): ((1, 2), (0,)),
    ("heads", "head_size", "embed"): ((2,), (0, 1)),
    ("embed", "mlp"): ((1,), (0,)),
    ("mlp", "embed"): ((1,), (0,)),
    ("heads", "head_size"): ((0, 1),),
    ("kv_heads", "head_size"): ((0, 1),),
    ("embed",): ((0,),),
    ("mlp",): ((0,),),
    ("head_size",): ((0,),),
}


class Checkpoint(Protocol):
    """A model on disk: its shapes, and any slice of any of its arrays."""

    @property
    def spec(self) -> ModelSpec:
        """Shapes and names of the model's arrays."""

    def read(self, name: str, index: Index) -> NDArray[np.float32]:
        """The part of array ``name`` that ``index`` covers: float32, C-contiguous, in our layout.

        Reads from the files little more than what is asked for.

        Raises:
          CheckpointError: the model has no such array.
          ValueError: ``index`` reaches outside the array.
        """

    def close(self) -> None:
        """Lets go of the files; nothing can be read afterwards."""


class Readable(Protocol):
    """What parameters are brought from: a checkpoint, or a part of one."""

    def read(self, name: str, index: Index) -> np.ndarray:
        """See ``Checkpoint.read``."""


@runtime_checkable
class BulkReadable(Protocol):
    """A checkpoint that reads many slices at once, without memory in between."""

    def read_into(self, wanted: Iterable[tuple[ArraySlice, np.ndarray]]) -> None:
        """See the function of that name."""


def read_into(checkpoint: Readable, wanted: Iterable[tuple[ArraySlice, np.ndarray]]) -> None:
    """Reads slices, each into an array of its shape, whatever its strides, converted to its dtype.

    All at once where the checkpoint can, else one after another. After an error, any of the arrays may be written.

    Raises:
      CheckpointError: the model has no such array, or files are damaged or missing.
      ValueError: a slice reaches outside its array.
    """
    if isinstance(checkpoint, BulkReadable):
        checkpoint.read_into(wanted)
        return
    for (name, index), target in wanted:
        target[...] = checkpoint.read(name, index)


def stored_shape(array: ArraySpec) -> tuple[int, ...]:
    """Shape that published checkpoints give the tensor of ``array``."""
    return tuple(prod(array.shape[axis] for axis in axes) for axes in STORAGE_AXES[array.axes])


def tensor_names(spec: ModelSpec, names: Mapping[str, str], layer_prefix: str) -> dict[str, str]:
    """The published tensor's name for every array of the model.

    Args:
      spec: the model.
      names: published name of each array outside of the layers, and of each array within a layer.
      layer_prefix: format of what stands before the latter, given the layer's number.
    """
    return {
        array.name: names[array.name]
        if array.layer is None
        else layer_prefix.format(array.layer) + names[array.name.removeprefix(f"layers.{array.layer}.")]
        for array in spec.parameters
    }


def check_tensors(
    spec: ModelSpec,
    names: Mapping[str, str],
    stored: Mapping[str, tuple[int, ...]],
    where: object,
    ignored: Iterable[str] = (),
) -> None:
    """Checks that exactly the tensors of the model are there, each in its shape.

    Args:
      spec: the model.
      names: array name to the published tensor's name.
      stored: name and shape of every tensor of the checkpoint.
      where: the checkpoint, for messages.
      ignored: tensors that may be there and are not needed.

    Raises:
      CheckpointError: a tensor is missing, has another shape, or is one that the model does not have.
    """
    for array in spec.parameters:
        name, wanted = names[array.name], stored_shape(array)
        if name not in stored:
            raise CheckpointError(f"{where}: tensor {name} {wanted} is missing")
        if stored[name] != wanted:
            raise CheckpointError(f"{where}: tensor {name} has shape {stored[name]}, the configuration says {wanted}")
    if unknown := sorted(stored.keys() - set(names.values()) - set(ignored)):
        shown = ", ".join(unknown[:3]) + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else "")
        raise CheckpointError(f"{where}: the model that the configuration describes has no tensor {shown}")


def read_array(
    array: ArraySpec, index: Index, read_tensor: Callable[[Index], NDArray[np.float32]]
) -> NDArray[np.float32]:
    """The part of ``array`` that ``index`` covers, from the tensor that holds it.

    Args:
      array: ours.
      index: index ranges of ``array``; where heads are merged in the tensor, whole heads are read.
      read_tensor: reads index ranges of the published tensor.

    Raises:
      ValueError: ``index`` reaches outside the array.
    """
    check_index(array, index)
    shape = tuple(stop - start for start, stop in index)
    if 0 in shape:
        return np.empty(shape, np.float32)
    groups = STORAGE_AXES[array.axes]
    ranges, extents = [], []
    for major, *minor in groups:
        start, stop = index[major]
        inner = [array.shape[axis] for axis in minor]
        ranges.append((start * prod(inner), stop * prod(inner)))
        extents += [stop - start, *inner]
    stored_order = [axis for axes in groups for axis in axes]
    block = read_tensor(tuple(ranges)).reshape(extents).transpose(np.argsort(stored_order))
    majors = {axes[0] for axes in groups}
    picks = tuple(slice(None) if axis in majors else slice(*index[axis]) for axis in range(len(index)))
    return np.ascontiguousarray(block[picks], np.float32)


def check_index(array: ArraySpec, index: Index) -> None:
    """Raises ValueError unless ``index`` lies inside ``array``."""
    inside = len(index) == len(array.shape) and all(
        0 <= start <= stop <= extent for (start, stop), extent in zip(index, array.shape, strict=True)
    )
    if not inside:
        raise ValueError(f"index {index} reaches outside {array.name} of shape {array.shape}")
