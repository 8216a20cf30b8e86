"""Brings parameters to where a new placement needs them. Reads devices, peers and checkpoint, changes nothing there.

A shard that is already in place is the same buffer afterwards. A shard that another device of the process holds exactly
goes over by ``jax.device_put``. Else its parts are put together in host memory, each copied once; ``device_put`` across
changed boundaries would gather the whole array there. Shards that take anything from the checkpoint are read many at
once, so that the disk is never waited for with nothing else to do.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Protocol

import jax
import numpy as np

from spotjax.errors import SliceUnavailable
from spotjax.meshes.instance import DeviceRef
from spotjax.meshes.layout import shard_shape
from spotjax.meshes.slices import ArraySlice, Index, intersect, relative
from spotjax.models.checkpoint import Readable, read_into
from spotjax.models.spec import ModelSpec
from spotjax.planner.migration import SliceMove
from spotjax.planner.needs import Needs
from spotjax.reshard.peers import Peers, ProcessMemory, ShardMemory
from spotjax.reshard.shards import Shard, ShardStore, delete_arrays
from spotjax.reshard.transfer import Traffic

STREAMS = 4
"""Shards brought at once, so that round trips to peers overlap and memory is made ready while others read."""
READ_BYTES = 16 << 20
"""Of shards that are read from the checkpoint at once, about."""


class Checkpoint(Readable, Protocol):
    """Where parameters come from that no device has."""


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A shard that a device is to have.

    Attributes:
      target: the device.
      slice: what of which array.
      shape: of the buffer.
      moves: what of it is not there yet, with sources.
    """

    target: DeviceRef
    slice: ArraySlice
    shape: tuple[int, ...]
    moves: Sequence[SliceMove]

    @property
    def comes_whole(self) -> bool:
        """Whether all of it is brought from elsewhere, whatever the device has."""
        return bool(self.moves) and sum(move.slice.size for move in self.moves) == self.slice.size

    def fits(self, shard: Shard) -> bool:
        """Whether a shard is just that."""
        return shard.index == self.slice.index and shard.buffer.shape == self.shape

    def place(self, buffer: np.ndarray, index: Index) -> np.ndarray:
        """The part ``index`` of the array in the shard's buffer."""
        part: np.ndarray = buffer[relative(index, self.slice.index)]
        return part

    def loads(self, buffer: np.ndarray) -> Iterator[tuple[ArraySlice, np.ndarray]]:
        """What comes from the checkpoint, and where in the shard's buffer it goes."""
        return ((move.slice, self.place(buffer, move.slice.index)) for move in self.moves if move.source is None)


class ParameterMover:
    """Carries out the parameter moves of migration plans.

    Args:
      spec: the model.
      dtype: of parameters on devices that are not quantized.
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
        self._lock = threading.Lock()
        """Guards counts and what follows."""
        self._brought: dict[tuple[DeviceRef, str], Shard] = {}
        """What was brought since ``settle``: a plan that was cut short was not in vain, the next finds it here."""
        self._lost: set[str] = set()
        """Instances lost since the last plan began: what is brought to them comes too late."""

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
        with self._lock:
            self._lost.clear()
        by_shard: dict[tuple[DeviceRef, str], list[SliceMove]] = defaultdict(list)
        for move in moves:
            by_shard[move.target, move.slice.name].append(move)
        wanted = [
            _Wanted(
                target,
                ArraySlice(name, index),
                shard_shape(self._arrays[name], self._spec, tensor),
                by_shard[target, name],
            )
            for target, arrays in needs.items()
            if self._device_of(target) is not None
            for name, index in arrays.items()
            if name in self._arrays
        ]
        brought: dict[DeviceRef, dict[str, Shard]] = defaultdict(dict)
        with ThreadPoolExecutor(STREAMS, thread_name_prefix="bring") as streams:
            bring = partial(self._bring, store=store, traffic=traffic)
            for one, shard in chain.from_iterable(streams.map(bring, _groups(wanted, self._bytes))):
                brought[one.target][one.slice.name] = shard
        return ShardStore(brought)

    def settle(self) -> None:
        """What was brought has become the current placement's, or is of no use any more."""
        self._brought = {}

    def lose(self, instance: str) -> None:
        """Frees what was brought to an instance that is gone."""
        with self._lock:
            self._lost.add(instance)
            gone = [key for key in self._brought if key[0].instance == instance]
            delete_arrays(self._brought.pop(key).buffer for key in gone)

    def _bring(self, group: Sequence[_Wanted], store: ShardStore, traffic: Traffic) -> list[tuple[_Wanted, Shard]]:
        """Shards on their devices: kept, copied whole, or put together; what the checkpoint has of them all at once."""
        kept, brought, begun = [], list[tuple[_Wanted, Shard]](), list[tuple[_Wanted, np.ndarray]]()
        for one in group:
            if (shard := self._kept(one, store)) is not None:
                kept.append((one, shard))
                continue
            self._count(one.moves, traffic)
            if (shard := self._copied(one, store)) is not None:
                brought.append((one, shard))
            else:
                begun.append((one, self._begin(one, store)))
        read_into(self._checkpoint, [load for one, buffer in begun for load in one.loads(buffer)])
        for one, buffer in begun:
            self._memory.complete(one.target, one.slice)
            brought.append((one, Shard(one.slice.index, jax.device_put(buffer, self._device_of(one.target)))))
        self._remember(brought)
        return kept + brought

    def _remember(self, brought: Iterable[tuple[_Wanted, Shard]]) -> None:
        """Keeps what was brought for the next plan, unless its instance was lost meanwhile: that has nothing left."""
        with self._lock:
            for one, shard in brought:
                if one.target.instance in self._lost:
                    delete_arrays([shard.buffer])
                else:
                    self._brought[one.target, one.slice.name] = shard

    def _kept(self, one: _Wanted, store: ShardStore) -> Shard | None:
        """The shard, if an earlier plan brought it or the device had it before."""
        had = None if one.comes_whole else store.get(one.target, one.slice.name)
        for shard in (self._brought.get((one.target, one.slice.name)), had):
            if shard is not None and one.fits(shard):
                return shard
        return None

    def _copied(self, one: _Wanted, store: ShardStore) -> Shard | None:
        """A copy of another device's buffer that is exactly what is wanted, if the plan takes all from there."""
        if self._memory.shared or len(one.moves) != 1 or one.moves[0].source is None:
            return None
        shard = store.get(one.moves[0].source, one.slice.name)
        if shard is None or one.moves[0].slice != one.slice or not one.fits(shard):
            return None
        return Shard(one.slice.index, jax.device_put(shard.buffer, self._device_of(one.target)))

    def _begin(self, one: _Wanted, store: ShardStore) -> np.ndarray:
        """The shard's buffer with all of it but what comes from the checkpoint."""
        held = None if one.comes_whole else store.get(one.target, one.slice.name)
        common = intersect(held.index, one.slice.index) if held is not None else None
        kept = ArraySlice(one.slice.name, common).size if common is not None else 0
        if kept + sum(move.slice.size for move in one.moves) < one.slice.size:
            name = one.slice.name
            raise SliceUnavailable(f"device {one.target} does not hold what of {name} the plan leaves in place")
        buffer = self._memory.allocate(one.target, one.slice, one.shape, self._dtype_of(one.slice.name))
        if held is not None and common is not None:
            one.place(buffer, common)[...] = held.read(common)
        for source, piece in ((move.source, move.slice) for move in one.moves):
            if source is not None:
                self._read(source, piece, store, one.place(buffer, piece.index))
        return buffer

    def _read(self, source: DeviceRef, piece: ArraySlice, store: ShardStore, place: np.ndarray) -> None:
        """Reads one slice from the device that has it."""
        if self._peers is None or self._device_of(source) is not None:
            place[...] = store.read(source, piece)
        elif place.flags.c_contiguous:
            self._peers.read_slice(source, piece, place)
        else:
            scratch = np.empty(place.shape, place.dtype)
            self._peers.read_slice(source, piece, scratch)
            place[...] = scratch

    def _dtype_of(self, array: str) -> np.dtype:
        return np.dtype(self._spec.element_type(array) or self._dtype)

    def _bytes(self, piece: ArraySlice) -> int:
        return piece.size * self._dtype_of(piece.name).itemsize

    def _count(self, moves: Sequence[SliceMove], traffic: Traffic) -> None:
        with self._lock:
            for move in moves:
                size = self._bytes(move.slice)
                if move.source is None:
                    traffic.loaded += size
                else:
                    traffic.moved += size


def _groups(wanted: Iterable[_Wanted], bytes_of: Callable[[ArraySlice], int]) -> Iterator[list[_Wanted]]:
    """Shards to bring at once: those that take from the checkpoint up to ``READ_BYTES``, every other one alone."""
    group, size = list[_Wanted](), 0
    for one in wanted:
        if not any(move.source is None for move in one.moves):
            yield [one]
            continue
        group.append(one)
        size += bytes_of(one.slice)
        if size >= READ_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group
