"""Saves parameters with Orbax, part by part, from a model's files or from live jax arrays, in pieces.

Only a few chunks are in memory at a time: Orbax gets leaves that are read while they are written.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
import xxhash
from orbax.checkpoint import type_handlers

from spotjax.checkpoint.chunks import chunk_shape
from spotjax.checkpoint.completion import check_incomplete, drop_record, find_record, leave_record
from spotjax.errors import CheckpointError, SliceUnavailable
from spotjax.meshes.slices import Index, intersect, relative, remainder
from spotjax.models.config import DecoderConfig
from spotjax.models.fingerprint import digest_of, first_channel, sample_digest
from spotjax.models.orbax_manifest import (
    DTYPES,
    OCDBT_MANIFEST,
    PARAMETERS,
    Part,
    StoredArray,
    checksum,
    itemsize,
    kvstore,
    parts_of,
)
from spotjax.models.orbax_part import FAILURES, add_chunks, as_slices, chunk_runs
from spotjax.models.quantization import INPUT_AXES, SCALE, ElementType, Quantization, scale_axes
from spotjax.models.spec import ArraySpec, ModelSpec
from spotjax.reshard.shards import Shard

Source = Callable[[Index], np.ndarray]
"""Gives any part of one array."""

Progress = Callable[[int], None]
"""Is told how many bytes more have been written."""

IN_FLIGHT = 16 << 20
"""Bytes being written at once."""


class ParameterWriter:
    """Writes the parts of one checkpoint; several processes may each write some of them. ``complete`` comes after all.

    Args:
      location: directory of the checkpoint: a path, or a ``gs://`` URL as far as Orbax writes there (not tried).
      config: of the model.
      dtype: that parameters are stored as, ``float32`` or ``bfloat16``, where they are not quantized.
      quantization: of the sources, and of what is stored.

    Raises:
      CheckpointError: there is a complete checkpoint already, or the type is another.
    """

    def __init__(self, location: str, config: DecoderConfig, dtype: str, quantization: Quantization = "none") -> None:
        if dtype not in DTYPES:
            raise CheckpointError(f"parameters can be stored as {' or '.join(DTYPES)}, not as {dtype}")
        check_incomplete(location)
        self._location, self._dtype = location, dtype
        self._spec = ModelSpec(config, itemsize(dtype), quantization)
        self.parts: Mapping[str, Mapping[str, ArraySpec]] = parts_of(self._spec)
        """All parts of the model, and the arrays of each by their name in it."""
        own = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(primary_host=own, active_processes={own})
        registry = type_handlers.create_type_handler_registry(
            (_Leaf, _LeafHandler()),
            (jax.Array, type_handlers.ArrayHandler()),  # or Orbax warns that there is none
        )
        handler = ocp.PyTreeCheckpointHandler(
            use_ocdbt=True,
            use_zarr3=True,
            use_compression=False,
            multiprocessing_options=alone,
            type_handler_registry=registry,
        )
        self._checkpointer = ocp.Checkpointer(handler, multiprocessing_options=alone)

    def write(self, part: str, sources: Mapping[str, Source], progress: Progress | None = None) -> Part:
        """Writes one part, replacing what is there of it, and leaves a record for ``complete``.

        Args:
          part: a key of ``parts``.
          sources: of every array of the part, by its name in the model.
          progress: is told what has been written.

        Raises:
          CheckpointError: it cannot be written.
        """
        leaves = self._leaves(part, sources, progress)
        try:
            drop_record(self._location, part)
            self._checkpointer.save(self._path(part), args=ocp.args.PyTreeSave(leaves), force=True)
            found = ts.KvStore.open(kvstore(self._location, PARAMETERS, part)).result().read(OCDBT_MANIFEST).result()
        except FAILURES as error:
            raise CheckpointError(f"{self._location}: {part} cannot be written: {error}") from error
        record = Part(self._dtype, {name: leaf.stored() for name, leaf in leaves.items()}, checksum(found.value))
        leave_record(self._location, part, record)
        return record

    def written(self, part: str, sources: Mapping[str, Source]) -> Part | None:
        """The record of a part that an earlier writer completed from the same sources, all of which are read for it."""
        record = find_record(self._location, part)
        if record is None or record.dtype != self._dtype or record.arrays.keys() != self.parts[part].keys():
            return None
        for name, leaf in self._leaves(part, sources).items():
            for run in chunk_runs(leaf.shape, leaf.chunk, leaf.dtype.itemsize):
                add_chunks(leaf.digest, leaf.read(run), leaf.chunk)
            if leaf.stored() != record.arrays[name]:
                return None
        return record

    def close(self) -> None:
        """Ends the writer's threads."""
        self._checkpointer.close()

    def _leaves(self, part: str, sources: Mapping[str, Source], progress: Progress | None = None) -> dict[str, _Leaf]:
        leaves = {}
        for name, array in self.parts[part].items():
            chunk = chunk_shape(array, self._spec, self._spec.element_bytes(array.name))
            kind, scales = self._spec.element_type(array.name), sources.get(array.name + SCALE)
            leaves[name] = _Leaf(array, chunk, self._dtype, kind, sources[array.name], scales, progress)
        return leaves

    def _path(self, part: str) -> str:
        base = kvstore(self._location, PARAMETERS, part)
        return base if isinstance(base, str) else base["path"]


def source_of(shards: Sequence[Shard]) -> Source:
    """An array of which devices of this process hold parts, of any sizes, together all of it.

    Each shard is copied to the host once, or not at all where the device's memory is the host's.

    Raises (when it is read):
      SliceUnavailable: the shards do not cover what is asked for.
      RuntimeError: a buffer was deleted because its instance is gone.
    """
    contents: dict[int, np.ndarray] = {}

    def read(index: Index) -> np.ndarray:
        if remainder(index, [shard.index for shard in shards]):
            raise SliceUnavailable(f"the devices of this process do not hold all of {list(index)}")
        whole = np.empty([stop - start for start, stop in index], shards[0].buffer.dtype)
        for number, shard in enumerate(shards):
            if (common := intersect(index, shard.index)) is not None:
                if number not in contents:
                    contents[number] = _host_copy(shard.buffer)
                whole[relative(common, index)] = contents[number][relative(common, shard.index)]
        return whole

    return read


def _host_copy(buffer: jax.Array) -> np.ndarray:
    # A jax array keeps the host copy that was made of it as long as it lives itself: make it of another one.
    own = jax.make_array_from_single_device_arrays(buffer.shape, buffer.sharding, [buffer])
    return np.asarray(own)


class _Leaf:
    """An array to be written, as a leaf of the pytree that Orbax saves."""

    def __init__(
        self,
        array: ArraySpec,
        chunk: tuple[int, ...],
        dtype: str,
        kind: ElementType | None,
        source: Source,
        scales: Source | None,
        progress: Progress | None,
    ) -> None:
        self.shape, self.chunk, self.dtype = array.shape, chunk, np.dtype(kind or dtype)
        self.digest = xxhash.xxh3_64()
        self._array, self._kind, self._source, self._scales, self._progress = array, kind, source, scales, progress

    def read(self, index: Index) -> np.ndarray:
        """Part of the array, as it is to be stored."""
        return np.ascontiguousarray(self._source(index).astype(self.dtype, copy=False))

    def wrote(self, count: int) -> None:
        """Bytes more are on disk."""
        if self._progress is not None:
            self._progress(count)

    def stored(self) -> StoredArray:
        """The record of the array, once all of it was added to the digest."""
        return StoredArray(self.shape, self.chunk, self.digest.hexdigest(), self._samples(), self._kind or "")

    def _samples(self) -> dict[str, str]:
        """By dtype that it is served at, what a fingerprint has of an array that is stored as this one is."""
        if self._kind == "float32":
            return {}
        if self._scales is not None:
            channel, inputs = first_channel(self._array), INPUT_AXES[self._array.axes]
            scale = self._scales(tuple(extent for axis, extent in enumerate(channel) if axis not in inputs))
            return {"int8": digest_of(self._source(channel) * np.expand_dims(scale, inputs))}
        served = (*DTYPES, "int8") if scale_axes(self._array.axes) is not None else DTYPES
        return {dtype: sample_digest(self.read, self._array, np.dtype(dtype)) for dtype in served}


class _LeafHandler(type_handlers.NumpyHandler):  # type: ignore[misc]  # Orbax has no types
    """Writes leaves in their own chunks, with a checksum each; Orbax reads them back like any numpy array."""

    async def serialize(
        self,
        values: Sequence[_Leaf],
        infos: Sequence[type_handlers.ParamInfo],
        args: Sequence[type_handlers.SaveArgs] | None = None,
    ) -> Sequence[Any]:
        """Reads and writes all leaves; nothing is left to be done in the background."""
        in_flight: deque[tuple[_Leaf, int, Any]] = deque()

        async def finish_oldest() -> None:
            leaf, size, commit = in_flight.popleft()
            await commit
            leaf.wrote(size)

        for leaf, info in zip(values, infos, strict=True):
            await info.await_path_creation()
            array = await ts.open(_write_spec(leaf, info), create=True, open=True, context=info.ts_context)
            for run in chunk_runs(leaf.shape, leaf.chunk, leaf.dtype.itemsize):
                content = leaf.read(run)
                add_chunks(leaf.digest, content, leaf.chunk)
                while in_flight and sum(size for _, size, _ in in_flight) + content.nbytes > IN_FLIGHT:
                    await finish_oldest()
                written = array[as_slices(run)].write(content, can_reference_source_data_indefinitely=True)
                in_flight.append((leaf, content.nbytes, written.commit))
        while in_flight:
            await finish_oldest()
        return []


def _write_spec(leaf: _Leaf, info: type_handlers.ParamInfo) -> ts.Spec:
    """Orbax's own specification of an array, but for the codecs: little-endian bytes and their CRC32C."""
    spec = type_handlers.get_json_tspec_write(
        info,
        use_ocdbt=True,
        global_shape=leaf.shape,
        local_shape=leaf.chunk,
        dtype=leaf.dtype,
        process_index=jax.process_index(),
    )
    spec["metadata"]["codecs"] = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    return ts.Spec(spec)
