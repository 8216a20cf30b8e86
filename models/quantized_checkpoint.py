"""Any checkpoint as one with int8 matrices: each is rounded when a slice of it is read. Owns no file format.

The scale of an output channel is of the whole channel. A slice that has all inputs of its channels brings it along;
for one that does not (attention and feed-forward outputs on several tensor shards), the channels are read once more,
in pieces, whichever shard asks first. Scales are kept, matrices are not.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cached_property
from math import prod

import numpy as np
from numpy.typing import NDArray

from spotjax.errors import CheckpointError, ConfigError
from spotjax.meshes.slices import ArraySlice, Index, relative
from spotjax.models.checkpoint import Checkpoint, check_index, read_into
from spotjax.models.fingerprint import sample_of
from spotjax.models.quantization import INPUT_AXES, SCALE, Quantization, quantize, scales_from
from spotjax.models.spec import ArraySpec, ModelSpec

BLOCK_BYTES = 256 << 20
"""Of float32 that one reading thread has in memory at once, about."""


class QuantizedCheckpoint:
    """Another checkpoint in int8. A ``Checkpoint`` that reads many slices at once; safe to use from several threads.

    Args:
      checkpoint: what is read, not quantized.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._spec = replace(checkpoint.spec, quantization="int8")
        self._arrays = {array.name: array for array in self._spec.parameters}
        self._channels = {
            name: _Channels(checkpoint, array)
            for name, array in self._arrays.items()
            if self._spec.element_type(name) == "int8"
        }

    @property
    def spec(self) -> ModelSpec:
        """See ``Checkpoint``."""
        return self._spec

    def read(self, name: str, index: Index) -> np.ndarray:
        """See ``Checkpoint.read``.

        Raises:
          CheckpointError: also if weights are not finite.
        """
        if name not in self._arrays:
            raise CheckpointError(f"the model has no array {name!r}")
        check_index(self._arrays[name], index)
        content = np.empty([stop - start for start, stop in index], self._spec.element_type(name) or np.float32)
        self.read_into([(ArraySlice(name, index), content)])
        return content

    def read_into(self, wanted: Iterable[tuple[ArraySlice, np.ndarray]]) -> None:
        """See ``models.checkpoint.read_into``."""
        plain, matrices = list[tuple[ArraySlice, np.ndarray]](), list[tuple[ArraySlice, np.ndarray]]()
        scales = list[tuple[ArraySlice, np.ndarray]]()
        for piece, target in wanted:
            kind = self._spec.element_type(piece.name)
            (plain if kind is None else matrices if kind == "int8" else scales).append((piece, target))
        for group in _groups(run for piece, target in matrices for run in self._runs(piece, target)):
            blocks = [(piece, np.empty(target.shape, np.float32)) for piece, target in group]
            read_into(self._checkpoint, [*plain, *blocks])
            plain = []
            for (piece, block), (_, target) in zip(blocks, group, strict=True):
                target[...] = self._channels[piece.name].quantize(piece.index, block)
        read_into(self._checkpoint, plain)
        for piece, target in scales:
            target[...] = self._channels[piece.name.removesuffix(SCALE)].scales(piece.index)

    def sample_digest(self, name: str, dtype: np.dtype) -> str:
        """See ``fingerprint.Sampled``."""
        return sample_of(self._checkpoint, self._arrays[name], dtype)

    def close(self) -> None:
        """See ``Checkpoint.close``."""
        self._checkpoint.close()

    def _runs(self, piece: ArraySlice, target: np.ndarray) -> Iterator[tuple[ArraySlice, np.ndarray]]:
        """A slice in runs of output channels that each fit a block."""
        axis = self._channels[piece.name].outputs[0]
        start, stop = piece.index[axis]
        step = max(1, (stop - start) * BLOCK_BYTES // max(1, 4 * piece.size))
        for first in range(start, stop, step):
            part = (*piece.index[:axis], (first, min(first + step, stop)), *piece.index[axis + 1 :])
            yield ArraySlice(piece.name, part), target[relative(part, piece.index)]


class _Channels:
    """The output channels of one matrix.

    Attributes:
      inputs, outputs: axes of the matrix.
    """

    def __init__(self, checkpoint: Checkpoint, array: ArraySpec) -> None:
        self._checkpoint, self._array = checkpoint, array
        self.inputs = INPUT_AXES[array.axes]
        self.outputs = tuple(axis for axis in range(len(array.shape)) if axis not in self.inputs)
        self._lock = threading.Lock()

    @cached_property
    def _scales(self) -> NDArray[np.float32]:
        """Not a number where they are not known yet."""
        return np.full([self._array.shape[axis] for axis in self.outputs], np.nan, np.float32)

    def quantize(self, index: Index, block: NDArray[np.float32]) -> NDArray[np.int8]:
        """A part of the matrix, given as it is in the checkpoint."""
        channels = tuple(index[axis] for axis in self.outputs)
        if all(index[axis] == (0, self._array.shape[axis]) for axis in self.inputs):
            with self._lock:
                self._learn(channels, block)
        return quantize(block, np.expand_dims(self.scales(channels), self.inputs))

    def scales(self, channels: Index) -> NDArray[np.float32]:
        """Of some channels, by their indices; reads those that are not known yet."""
        picked = tuple(slice(*extent) for extent in channels)
        with self._lock:
            if np.isnan(self._scales[picked]).any():
                (start, stop), *others = channels
                row = prod(self._array.shape[axis] for axis in self.inputs) * prod(b - a for a, b in others)
                step = max(1, BLOCK_BYTES // (4 * max(1, row)))
                for first in range(start, stop, step):
                    some = ((first, min(first + step, stop)), *others)
                    self._learn(some, self._checkpoint.read(self._array.name, self._whole(some)))
            return self._scales[picked]

    def _whole(self, channels: Index) -> Index:
        """All inputs of some channels."""
        extents = iter(channels)
        return tuple(
            (0, extent) if axis in self.inputs else next(extents) for axis, extent in enumerate(self._array.shape)
        )

    def _learn(self, channels: Index, block: NDArray[np.float32]) -> None:
        """Scales of channels of which a block has all inputs."""
        peaks = np.maximum(block.max(self.inputs, initial=0), -block.min(self.inputs, initial=0))
        if not np.isfinite(peaks).all():
            raise CheckpointError(f"{self._array.name} has weights that are not finite and cannot be quantized")
        self._scales[tuple(slice(*extent) for extent in channels)] = scales_from(peaks)


def _groups(
    runs: Iterable[tuple[ArraySlice, np.ndarray]],
) -> Iterator[list[tuple[ArraySlice, np.ndarray]]]:
    """Runs to be in memory at once: as many as fit a block."""
    group, size = list[tuple[ArraySlice, np.ndarray]](), 0
    for piece, target in runs:
        if group and size + 4 * piece.size > BLOCK_BYTES:
            yield group
            group, size = [], 0
        group.append((piece, target))
        size += 4 * piece.size
    if group:
        yield group


def quantized(checkpoint: Checkpoint, quantization: Quantization) -> Checkpoint:
    """The checkpoint as it is to be served.

    Raises:
      ConfigError: it is stored quantized, and is to be served otherwise.
    """
    stored = checkpoint.spec.quantization
    if stored == quantization:
        return checkpoint
    if stored != "none":
        raise ConfigError(f"the model is stored as {stored} and cannot be served with quantization {quantization}")
    return QuantizedCheckpoint(checkpoint)
