"""Whether two processes have the same weights, without reading all of them."""

from __future__ import annotations

import hashlib
from dataclasses import fields
from typing import Protocol, runtime_checkable

import numpy as np
import xxhash

from spotjax.meshes.slices import Index, whole
from spotjax.models.checkpoint import Checkpoint
from spotjax.models.spec import ArraySpec, ModelSpec


@runtime_checkable
class Sampled(Protocol):
    """What has kept what the fingerprints of a model are made of."""

    @property
    def spec(self) -> ModelSpec:
        """Shapes and names of the model's arrays."""

    def sample_digest(self, name: str, dtype: np.dtype) -> str:
        """``sample_digest`` of the array's sample."""


def fingerprint(checkpoint: Checkpoint | Sampled, dtype: np.dtype) -> str:
    """A hash of the configuration, the dtype that it is served at, all vectors and the first row of every matrix.

    Every expert has matrices of its own. The samples count as they are served: weights that round to the same are the
    same. Fields of the configuration count where they differ from their defaults, so that fields which are added later
    change no fingerprint.
    """
    spec = checkpoint.spec
    values = ((field.name, getattr(spec.config, field.name), field.default) for field in fields(spec.config))
    chosen = sorted((name, value) for name, value, default in values if value != default)
    digest = hashlib.sha256(repr((chosen, dtype.name)).encode())
    for array in spec.parameters:
        if isinstance(checkpoint, Sampled):
            sample = checkpoint.sample_digest(array.name, dtype)
        else:
            sample = sample_digest(checkpoint.read(array.name, sample_index(array)), dtype)
        digest.update(f"{array.name}={sample};".encode())
    return digest.hexdigest()


def sample_index(array: ArraySpec) -> Index:
    """What of an array goes into a fingerprint."""
    index = whole(array.shape)
    if array.axes[0] == "expert":
        return (index[0], (0, 1), *index[2:])
    return index if len(index) == 1 else ((0, 1), *index[1:])


def sample_digest(sample: np.ndarray, dtype: np.dtype) -> str:
    """A hash of an array's sample when it is served at ``dtype``, hexadecimal."""
    return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(sample.astype(dtype, copy=False)).view(np.uint8))
