"""Whether two processes have the same weights, without reading all of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Protocol, runtime_checkable

import numpy as np
import xxhash

from spotjax.meshes.slices import Index, whole
from spotjax.models.checkpoint import Checkpoint
from spotjax.models.quantization import INPUT_AXES, quantize, scales_from
from spotjax.models.spec import ArraySpec, ModelSpec


@runtime_checkable
class Sampled(Protocol):
    """What has kept what the fingerprints of a model are made of."""

    @property
    def spec(self) -> ModelSpec:
        """Shapes and names of the model's arrays."""

    def sample_digest(self, name: str, dtype: np.dtype) -> str:
        """``sample_digest`` of the array's sample when it is served at ``dtype``, int8 for one that is quantized."""


def fingerprint(checkpoint: Checkpoint | Sampled, dtype: np.dtype) -> str:
    """A hash of the configuration, the dtype that it is served at, all vectors and the first row of every matrix.

    Every expert has matrices of its own. Of a matrix that is quantized it is the first output channel, in which the
    scale has a part. The samples count as they are served: weights that round to the same are the same. Fields of the
    configuration count where they differ from their defaults, so that fields which are added later change no
    fingerprint.
    """
    spec = checkpoint.spec
    values = ((field.name, getattr(spec.config, field.name), field.default) for field in fields(spec.config))
    chosen = sorted((name, value) for name, value, default in values if value != default)
    served = (dtype.name,) if spec.quantization == "none" else (dtype.name, spec.quantization)
    digest = hashlib.sha256(repr((chosen, *served)).encode())
    for array in spec.parameters:
        kind = spec.element_type(array.name)
        if kind != "float32":  # scales are in the samples of what they scale
            digest.update(f"{array.name}={sample_of(checkpoint, array, np.dtype(kind or dtype))};".encode())
    return digest.hexdigest()


def sample_of(checkpoint: Checkpoint | Sampled, array: ArraySpec, dtype: np.dtype) -> str:
    """``sample_digest`` of an array of a checkpoint, as it has been kept or of what is read."""
    if isinstance(checkpoint, Sampled):
        return checkpoint.sample_digest(array.name, dtype)
    return sample_digest(partial(checkpoint.read, array.name), array, dtype)


def sample_digest(read: Callable[[Index], np.ndarray], array: ArraySpec, dtype: np.dtype) -> str:
    """A hash of an array's sample when it is served at ``dtype``, hexadecimal.

    Args:
      read: gives any part of the array, not quantized.
      array: which one.
      dtype: int8 for one that is quantized.
    """
    if dtype == np.int8:
        channel = read(first_channel(array)).astype(np.float32, copy=False)
        scale = scales_from(np.abs(channel).max(INPUT_AXES[array.axes], keepdims=True))
        return digest_of(quantize(channel, scale) * scale)
    index = whole(array.shape)
    row = ((0, 1), *index[1:])
    if array.axes[0] == "expert":
        row = (index[0], (0, 1), *index[2:])
    return digest_of(read(index if len(index) == 1 else row).astype(dtype, copy=False))


def first_channel(array: ArraySpec) -> Index:
    """Where the first output channel of a matrix is; of every expert's."""
    whole_axes = {*INPUT_AXES[array.axes], *(axis for axis, name in enumerate(array.axes) if name == "expert")}
    return tuple((0, extent) if axis in whole_axes else (0, 1) for axis, extent in enumerate(array.shape))


def digest_of(sample: np.ndarray) -> str:
    """A hash of an array, hexadecimal."""
    return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(sample).view(np.uint8))
