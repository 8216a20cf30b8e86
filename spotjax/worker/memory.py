"""Where a worker puts its parameters together: in its store, which outlives the process. A ``ShardMemory``."""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from spotjax.meshes.instance import DeviceRef
from spotjax.meshes.slices import ArraySlice
from spotjax.planner.needs import Needs
from spotjax.reshard.parameter_store import Key, ParameterStore, StoredShard
from spotjax.reshard.shards import host_buffer

log = logging.getLogger(__name__)


class StoreMemory:
    """Shards in a parameter store; in plain memory where the store is full. Safe to use from several threads.

    Files are sealed and removed in a thread of its own: nobody who brings parameters or switches meshes waits for that.
    """

    shared = True

    def __init__(self, store: ParameterStore) -> None:
        self._store = store
        self._writing: dict[tuple[DeviceRef, ArraySlice], StoredShard] = {}
        self._lock = threading.Lock()
        self._files = ThreadPoolExecutor(1, thread_name_prefix="store")

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
            self._files.submit(self._seal, shard)

    def keep(self, held: dict[DeviceRef, Needs]) -> None:
        """Lets go of everything but these parts, soon."""
        with self._lock:
            unfinished = list(self._writing.values())
            self._writing.clear()
        wanted = {(d.index, name, index) for d, arrays in held.items() for name, index in arrays.items()}
        self._files.submit(self._sweep, unfinished, wanted)

    def settle(self) -> None:
        """Returns when everything is sealed, or removed, that was to be."""
        self._files.submit(lambda: None).result()

    def close(self) -> None:
        """The same, and ends the thread."""
        self._files.shutdown(wait=True)

    @staticmethod
    def _seal(shard: StoredShard) -> None:
        """What cannot be sealed costs the next process a copy, nothing else."""
        try:
            shard.seal()
        except OSError as problem:
            log.warning("a shard cannot be kept in the parameter store: %s", problem)

    def _sweep(self, unfinished: Sequence[StoredShard], wanted: Collection[Key]) -> None:
        try:
            for shard in unfinished:
                shard.discard()
            self._store.keep(wanted)
        except OSError as problem:
            log.warning("the parameter store cannot be swept: %s", problem)
