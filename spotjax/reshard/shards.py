"""Which buffers of which arrays are on which device of this process. Holds references; decides and moves nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import jax
import numpy as np

from spotjax.errors import SliceUnavailable
from spotjax.meshes.instance import DeviceRef
from spotjax.meshes.slices import ArraySlice, Index, intersect, relative


@dataclass(frozen=True, slots=True)
class Shard:
    """A part of an array in one device's memory.

    Attributes:
      index: what the buffer holds, in the array's own indices; padding follows it along split axes.
      buffer: single-device jax array, at least as large as ``index`` along every axis.
    """

    index: Index
    buffer: jax.Array

    def read(self, index: Index) -> np.ndarray:
        """The part ``index`` as a host array; a view where the device's memory is the host's.

        Raises:
          RuntimeError: the buffer was deleted because its instance is gone.
        """
        view: np.ndarray = np.asarray(self.buffer)[relative(index, self.index)]
        return view


class ShardStore:
    """Shards of parameters by device and array name. Immutable: a change of the mesh makes a new one."""

    def __init__(self, shards: Mapping[DeviceRef, Mapping[str, Shard]]) -> None:
        self._shards = shards

    def get(self, device: DeviceRef, name: str) -> Shard | None:
        """What a device holds of an array, if anything."""
        return self._shards.get(device, {}).get(name)

    def at(self, device: DeviceRef) -> Mapping[str, Shard]:
        """All that a device holds."""
        return self._shards.get(device, {})

    def read(self, device: DeviceRef, wanted: ArraySlice) -> np.ndarray:
        """One slice from one device.

        Raises:
          SliceUnavailable: the device does not hold all of it.
        """
        shard = self.get(device, wanted.name)
        if shard is None or intersect(shard.index, wanted.index) != wanted.index:
            raise SliceUnavailable(f"device {device} does not hold {wanted.name}{list(wanted.index)}")
        return shard.read(wanted.index)

    def over(self, older: ShardStore) -> ShardStore:
        """These shards, and of devices that have none, those of ``older``."""
        return ShardStore({**older._shards, **{device: held for device, held in self._shards.items() if held}})

    def without(self, instance: str) -> ShardStore:
        """What is left when an instance is gone. Frees every buffer on it, so that nothing can be read any more."""
        for device, shards in self._shards.items():
            if device.instance == instance:
                delete_arrays(shard.buffer for shard in shards.values())
        return ShardStore({device: held for device, held in self._shards.items() if device.instance != instance})

    def devices(self) -> Iterable[DeviceRef]:
        """Devices that hold anything."""
        return self._shards.keys()


def delete_arrays(arrays: Iterable[jax.Array]) -> None:
    """Frees arrays now, whoever else refers to them."""
    for array in arrays:
        if not array.is_deleted():
            array.delete()


def host_buffer(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Zeros that start on a 64-byte boundary: ``device_put`` to a CPU device then takes them over without a copy.

    The memory must not be written again afterwards.
    """
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.zeros(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)
