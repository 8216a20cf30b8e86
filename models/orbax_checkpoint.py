"""Reads checkpoints that ``spotjax convert`` and ``spotjax checkpoint save`` wrote, through tensorstore alone.

Imports neither jax nor orbax: the controller, which has no use for them, opens models too.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
from etils import epath

from spotjax.errors import CheckpointError
from spotjax.meshes.slices import ArraySlice, Index
from spotjax.models.checkpoint import check_index
from spotjax.models.fingerprint import sample_digest
from spotjax.models.orbax_manifest import (
    MANIFEST,
    PARAMETERS,
    REMEDY,
    TOKENIZER,
    Manifest,
    checksum,
    decode,
    is_url,
    kvstore,
    place_of,
)
from spotjax.models.orbax_part import FAILURES, StoredPart, as_slices, make_context
from spotjax.models.spec import ModelSpec


class OrbaxCheckpoint:
    """A checkpoint directory. Reads any slice at little more than its bytes; every chunk is checked by its CRC32C.

    Args:
      location: a path, or a URL that tensorstore knows (``gs://``, ``s3://``); only paths were tried.

    Attributes:
      location: as given.
      manifest: what it consists of.

    Raises:
      CheckpointError: there is no checkpoint, or it is incomplete, damaged or of another format.
    """

    def __init__(self, location: str | Path) -> None:
        self.location, context = str(location), make_context()
        self._root = _open_root(self.location, context)
        self.manifest: Manifest = decode(self._read_file(MANIFEST, INCOMPLETE), self.location)
        self._spec = ModelSpec(self.manifest.config, quantization=self.manifest.quantization)
        self._places = {array.name: (array, *place_of(array)) for array in self._spec.parameters}
        self._parts = {
            name: StoredPart(self.location, name, record, context) for name, record in self.manifest.parts.items()
        }
        for identification in [part.identify() for part in self._parts.values()]:  # all at once
            identification.finish()

    @property
    def spec(self) -> ModelSpec:
        """Shapes and names of the model's arrays."""
        return self._spec

    def read(self, name: str, index: Index) -> np.ndarray:
        """See ``Checkpoint.read``; also raises CheckpointError where files are damaged or missing."""
        self._check(name, index)
        content = np.empty([stop - start for start, stop in index], self._spec.element_type(name) or np.float32)
        self.read_into([(ArraySlice(name, index), content)])
        return content

    def read_into(self, wanted: Iterable[tuple[ArraySlice, np.ndarray]]) -> None:
        """Reads many slices at once, each into an array of its shape, whatever its strides, converted to its dtype.

        Raises:
          CheckpointError: the model has no such array, or files are damaged or missing.
          ValueError: a slice reaches outside its array.
        """
        reads: list[tuple[str, Any]] = []
        for (name, index), target in wanted:
            self._check(name, index)
            if target.size:
                _, part, place = self._places[name]
                source = ts.cast(self._parts[part].array(place)[as_slices(index)], target.dtype)
                reads.append((name, ts.array(target).write(source)))
        for name, done in reads:
            try:
                done.result()
            except FAILURES as error:
                _, part, place = self._places[name]
                raise self._parts[part].damaged(place, error) from error

    def sample_digest(self, name: str, dtype: np.dtype) -> str:
        """See ``fingerprint.Sampled``."""
        array, part, place = self._places[name]
        kept = self.manifest.parts[part].arrays[place].samples.get(dtype.name)
        return kept if kept is not None else sample_digest(partial(self.read, name), array, dtype)

    def tokenizer_files(self) -> dict[str, bytes]:
        """Name and contents of each file in ``tokenizer/``.

        Raises:
          CheckpointError: one is missing or damaged.
        """
        files = {name: self._read_file(f"{TOKENIZER}/{name}", REMEDY) for name in self.manifest.tokenizer}
        for name, content in files.items():
            if checksum(content) != self.manifest.tokenizer[name]:
                raise CheckpointError(f"{self.location}: {TOKENIZER}/{name} has a wrong checksum; {REMEDY}")
        return files

    def close(self) -> None:
        """Lets go of all files; nothing can be read afterwards."""
        self._parts.clear()

    def _check(self, name: str, index: Index) -> None:
        if name not in self._places:
            raise CheckpointError(f"the model has no array {name!r}")
        check_index(self._places[name][0], index)

    def _read_file(self, name: str, remedy: str) -> bytes:
        try:
            found = self._root.read(name).result()
        except FAILURES as error:
            raise CheckpointError(f"{self.location}: {name} cannot be read: {error}; {REMEDY}") from error
        if found.state != "value":
            raise CheckpointError(f"{self.location} has no {name}: {remedy}")
        content: bytes = found.value
        return content


INCOMPLETE = "it is no checkpoint, or its conversion or saving was interrupted; do that again"


def is_checkpoint(directory: Path | epath.Path) -> bool:
    """Whether a directory, which may be in a bucket, is or was to become a checkpoint of this format."""
    return (directory / MANIFEST).is_file() or (directory / PARAMETERS).is_dir()


def _open_root(location: str, context: ts.Context) -> ts.KvStore:
    try:
        return ts.KvStore.open(kvstore(location), context=context).result()
    except FAILURES as error:
        kind = "URL" if is_url(location) else "path"
        raise CheckpointError(f"{location} is not a {kind} that can be opened: {error}") from error
