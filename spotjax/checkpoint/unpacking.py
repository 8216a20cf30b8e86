"""Unpacks a bundle of ``bundle``: checks everything before anything is put into place, the commit log last."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from spotjax.checkpoint.bundle import BUNDLE, CHECKPOINT, LOG, Bundle, described_in, open_bundle
from spotjax.checkpoint.saves import SAVES, next_path
from spotjax.engine.log_directory import DATABASE, WriterLock, sync_directory
from spotjax.engine.log_inspection import inspect_log
from spotjax.errors import CheckpointError, CommitLogError
from spotjax.models.orbax_manifest import MANIFEST, PARAMETERS, TOKENIZER, is_url

COPIED = 1 << 20
"""Bytes that are copied and checked at once."""
_IMPORT = ".import-"
"""Begins the name of a directory in the checkpoint that is unpacked to."""


@dataclass(frozen=True)
class Unpacked:
    """What became of a bundle.

    Attributes:
      bundle: what it has.
      left_out: what was not unpacked and why, a line each.
    """

    bundle: Bundle
    left_out: tuple[str, ...]


def unpack(source: Path, log: Path, checkpoint: str) -> Unpacked:
    """Checks a bundle and puts its files into place, the commit log last.

    Args:
      source: the bundle.
      log: directory of the commit log. One that is there is replaced if nothing in it goes on.
      checkpoint: directory for KV and parameters, which may have others; empty: these are left out.

    Raises:
      CheckpointError: the bundle is damaged or no bundle, or the checkpoint has other parameters already.
      CommitLogError: the log there is in use, damaged, or has requests that go on.
    """
    if checkpoint and is_url(checkpoint):
        raise CheckpointError(f"{checkpoint} is in a bucket; name a directory to unpack to")
    with open_bundle(source) as tar, ExitStack() as undone:
        bundle = described_in(tar, source)
        names, left_out = _wanted(bundle, Path(checkpoint) if checkpoint else None)
        lock = WriterLock(log)
        undone.callback(lock.release)
        _require_replaceable(log)
        for left in log.glob("import-*"):  # of an import that was killed
            shutil.rmtree(left)
        roots = {LOG: Path(undone.enter_context(tempfile.TemporaryDirectory(prefix="import-", dir=log)))}
        if checkpoint:
            _remove_abandoned(Path(checkpoint))
        if any(name.startswith(f"{CHECKPOINT}/") for name in names):
            Path(checkpoint).mkdir(mode=0o700, parents=True, exist_ok=True)
            roots[CHECKPOINT] = undone.enter_context(_workplace(Path(checkpoint)))
        _extract(tar, bundle, roots, names)
        _require_told(roots[LOG] / LOG, bundle)
        if CHECKPOINT in roots:
            _install_checkpoint(roots[CHECKPOINT] / CHECKPOINT, checkpoint, bundle)
        _install_log(roots[LOG] / LOG / DATABASE, log)
        lock.mark(bundle.service)
    return Unpacked(bundle, tuple(left_out))


@contextmanager
def _workplace(checkpoint: Path) -> Iterator[Path]:
    """A directory to unpack to, removed in the end; that it is in use can be told by its lock."""
    with tempfile.TemporaryDirectory(prefix=_IMPORT, dir=checkpoint) as place, _locked(Path(place)):
        yield Path(place)


def _remove_abandoned(checkpoint: Path) -> None:
    """Removes what imports that were killed have left. Others may be unpacking to the same checkpoint."""
    for left in checkpoint.glob(f"{_IMPORT}*"):
        with _locked(left) as ours:
            if ours:
                shutil.rmtree(left)


@contextmanager
def _locked(place: Path) -> Iterator[bool]:
    """Whether nobody else has the lock of a directory; then it is ours, until the end of the block or the process."""
    with (place / "lock").open("wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # or the file system knows no locks: then nobody removes anything
            yield False
        else:
            yield True


def _wanted(bundle: Bundle, checkpoint: Path | None) -> tuple[set[str], list[str]]:
    """The members to unpack, and why others are not."""
    names, left_out = set(bundle.members), list[str]()
    kv = {name for name in names if name.startswith(f"{CHECKPOINT}/{SAVES}/")}
    parameters = {name for name in names if name.startswith(f"{CHECKPOINT}/")} - kv
    if checkpoint is None:
        if kv:
            left_out.append(
                f"KV of {bundle.sequences_with_kv} sequences: no --checkpoint is given; it is computed again"
            )
        if parameters:
            left_out.append("parameters: there is no --checkpoint to put them into")
        return names - kv - parameters, left_out
    if parameters and (checkpoint / MANIFEST).is_file():
        there = hashlib.sha256((checkpoint / MANIFEST).read_bytes()).hexdigest()
        if there != bundle.members[f"{CHECKPOINT}/{MANIFEST}"].sha256:
            raise CheckpointError(f"{checkpoint} has other parameters than the bundle; name another directory")
        left_out.append(f"parameters: {checkpoint} has the same already")
        names -= parameters
    elif parameters and any((checkpoint / part).exists() for part in (PARAMETERS, TOKENIZER)):
        raise CheckpointError(f"{checkpoint} holds an incomplete checkpoint; remove it or name another directory")
    return names, left_out


def _require_replaceable(log: Path) -> None:
    """Raises CommitLogError if a log is there that somebody may still need."""
    if not (log / DATABASE).exists():
        return
    summary = inspect_log(log)
    if summary.damage or summary.going_on:
        what = "is damaged" if summary.damage else f"has {len(summary.going_on)} unfinished requests"
        raise CommitLogError(
            f"the commit log {log} {what} and is not replaced by the bundle's; let it finish, name another directory "
            "(--commit-log), or move it away"
        )


def _extract(tar: tarfile.TarFile, bundle: Bundle, roots: Mapping[str, Path], names: set[str]) -> None:
    """Unpacks members, each with the checksum that it should have."""
    for entry in tar:
        if entry.name not in names:
            continue
        root, member = roots[PurePosixPath(entry.name).parts[0]], bundle.members[entry.name]
        tarfile.data_filter(entry, str(root))
        target = root / entry.name
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        content, digest = tar.extractfile(entry), hashlib.sha256()
        assert content is not None, "it is a file"
        with os.fdopen(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as out:
            while piece := content.read(COPIED):
                digest.update(piece)
                out.write(piece)
            out.flush()
            os.fsync(out.fileno())
        if digest.hexdigest() != member.sha256:
            raise CheckpointError(f"the bundle is damaged: {entry.name} has another checksum; copy it again")


def _require_told(log: Path, bundle: Bundle) -> None:
    """Raises CheckpointError unless the unpacked log is the one that the bundle speaks of."""
    summary = inspect_log(log)
    told = summary.identity, summary.model, len(summary.requests), len(summary.going_on)
    if summary.damage or told != (bundle.service, bundle.model, bundle.requests, bundle.unfinished):
        raise CheckpointError(f"the bundle's commit log is not what its {BUNDLE} says; export it again")


def _install_checkpoint(unpacked: Path, checkpoint: str, bundle: Bundle) -> None:
    """Puts the newest save after all that are there, then parameters, their manifest last."""
    for save in (unpacked / SAVES / bundle.service).glob("*"):
        number = max(int(save.name), int(Path(next_path(checkpoint, bundle.service)).name))
        target = Path(checkpoint, SAVES, bundle.service, f"{number:06d}")
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        save.rename(target)
        sync_directory(target.parent)
    for part in (PARAMETERS, TOKENIZER, MANIFEST):
        with suppress(FileNotFoundError):  # of a bundle without parameters
            (unpacked / part).rename(Path(checkpoint, part))
    sync_directory(Path(checkpoint))


def _install_log(database: Path, log: Path) -> None:
    """Replaces the log in a directory whose lock is held."""
    for suffix in ("-wal", "-shm"):  # of another database, on which they must not be applied
        (log / f"{DATABASE}{suffix}").unlink(missing_ok=True)
    database.replace(log / DATABASE)
    sync_directory(log)
