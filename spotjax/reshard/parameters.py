"""Brings parameters to where a new placement needs them. Reads devices, peers and checkpoint, changes nothing there.

A shard that is already in place is the same buffer afterwards. A shard that another device of the process holds exactly
goes over by ``jax.device_put``. Else its parts are put together in host memory, each copied once; ``device_put`` across
changed boundaries would gather the whole array there.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import jax
import numpy as np

from spotjax.errors import SliceUnavailable
from spotjax.meshes.instance import DeviceRef
from spotjax.meshes.layout import shard_shape
from spotjax.meshes.slices import ArraySlice, Index, intersect, relative
from spotjax.models.spec import ModelSpec
from spotjax.planner.holdings import Needs
from spotjax.planner.migration import SliceMove
from spotjax.reshard.peers import Peers, ProcessMemory, ShardMemory
from spotjax.reshard.shards import Shard, ShardStore, delete_arrays, place_into
from spotjax.reshard.transfer import Traffic

STREAMS = 4
"""Shards brought at once where some come from peers, so that their round trips overlap."""


class Checkpoint(Protocol):
    """Where parameters come from that no device has."""

    def read(self, name: str, index: Index) -> np.ndarray:
        """The index ranges of one array, float32."""
        ...


class ParameterMover:
    """Carries out the parameter moves of migration plans.

    Args:
      spec: the model.
      dtype: of parameters on devices.
      checkpoint: source of last resort.
      device_of: the jax device of a reference that is in this process, None for others.
      peers: other runtimes; None where all instances are in this process.
      memory: where shards are put together.
    """

    def __init__(
        self,
        spec: ModelSpec,
        dtype: np.dtype,
        checkpoint: Checkpoint,
        device_of: Callable[[DeviceRef], jax.Device | None],
        peers: Peers | None = None,
        memory: ShardMemory | None = None,
    ) -> None:
        self._spec, self._dtype, self._checkpoint, self._device_of = spec, dtype, checkpoint, device_of
        self._peers, self._memory = peers, memory or ProcessMemory()
        self._arrays = {array.name: array for array in spec.parameters}
        self._counting = threading.Lock()
        self._brought: dict[tuple[DeviceRef, str], Shard] = {}
        """What was brought since ``settle``: a plan that was cut short was not in vain, the next finds it here."""

    def carry_out(
        self,
        moves: Sequence[SliceMove],
        needs: Mapping[DeviceRef, Needs],
        tensor: int,
        store: ShardStore,
        traffic: Traffic,
    ) -> ShardStore:
        """The shards that ``needs`` asks for of this process's devices, on them.

        Args:
          moves: every missing slice of a parameter with its source.
          needs: what each device must have; KV is ignored.
          tensor: M of the new mesh.
          store: what is there now.
          traffic: counts bytes.

        Raises:
          RuntimeError: a source's buffers were deleted because its instance was lost meanwhile.
          SliceUnavailable: a source, or a target that was to keep what it has, does not have it (any more).
          PeerUnreachable: an instance of another process cannot be read from.
        """
        by_shard: dict[tuple[DeviceRef, str], list[SliceMove]] = defaultdict(list)
        for move in moves:
            by_shard[move.target, move.slice.name].append(move)
        wanted = [
            (target, ArraySlice(name, index))
            for target, arrays in needs.items()
            if self._device_of(target) is not None
            for name, index in arrays.items()
            if name in self._arrays
        ]

        def bring(one: tuple[DeviceRef, ArraySlice]) -> Shard:
            target, piece = one
            brought = self._brought.get((target, piece.name))
            if brought is not None and self._fits(brought, piece, tensor):
                return brought
            shard = self._bring(piece, target, tensor, by_shard[target, piece.name], store, traffic)
            self._brought[target, piece.name] = shard
            return shard

        if self._peers is None:
            shards = [bring(one) for one in wanted]
        else:
            with ThreadPoolExecutor(STREAMS, thread_name_prefix="bring") as streams:
                shards = list(streams.map(bring, wanted))
        brought: dict[DeviceRef, dict[str, Shard]] = defaultdict(dict)
        for (target, piece), shard in zip(wanted, shards, strict=True):
            brought[target][piece.name] = shard
        return ShardStore(brought)

    def settle(self) -> None:
        """What was brought has become the current placement's, or is of no use any more."""
        self._brought = {}

    def lose(self, instance: str) -> None:
        """Frees what was brought to an instance that is gone."""
        gone = [key for key in self._brought if key[0].instance == instance]
        delete_arrays(self._brought.pop(key).buffer for key in gone)

    def _fits(self, shard: Shard, wanted: ArraySlice, tensor: int) -> bool:
        """Whether a shard is just what a device of a mesh with that tensor degree is to have."""
        shape = shard_shape(self._arrays[wanted.name], self._spec, tensor)
        return shard.index == wanted.index and shard.buffer.shape == shape

    def _bring(
        self,
        wanted: ArraySlice,
        target: DeviceRef,
        tensor: int,
        moves: Sequence[SliceMove],
        store: ShardStore,
        traffic: Traffic,
    ) -> Shard:
        """One shard on one device: kept, copied whole, or put together."""
        shape = shard_shape(self._arrays[wanted.name], self._spec, tensor)
        held = store.get(target, wanted.name)
        if held is not None and self._fits(held, wanted, tensor):
            return held
        with self._counting:
            self._count(moves, traffic)
        device = self._device_of(target)
        whole = None if self._memory.shared else self._whole(wanted, tensor, moves, store)
        if whole is not None:
            return Shard(wanted.index, jax.device_put(whole, device))
        buffer = self._memory.allocate(target, wanted, shape, self._dtype)
        common = intersect(held.index, wanted.index) if held is not None else None
        kept = ArraySlice(wanted.name, common).size if common is not None else 0
        if kept + sum(move.slice.size for move in moves) < wanted.size:
            raise SliceUnavailable(f"device {target} does not hold what of {wanted.name} the plan leaves in place")
        if held is not None and common is not None:
            place_into(buffer, wanted.index, common, held.read(common))
        for move in moves:
            self._read(move, store, buffer, wanted.index)
        self._memory.complete(target, wanted)
        return Shard(wanted.index, jax.device_put(buffer, device))

    def _whole(
        self, wanted: ArraySlice, tensor: int, moves: Sequence[SliceMove], store: ShardStore
    ) -> jax.Array | None:
        """Another device's buffer that is exactly what is wanted, if the plan takes all from there."""
        if len(moves) != 1 or moves[0].source is None or moves[0].slice != wanted:
            return None
        shard = store.get(moves[0].source, wanted.name)
        return shard.buffer if shard is not None and self._fits(shard, wanted, tensor) else None

    def _read(self, move: SliceMove, store: ShardStore, buffer: np.ndarray, index: Index) -> None:
        """Reads one slice into its place in a buffer that holds ``index``."""
        if move.source is None:
            place_into(buffer, index, move.slice.index, self._checkpoint.read(*move.slice))
        elif self._peers is None or self._device_of(move.source) is not None:
            place_into(buffer, index, move.slice.index, store.read(move.source, move.slice))
        else:
            place = buffer[relative(move.slice.index, index)]
            if place.flags.c_contiguous:
                self._peers.read_slice(move.source, move.slice, place)
                return
            scratch = np.empty(place.shape, place.dtype)
            self._peers.read_slice(move.source, move.slice, scratch)
            place[...] = scratch

    def _count(self, moves: Sequence[SliceMove], traffic: Traffic) -> None:
        for move in moves:
            size = move.slice.size * self._dtype.itemsize
            if move.source is None:
                traffic.loaded += size
            else:
                traffic.moved += size
