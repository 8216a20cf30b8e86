"""Brings parameters to where a new placement needs them. Reads devices and checkpoint, never changes what is there.

A shard that is already in place is the same buffer afterwards. A shard that another device holds exactly goes over by
``jax.device_put``. Where shard boundaries change, the parts are put together in host memory, each copied once;
``device_put`` across changed boundaries would gather the whole array there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import jax
import numpy as np

from spotjax.errors import SliceUnavailable
from spotjax.meshes.instance import DeviceRef
from spotjax.meshes.layout import shard_shape
from spotjax.meshes.slices import ArraySlice, Index, intersect
from spotjax.models.spec import ModelSpec
from spotjax.planner.holdings import Needs
from spotjax.planner.migration import MigrationPlan, Phase, SliceMove
from spotjax.reshard.shards import Shard, ShardStore, host_buffer, place_into
from spotjax.reshard.transfer import Traffic


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
      device_of: the jax device of a reference.
    """

    def __init__(
        self, spec: ModelSpec, dtype: np.dtype, checkpoint: Checkpoint, device_of: Callable[[DeviceRef], jax.Device]
    ) -> None:
        self._spec, self._dtype, self._checkpoint, self._device_of = spec, dtype, checkpoint, device_of
        self._arrays = {array.name: array for array in spec.parameters}

    def carry_out(
        self, plan: MigrationPlan, needs: Mapping[DeviceRef, Needs], tensor: int, store: ShardStore, traffic: Traffic
    ) -> ShardStore:
        """The shards that ``needs`` asks for, on their devices.

        Args:
          plan: every missing slice with its source.
          needs: what each device must have; KV is ignored.
          tensor: M of the new mesh.
          store: what is there now.
          traffic: counts bytes.

        Raises:
          RuntimeError: a source's buffers were deleted because its instance was lost meanwhile.
          SliceUnavailable: a source, or a target that was to keep what it has, does not have it (any more).
        """
        moves: dict[tuple[DeviceRef, str], list[SliceMove]] = defaultdict(list)
        for move in plan.moves:
            if move.phase is Phase.PRECOPY:
                moves[move.target, move.slice.name].append(move)
        return ShardStore(
            {
                target: {
                    name: self._bring(ArraySlice(name, index), target, tensor, moves[target, name], store, traffic)
                    for name, index in arrays.items()
                    if name in self._arrays
                }
                for target, arrays in needs.items()
            }
        )

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
        if held is not None and held.index == wanted.index and held.buffer.shape == shape:
            return held
        self._count(moves, traffic)
        device = self._device_of(target)
        whole = self._whole(wanted, shape, moves, store)
        if whole is not None:
            return Shard(wanted.index, jax.device_put(whole, device))
        buffer = host_buffer(shape, self._dtype)
        common = intersect(held.index, wanted.index) if held is not None else None
        kept = ArraySlice(wanted.name, common).size if common is not None else 0
        if kept + sum(move.slice.size for move in moves) < wanted.size:
            raise SliceUnavailable(f"device {target} does not hold what of {wanted.name} the plan leaves in place")
        if held is not None and common is not None:
            place_into(buffer, wanted.index, common, held.read(common))
        for move in moves:
            place_into(buffer, wanted.index, move.slice.index, self._read(move, store))
        return Shard(wanted.index, jax.device_put(buffer, device))

    def _whole(
        self, wanted: ArraySlice, shape: tuple[int, ...], moves: Sequence[SliceMove], store: ShardStore
    ) -> jax.Array | None:
        """Another device's buffer that is exactly what is wanted, if the plan takes all from there."""
        if len(moves) != 1 or moves[0].source is None or moves[0].slice != wanted:
            return None
        shard = store.get(moves[0].source, wanted.name)
        fits = shard is not None and shard.index == wanted.index and shard.buffer.shape == shape
        return shard.buffer if shard is not None and fits else None

    def _read(self, move: SliceMove, store: ShardStore) -> np.ndarray:
        if move.source is None:
            return self._checkpoint.read(*move.slice)
        return store.read(move.source, move.slice)

    def _count(self, moves: Sequence[SliceMove], traffic: Traffic) -> None:
        for move in moves:
            size = move.slice.size * self._dtype.itemsize
            if move.source is None:
                traffic.loaded += size
            else:
                traffic.moved += size
