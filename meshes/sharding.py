"""The only bridge from logical layouts to ``jax.sharding``: how the shards of one stage lie on its devices."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from spotjax.meshes.layout import shard_shape
from spotjax.meshes.rules import AxisRules
from spotjax.models.spec import ArraySpec, Axes, ModelSpec

TENSOR_AXIS = "tensor"
RULES = AxisRules()


def stage_mesh(devices: Sequence[jax.Device]) -> Mesh:
    """The one-axis mesh of the M devices that share a stage."""
    return Mesh(np.array(devices), (TENSOR_AXIS,))


def partition_spec(axes: Axes) -> PartitionSpec:
    """Logical axes to mesh axes."""
    return PartitionSpec(*RULES.partition(axes))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device of the stage."""
    return NamedSharding(mesh, PartitionSpec())


def array_sharding(array: ArraySpec, mesh: Mesh) -> NamedSharding:
    """How ``array`` lies on the stage's devices."""
    return NamedSharding(mesh, partition_spec(array.axes))


def stacked_shape(array: ArraySpec, spec: ModelSpec, tensor: int) -> tuple[int, ...]:
    """Shape of the jax array that holds all M shards side by side, padding and shared kv heads included."""
    local = shard_shape(array, spec, tensor)
    split = RULES.partition(array.axes)
    return tuple(extent * tensor if axis else extent for extent, axis in zip(local, split, strict=True))


def assemble(array: ArraySpec, spec: ModelSpec, mesh: Mesh, shards: Sequence[jax.Array]) -> jax.Array:
    """One jax array over buffers that are already on the stage's devices, in tensor order; nothing is copied."""
    shape = stacked_shape(array, spec, mesh.size)
    return jax.make_array_from_single_device_arrays(shape, array_sharding(array, mesh), list(shards))
