"""A whole service in one file, to move it to other machines: its commit log, its newest KV, parameters if wanted.

A tar file, not compressed, private to its user:

    commit_log/commits.sqlite                 a copy of one moment
    checkpoint/saves/<service>/<number>/...   the newest complete save of KV, if there is one
    checkpoint/manifest.json, parameters/..., tokenizer/...
    bundle.json                               last: what is in it, with the SHA-256 of every file

A file without the last one was cut off and is refused. Checksums tell damage, not who made the bundle; nothing in it is
executed. Imports no jax. Unpacking is in ``unpacking``.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

import msgspec
import numpy as np

from spotjax.checkpoint.saves import SAVES, Save, newest
from spotjax.engine.log_directory import DATABASE, sync_directory
from spotjax.engine.log_inspection import LogSummary, copy_log, inspect_log
from spotjax.errors import CheckpointError, CommitLogError
from spotjax.models.fingerprint import Sampled, fingerprint
from spotjax.models.orbax_checkpoint import OrbaxCheckpoint
from spotjax.models.orbax_manifest import MANIFEST, PARAMETERS, TOKENIZER, is_url
from spotjax.models.quantized_checkpoint import QuantizedCheckpoint

FORMAT = 1
BUNDLE = "bundle.json"
_UNDONE = ".orbax-checkpoint-tmp"
"""In the name of a checkpoint that was not finished."""
LOG, CHECKPOINT = "commit_log", "checkpoint"


class Member(msgspec.Struct, frozen=True):
    """A file in a bundle.

    Attributes:
      bytes: its size.
      sha256: of its contents, hexadecimal.
    """

    bytes: int
    sha256: str


class Bundle(msgspec.Struct, frozen=True):
    """What ``bundle.json`` says.

    Attributes:
      format: version of this layout.
      service: identity of the commit log.
      model: fingerprint of the weights.
      model_name: what they can be opened by, empty if whoever made the bundle had them under no name.
      epoch: last one in the log.
      requests: in the log, finished ones that are retained included.
      unfinished: those of them that go on.
      sequences_with_kv: sequences that the save has something of.
      parameters: whether the weights are in the bundle.
      members: every other file, by name.
    """

    format: int
    service: str
    model: str
    model_name: str
    epoch: int
    requests: int
    unfinished: int
    sequences_with_kv: int
    parameters: bool
    members: dict[str, Member]

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(member.bytes for member in self.members.values())


def pack(target: Path, log: Path, checkpoint: str, model_name: str, *, parameters: bool) -> Bundle:
    """Writes a bundle. The log may be in use; what is recorded later is not in it.

    Args:
      target: file to write; it is there as a whole or not at all.
      log: directory of the commit log.
      checkpoint: directory that saves are sought in, and the parameters; empty: none.
      model_name: for ``Bundle.model_name``.
      parameters: whether the bundle gets them.

    Raises:
      CheckpointError: the file is there already, or something cannot be read or written.
      CommitLogError: there is no log, or it is damaged.
    """
    if target.exists():
        raise CheckpointError(f"{target} exists already; remove it or name another file")
    if checkpoint and is_url(checkpoint):
        raise CheckpointError(
            f"{checkpoint} is in a bucket, where other machines find it too: export without --checkpoint, give it there"
        )
    before = inspect_log(log)
    if not before.identity:
        raise CommitLogError(f"the commit log {log} is empty; there is nothing to export")
    if parameters:
        _require_parameters_of(checkpoint, before.model)
    save = newest(checkpoint, before.identity) if checkpoint else None  # older than the copy of the log, never newer
    try:
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.absolute().parent) as work:
            copy = Path(work, LOG)
            copy_log(log, copy)
            summary = inspect_log(copy)
            if summary.damage:
                raise CommitLogError(f"the commit log {log} is damaged: {summary.damage[0]}; salvage it first")
            files = {f"{LOG}/{DATABASE}": copy / DATABASE}
            if save is not None:
                files |= _below(Path(save.path), f"{CHECKPOINT}/{SAVES}/{save.service}/{Path(save.path).name}")
            if parameters:
                files |= _parameter_files(Path(checkpoint))
            return _write(target, files, _described(summary, save, model_name, parameters))
    except OSError as error:
        raise CheckpointError(f"the bundle {target} cannot be written: {error}") from error


@contextmanager
def open_bundle(source: Path) -> Iterator[tarfile.TarFile]:
    """An open tar file; what goes wrong with it, or with unpacking it, is a CheckpointError."""
    try:
        with tarfile.open(source, "r:") as tar:
            yield tar
    except (tarfile.TarError, EOFError) as error:
        raise CheckpointError(f"{source} is no bundle, or a damaged one: {error}") from error
    except OSError as error:
        raise CheckpointError(f"the bundle {source} cannot be read or unpacked: {error}") from error


def described_in(tar: tarfile.TarFile, source: Path) -> Bundle:
    """What is in an open bundle, as far as it says so itself. Its files are those that it names, and harmless.

    Raises:
      CheckpointError: it is no bundle, was cut off, has another format or something that is not of a bundle.
    """
    try:
        content = tar.extractfile(BUNDLE)
        if content is None:
            raise KeyError
        bundle = msgspec.json.decode(content.read(), type=Bundle)
    except KeyError:
        raise CheckpointError(f"{source} is no bundle, or was cut off: it has no {BUNDLE}") from None
    except msgspec.MsgspecError as error:
        raise CheckpointError(f"{source}: {BUNDLE} cannot be read: {error}") from error
    if bundle.format != FORMAT:
        raise CheckpointError(f"{source} has format {bundle.format}, this version of Spotjax reads {FORMAT}")
    names = [entry.name for entry in tar if entry.name != BUNDLE]
    if sorted(names) != sorted(bundle.members):
        raise CheckpointError(f"{source} does not have the files that its {BUNDLE} names")
    for entry in tar:
        _require_harmless(entry, bundle, source)
    if f"{LOG}/{DATABASE}" not in names or bundle.parameters != (f"{CHECKPOINT}/{MANIFEST}" in names):
        raise CheckpointError(f"{source} is incomplete: it lacks the commit log or the parameters' {MANIFEST}")
    return bundle


def _require_harmless(entry: tarfile.TarInfo, bundle: Bundle, source: Path) -> None:
    """Raises CheckpointError for whatever ``pack`` would not write: links, devices, paths to elsewhere."""
    parts = rf"{MANIFEST}|({PARAMETERS}|{TOKENIZER}|{SAVES}/{re.escape(bundle.service)}/[0-9]+)/.+"
    known = re.fullmatch(rf"{BUNDLE}|{LOG}/{DATABASE}|{CHECKPOINT}/({parts})", entry.name)
    path = PurePosixPath(entry.name)
    plain = entry.isreg() and ".." not in path.parts and str(path) == entry.name
    if not (known and plain and re.fullmatch(r"[\w-]+", bundle.service)):
        raise CheckpointError(f"{source} has something that is not of a bundle: {entry.name!r}; it is not unpacked")


class _Hashing(io.RawIOBase):
    """Passes on what is read, and takes its checksum."""

    def __init__(self, source: IO[bytes]) -> None:
        self._source, self.digest = source, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        """See ``io.RawIOBase``."""
        content = self._source.read(size)
        self.digest.update(content)
        return content


def _require_parameters_of(checkpoint: str, model: str) -> None:
    """Raises CheckpointError unless the checkpoint has, in full, the parameters that the log is of."""
    if not (checkpoint and Path(checkpoint, MANIFEST).is_file()):
        raise CheckpointError(f"the checkpoint {checkpoint or '(none given)'} has no parameters to put into a bundle")
    stored = OrbaxCheckpoint(checkpoint)
    served: list[Sampled] = [stored] if stored.spec.quantization != "none" else [stored, QuantizedCheckpoint(stored)]
    if model not in {fingerprint(one, np.dtype(np.float32)) for one in served}:
        raise CheckpointError(f"the parameters of {checkpoint} are those of another model than the commit log's")


def _write(target: Path, files: Mapping[str, Path], bundle: Bundle) -> Bundle:
    """Writes the file under a temporary name and renames it. Returns ``bundle`` with its members."""
    part = target.with_name(f".{target.name}.part")
    part.unlink(missing_ok=True)
    try:
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as out:
            with tarfile.open(fileobj=out, mode="w") as tar:
                members = {name: _add(tar, name, path) for name, path in files.items()}
                bundle = msgspec.structs.replace(bundle, members=members)
                content = msgspec.json.encode(bundle)
                tar.addfile(_entry(BUNDLE, len(content)), io.BytesIO(content))
            out.flush()
            os.fsync(out.fileno())
        part.rename(target)
        sync_directory(target.absolute().parent)
    finally:
        part.unlink(missing_ok=True)
    return bundle


def _add(tar: tarfile.TarFile, name: str, path: Path) -> Member:
    with path.open("rb") as file:
        entry, hashing = _entry(name, os.fstat(file.fileno()).st_size), _Hashing(file)
        tar.addfile(entry, hashing)
    return Member(entry.size, hashing.digest.hexdigest())


def _entry(name: str, size: int) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = size, 0o600
    return entry


def _described(summary: LogSummary, save: Save | None, model_name: str, parameters: bool) -> Bundle:
    kv = len(save.sequences) if save is not None else 0
    counts = len(summary.requests), len(summary.going_on), kv
    return Bundle(FORMAT, summary.identity, summary.model, model_name, summary.epoch, *counts, parameters, {})


def _below(directory: Path, name: str) -> dict[str, Path]:
    """All files below a directory, by their names in the bundle; links are followed, what Orbax left undone is not."""
    files = (Path(parent, file) for parent, _, names in os.walk(directory, followlinks=True) for file in names)
    done = (path for path in sorted(files) if _UNDONE not in path.relative_to(directory).as_posix())
    return {f"{name}/{path.relative_to(directory).as_posix()}": path for path in done}


def _parameter_files(checkpoint: Path) -> dict[str, Path]:
    files = {f"{CHECKPOINT}/{MANIFEST}": checkpoint / MANIFEST}
    for part in (PARAMETERS, TOKENIZER):
        files |= _below(checkpoint / part, f"{CHECKPOINT}/{part}")
    return files
