"""One Orbax checkpoint of a checkpoint directory, read through tensorstore: its arrays, and whether they are intact."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import product
from typing import Any

# Registers bfloat16 with numpy, which has none of its own.
import ml_dtypes  # noqa: F401
import numpy as np
import tensorstore as ts
import xxhash

from spotjax.errors import CheckpointError
from spotjax.meshes.slices import Index, whole
from spotjax.models.orbax_manifest import OCDBT_MANIFEST, PARAMETERS, REMEDY, Part, checksum, kvstore

NODE_CACHE = 100 << 20
"""Bytes kept in memory of what says where chunks are; chunks themselves are not kept."""
FILE_READS = 16
"""Reads of files at once: enough that the disk reads on while chunks are checked and copied."""
RUN_BYTES = 8 << 20
"""About so much of an array is in memory when all of it is written or verified."""

FAILURES = (ValueError, KeyError, IndexError, OSError, RuntimeError)
"""What tensorstore raises, by the status of what failed."""


def make_context() -> ts.Context:
    """Limits and caches that the parts of a checkpoint share."""
    return ts.Context(
        {"cache_pool#ocdbt": {"total_bytes_limit": NODE_CACHE}, "file_io_concurrency": {"limit": FILE_READS}}
    )


class StoredPart:
    """One part.

    Args:
      location: of the checkpoint.
      name: of the part.
      record: what it consists of.
      context: of ``make_context``.
    """

    def __init__(self, location: str, name: str, record: Part, context: ts.Context) -> None:
        self.record = record
        self._name, self._context = name, context
        self._base = kvstore(location, PARAMETERS, name)
        self._where = f"{location}: {name}"
        self._opened: dict[str, ts.TensorStore] = {}
        self._opening = threading.Lock()

    def identify(self) -> Identification:
        """Starts to check that the files are those of the record."""
        store = ts.KvStore.open(self._base, context=self._context).result()
        return Identification(self, store.read(OCDBT_MANIFEST))

    def array(self, name: str) -> ts.TensorStore:
        """One array, opened when it is first asked for.

        Raises:
          CheckpointError: it is not there, or not what the record says.
        """
        with self._opening:
            if name not in self._opened:
                self._opened[name] = self._open(name)
            return self._opened[name]

    def verify(self) -> None:
        """Reads everything and compares its checksums.

        Raises:
          CheckpointError: something is not what was saved.
        """
        for name, stored in self.record.arrays.items():
            array, digest = self.array(name), xxhash.xxh3_64()
            for run in chunk_runs(stored.shape, stored.chunk, array.dtype.numpy_dtype.itemsize):
                try:
                    content = array[as_slices(run)].read(order="C").result()
                except FAILURES as error:
                    raise self.damaged(name, error) from error
                add_chunks(digest, content, stored.chunk)
            if digest.hexdigest() != stored.checksum:
                raise self.damaged(name, "its checksum is wrong")

    def damaged(self, name: str, problem: object) -> CheckpointError:
        """The error to raise because of an array or file of the part."""
        shown = str(problem).split(" [")[0]  # the rest is tensorstore's own source locations
        return CheckpointError(f"{self._where}: {name} cannot be read: {shown}; {REMEDY}")

    def _open(self, name: str) -> ts.TensorStore:
        node = {"driver": "ocdbt", "base": self._base, "path": f"{name}/", "cache_pool": "cache_pool#ocdbt"}
        spec: dict[str, Any] = {
            "driver": "zarr3",
            "kvstore": node,
            "recheck_cached_data": False,
            "recheck_cached_metadata": False,
            "fill_missing_data_reads": False,  # a chunk that is missing is an error, not zeros
        }
        try:
            array = ts.open(spec, open=True, read=True, context=self._context).result()
        except FAILURES as error:
            raise self.damaged(name, error) from error
        stored = self.record.arrays[name]
        dtype = stored.dtype or self.record.dtype
        if (array.shape, array.dtype.name) != (stored.shape, dtype):
            found = f"it is {array.dtype.name}{list(array.shape)} instead of {dtype}{list(stored.shape)}"
            raise self.damaged(name, found)
        return array


class Identification:
    """A check of a part that is under way."""

    def __init__(self, part: StoredPart, read: Any) -> None:
        self._part, self._read = part, read

    def finish(self) -> None:
        """Waits for it.

        Raises:
          CheckpointError: the part is missing, damaged or another one.
        """
        try:
            content = self._read.result()
        except FAILURES as error:
            raise self._part.damaged(OCDBT_MANIFEST, error) from error
        if content.state != "value":
            raise self._part.damaged(OCDBT_MANIFEST, "it is missing")
        if checksum(content.value) != self._part.record.checksum:
            raise self._part.damaged(OCDBT_MANIFEST, "it is damaged or another checkpoint's")


def as_slices(index: Index) -> tuple[slice, ...]:
    """An index as numpy and tensorstore take it."""
    return tuple(slice(*extent) for extent in index)


def split_axis(shape: tuple[int, ...], chunk: tuple[int, ...]) -> int:
    """The first axis along which an array has several chunks."""
    return next((axis for axis, (extent, part) in enumerate(zip(shape, chunk, strict=True)) if part < extent), 0)


def chunk_runs(shape: tuple[int, ...], chunk: tuple[int, ...], itemsize: int) -> Iterator[Index]:
    """An array in runs of whole chunks, in order, of about ``RUN_BYTES`` each."""
    axis = split_axis(shape, chunk)
    row = int(np.prod(shape)) // shape[axis] * chunk[axis] * itemsize
    step = max(1, RUN_BYTES // row) * chunk[axis]
    for start in range(0, shape[axis], step):
        extents = (*shape[:axis], min(step, shape[axis] - start), *shape[axis + 1 :])
        split_further = row > RUN_BYTES and any(part < extent for extent, part in zip(extents, chunk, strict=True))
        for index in chunk_runs(extents, chunk, itemsize) if split_further else [whole(extents)]:
            first, last = index[axis]
            yield (*index[:axis], (start + first, start + last), *index[axis + 1 :])


def add_chunks(digest: xxhash.xxh3_64, run: np.ndarray, chunk: tuple[int, ...]) -> None:
    """Adds the contents of a run of chunks to a checksum: chunk after chunk, without padding."""
    starts = (range(0, extent, part) for extent, part in zip(run.shape, chunk, strict=True))
    for corner in product(*starts):
        picks = tuple(slice(start, start + part) for start, part in zip(corner, chunk, strict=True))
        digest.update(np.ascontiguousarray(run[picks]).reshape(-1).view(np.uint8))
