"""The only bridge from logical layouts to ``jax.sharding``: how the shards of one stage lie on its devices.

Devices of a stage may belong to several processes of one jax runtime, the hosts of a TPU slice. Each process then has
its own part of every array, and only computations that all of them start cross the border.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from spotjax.meshes.layout import rules_of, shard_shape
from spotjax.models.spec import ArraySpec, ModelSpec

TENSOR_AXIS = "tensor"


def stage_mesh(devices: Sequence[jax.Device]) -> Mesh:
    """The one-axis mesh of the M devices that share a stage."""
    return Mesh(np.array(devices), (TENSOR_AXIS,))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device of the stage."""
    return NamedSharding(mesh, PartitionSpec())


def array_sharding(array: ArraySpec, spec: ModelSpec, mesh: Mesh) -> NamedSharding:
    """How ``array`` lies on the stage's devices."""
    return NamedSharding(mesh, PartitionSpec(*rules_of(spec, mesh.size).partition(array.axes)))


def stacked_shape(array: ArraySpec, spec: ModelSpec, tensor: int) -> tuple[int, ...]:
    """Shape of the jax array that holds all M shards side by side, padding and shared kv heads included."""
    local = shard_shape(array, spec, tensor)
    split = rules_of(spec, tensor).partition(array.axes)
    return tuple(extent * tensor if axis else extent for extent, axis in zip(local, split, strict=True))


def own(devices: Sequence[jax.Device]) -> tuple[jax.Device, ...]:
    """Those of the devices that belong to this process, in order."""
    return tuple(device for device in devices if device.process_index == device.client.process_index())


def place(content: np.ndarray | jax.Array, sharding: NamedSharding) -> jax.Array:
    """The same array on all devices of ``sharding``; where they are several processes', all must give the same.

    ``jax.device_put`` would then compare what they gave, which takes a computation of its own.
    """
    if sharding.is_fully_addressable:
        placed: jax.Array = jax.device_put(content, sharding)
        return placed
    if isinstance(content, jax.Array):
        copies = [jax.device_put(content, device) for device in own(list(sharding.mesh.devices.flat))]
        return jax.make_array_from_single_device_arrays(content.shape, sharding, copies)
    return jax.make_array_from_callback(content.shape, sharding, lambda index: content[index])


def own_part(array: jax.Array) -> jax.Array:
    """This process's shards of an array of one mesh axis as an array over its own devices: the same buffers."""
    sharding = array.sharding
    if array.is_fully_addressable or not isinstance(sharding, NamedSharding):
        return array
    mesh = stage_mesh(own(list(sharding.mesh.devices.flat)))
    return _over(array, NamedSharding(mesh, sharding.spec), mesh.size, sharding.mesh.size)


def joined(part: jax.Array, devices: Sequence[jax.Device]) -> jax.Array:
    """The reverse: the array over all ``devices`` of which this process has ``part``."""
    sharding = part.sharding
    if not isinstance(sharding, NamedSharding) or sharding.mesh.size == len(devices):
        return part
    return _over(part, NamedSharding(stage_mesh(devices), sharding.spec), len(devices), sharding.mesh.size)


def _over(array: jax.Array, sharding: NamedSharding, size: int, before: int) -> jax.Array:
    """The addressable buffers of an array as one with that sharding over ``size`` instead of ``before`` devices."""
    split = [*sharding.spec, *(None,) * (array.ndim - len(sharding.spec))]
    shape = [extent * size // before if axis else extent for extent, axis in zip(array.shape, split, strict=True)]
    return jax.make_array_from_single_device_arrays(
        tuple(shape), sharding, [shard.data for shard in array.addressable_shards]
    )


def assemble(array: ArraySpec, spec: ModelSpec, mesh: Mesh, shards: Sequence[jax.Array]) -> jax.Array:
    """One jax array over buffers that are already on the stage's devices, in tensor order; nothing is copied.

    Where some devices are other processes', ``shards`` are those of this one.
    """
    shape = stacked_shape(array, spec, mesh.size)
    return jax.make_array_from_single_device_arrays(shape, array_sharding(array, spec, mesh), list(shards))
