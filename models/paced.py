"""A checkpoint that is read no faster than so many bytes per second, for storage that many machines share."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

import numpy as np

from spotjax.meshes.slices import ArraySlice, Index
from spotjax.models.checkpoint import Checkpoint, read_into
from spotjax.models.spec import ModelSpec


class PacedCheckpoint:
    """Another checkpoint, with a limit. A ``Checkpoint``; reads from several threads share the limit.

    Args:
      checkpoint: what is read.
      bandwidth: bytes per second, as stored.
      clock: monotonic seconds.
      sleep: waits that many seconds.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        bandwidth: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._checkpoint, self._bandwidth = checkpoint, bandwidth
        self._clock, self._sleep = clock, sleep
        self._lock, self._free_at = threading.Lock(), clock()

    @property
    def spec(self) -> ModelSpec:
        """See ``Checkpoint``."""
        return self._checkpoint.spec

    def read(self, name: str, index: Index) -> np.ndarray:
        """See ``Checkpoint.read``."""
        until = self._take([ArraySlice(name, index)])
        content = self._checkpoint.read(name, index)
        self._wait(until)
        return content

    def read_into(self, wanted: Iterable[tuple[ArraySlice, np.ndarray]]) -> None:
        """See ``models.checkpoint.read_into``."""
        slices = list(wanted)
        until = self._take([piece for piece, _ in slices])
        read_into(self._checkpoint, slices)
        self._wait(until)

    def close(self) -> None:
        """See ``Checkpoint.close``."""
        self._checkpoint.close()

    def _take(self, wanted: Iterable[ArraySlice]) -> float:
        """When these, after all that was asked for before, may have been read."""
        size = sum(piece.size * self.spec.element_bytes(piece.name) for piece in wanted)
        with self._lock:
            begin = max(self._free_at, self._clock())
            self._free_at = begin + size / self._bandwidth
            return self._free_at

    def _wait(self, until: float) -> None:
        if (left := until - self._clock()) > 0:
            self._sleep(left)
