"""Where a worker puts its parameters together: in its store, which outlives the process. A ``ShardMemory``."""

from __future__ import annotations

import logging
import threading

import numpy as np

from spotjax.meshes.instance import DeviceRef
from spotjax.meshes.slices import ArraySlice
from spotjax.planner.holdings import Needs
from spotjax.reshard.parameter_store import ParameterStore, StoredShard
from spotjax.reshard.shards import host_buffer

log = logging.getLogger(__name__)


class StoreMemory:
    """Shards in a parameter store; in plain memory where the store is full. Safe to use from several threads."""

    shared = True

    def __init__(self, store: ParameterStore) -> None:
        self._store = store
        self._writing: dict[tuple[DeviceRef, ArraySlice], StoredShard] = {}
        self._lock = threading.Lock()

    def allocate(self, target: DeviceRef, wanted: ArraySlice, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """See ``ShardMemory.allocate``."""
        try:
            shard = self._store.allocate(target.index, wanted.name, wanted.index, shape, dtype)
        except OSError as problem:
            log.warning("no room in the parameter store, going on without: %s", problem)
            return host_buffer(shape, dtype)
        with self._lock:
            unfinished = self._writing.pop((target, wanted), None)
            self._writing[target, wanted] = shard
        if unfinished is not None:  # of a plan that was cut short
            unfinished.discard()
        return shard.content

    def complete(self, target: DeviceRef, wanted: ArraySlice) -> None:
        """See ``ShardMemory.complete``."""
        with self._lock:
            shard = self._writing.pop((target, wanted), None)
        if shard is not None:
            shard.seal()

    def keep(self, held: dict[DeviceRef, Needs]) -> None:
        """Lets go of everything but these parts."""
        with self._lock:
            unfinished = list(self._writing.values())
            self._writing.clear()
        for shard in unfinished:
            shard.discard()
        self._store.keep({(d.index, name, index) for d, arrays in held.items() for name, index in arrays.items()})
