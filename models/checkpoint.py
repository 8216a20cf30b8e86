"""What a checkpoint is to Spotjax, and how slices of it are read. Owns no file format."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, runtime_checkable

import numpy as np

from spotjax.meshes.slices import ArraySlice, Index
from spotjax.models.spec import ArraySpec, ModelSpec


class Checkpoint(Protocol):
    """A model on disk: its shapes, and any slice of any of its arrays."""

    @property
    def spec(self) -> ModelSpec:
        """Shapes and names of the model's arrays."""

    def read(self, name: str, index: Index) -> np.ndarray:
        """The part of array ``name`` that ``index`` covers: C-contiguous, in our layout.

        All is float32 but what the spec says is int8.

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


def check_index(array: ArraySpec, index: Index) -> None:
    """Raises ValueError unless ``index`` lies inside ``array``."""
    inside = len(index) == len(array.shape) and all(
        0 <= start <= stop <= extent for (start, stop), extent in zip(index, array.shape, strict=True)
    )
    if not inside:
        raise ValueError(f"index {index} reaches outside {array.name} of shape {array.shape}")
