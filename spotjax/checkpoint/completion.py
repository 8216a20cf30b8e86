"""Makes one checkpoint of parts that several processes wrote. Imports no jax, so that a controller can do it.

Whoever has written a part leaves a record of it beside it; once all are there, they become the manifest.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

import msgspec
import numpy as np
import tensorstore as ts

from spotjax.errors import CheckpointError
from spotjax.models.config import DecoderConfig
from spotjax.models.fingerprint import fingerprint
from spotjax.models.orbax_manifest import (
    MANIFEST,
    PARAMETERS,
    TOKENIZER,
    Manifest,
    Part,
    check_parts,
    checksum,
    encode,
    kvstore,
    parts_of,
    place_of,
)
from spotjax.models.orbax_part import FAILURES, StoredPart, make_context
from spotjax.models.quantization import Quantization
from spotjax.models.spec import ModelSpec


def check_incomplete(location: str) -> None:
    """Raises CheckpointError if there is a whole checkpoint at ``location`` already, which nobody should write into."""
    try:
        found = ts.KvStore.open(kvstore(location)).result().read(MANIFEST).result()
    except FAILURES as error:
        raise CheckpointError(f"{location} cannot be read: {error}") from error
    if found.state == "value":
        raise CheckpointError(f"{location} is a complete checkpoint already; name another directory or remove it")


def leave_record(location: str, part: str, record: Part) -> None:
    """Says that a part is written, and what it consists of.

    Raises:
      CheckpointError: that cannot be written.
    """
    write_files(location, {_record_name(part): msgspec.json.encode(record)})


def find_record(location: str, part: str) -> Part | None:
    """What ``leave_record`` left, if the part that it speaks of is still there."""
    context = make_context()
    try:
        found = ts.KvStore.open(kvstore(location), context=context).result().read(_record_name(part)).result()
        if found.state != "value":
            return None
        record = msgspec.json.decode(found.value, type=Part)
        StoredPart(location, part, record, context).identify().finish()
    except (*FAILURES, msgspec.MsgspecError, CheckpointError):
        return None  # of no use: the part will be written again
    return record


def drop_record(location: str, part: str) -> None:
    """Forgets what was left, because the part is written anew."""
    ts.KvStore.open(kvstore(location)).result().write(_record_name(part), None).result()


def complete(
    location: str,
    config: DecoderConfig,
    dtype: str,
    tokenizer: Mapping[str, bytes],
    expected: str = "",
    quantization: Quantization = "none",
) -> Manifest:
    """Writes tokenizer and manifest: from then on the directory is a checkpoint.

    Args:
      location: of the checkpoint.
      config: of the model.
      dtype: that its parts are stored as.
      tokenizer: ``Tokenizer.files``.
      expected: fingerprint of the weights at that dtype; empty if whoever wrote the parts answers for them.
      quantization: of the parts.

    Raises:
      CheckpointError: parts are missing or not those of such a model, or the files cannot be written.
    """
    spec = ModelSpec(config, quantization=quantization)
    names = list(parts_of(spec))
    records = {name: record for name in names if (record := find_record(location, name)) is not None}
    check_parts(spec, dtype, records, location)
    if expected and fingerprint(_Recorded(records, spec), np.dtype(dtype)) != expected:
        raise CheckpointError(f"{location} has parts of another model, from a save that was given up; remove it")
    sums = {name: checksum(content) for name, content in tokenizer.items()}
    manifest = Manifest(config, dtype, records, sums, quantization)
    write_files(location, {f"{TOKENIZER}/{name}": content for name, content in tokenizer.items()})
    write_files(location, {MANIFEST: encode(manifest)})
    with suppress(*FAILURES):  # they do no harm where they are
        for name in names:
            drop_record(location, name)
    return manifest


class _Recorded:
    """As much of a checkpoint, by the records of its parts, as a fingerprint needs."""

    def __init__(self, records: Mapping[str, Part], spec: ModelSpec) -> None:
        self._spec, self._records = spec, records
        self._places = {array.name: place_of(array) for array in spec.parameters}

    @property
    def spec(self) -> ModelSpec:
        """See ``fingerprint.Sampled``."""
        return self._spec

    def sample_digest(self, name: str, dtype: np.dtype) -> str:
        """See ``fingerprint.Sampled``."""
        part, place = self._places[name]
        return self._records[part].arrays[place].samples[dtype.name]


def _record_name(part: str) -> str:
    return f"{PARAMETERS}/{part}.json"


def write_files(location: str, files: Mapping[str, bytes]) -> None:
    """Writes files; each is there as a whole, synced, or not at all."""
    try:
        root = ts.KvStore.open(kvstore(location)).result()
        for write in [root.write(name, content) for name, content in files.items()]:
            write.result()
    except FAILURES as error:
        raise CheckpointError(f"{location}: {', '.join(files)} cannot be written: {error}") from error
