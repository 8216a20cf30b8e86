"""What a runtime asks of others while it carries out a plan, and where it puts parameters. Interfaces only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from spotjax.meshes.instance import DeviceRef
from spotjax.meshes.slices import ArraySlice, Range
from spotjax.reshard.shards import host_buffer


class Peers(Protocol):
    """Reads what instances of other runtimes hold. Safe to use from several threads; calls block."""

    def read_slice(self, source: DeviceRef, wanted: ArraySlice, into: np.ndarray) -> None:
        """Fills ``into``, contiguous, with a slice of a parameter.

        Raises:
          PeerUnreachable: the instance is gone, silent, or no longer has it.
        """
        ...

    def read_pages(self, instance: str, replica: int, layers: Range, pages: Sequence[int], into: np.ndarray) -> None:
        """Fills ``into``, bytes as ``KvMover.host_pages`` lays them out, with KV pages of a replica's current stage.

        Raises:
          PeerUnreachable: as above.
        """
        ...

    def read_backup(self, instance: str, layers: Range, owners: Sequence[tuple[int, int]], into: np.ndarray) -> None:
        """The same with copies that an instance keeps in host memory of pages by (sequence, number in it).

        Raises:
          PeerUnreachable: as above.
        """
        ...


class ShardMemory(Protocol):
    """Host memory that parameters are put together in on their way to a device."""

    shared: bool
    """Whether shards must pass through it even if another device of the process has them already."""

    def allocate(self, target: DeviceRef, wanted: ArraySlice, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Zeros, 64-byte aligned, for one shard."""
        ...

    def complete(self, target: DeviceRef, wanted: ArraySlice) -> None:
        """The shard's content is all there and does not change any more."""
        ...


class ProcessMemory:
    """Plain memory of this process. A ``ShardMemory``."""

    shared = False

    def allocate(self, target: DeviceRef, wanted: ArraySlice, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """See ``ShardMemory.allocate``."""
        return host_buffer(shape, dtype)

    def complete(self, target: DeviceRef, wanted: ArraySlice) -> None:
        """See ``ShardMemory.complete``."""
