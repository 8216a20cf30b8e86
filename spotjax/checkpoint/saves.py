"""Saves of KV in a checkpoint: where they are and which of them counts. Imports no jax, so that a controller can.

    <checkpoint>/saves/<service>/<number>/             what every worker has saved, and ``saved.json`` when all have
    <checkpoint>/saves/<service>/<number>.generation   the requests with their tokens, where they were asked for

A save without ``saved.json`` was cut off and is not used: what is in it may be of tokens that were never told. KV is
private, as prompts and outputs can be made out from it: no other user can reach into the directories.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Mapping
from types import MappingProxyType

import msgspec
from etils import epath

from spotjax.checkpoint.completion import write_files
from spotjax.errors import CheckpointError
from spotjax.models.orbax_manifest import is_url

log = logging.getLogger(__name__)

SAVES = "saves"
SAVED = "saved.json"
FAILURES = (OSError, ImportError)
"""Of etils: there may be no library for a bucket."""
GENERATION = ".generation"
KEPT = 2
"""Complete saves of a service that stay: the one before the last in case that the last is damaged."""


class Save(msgspec.Struct, frozen=True):
    """A complete save.

    Attributes:
      path: its directory.
      service: identity of the commit log whose sequences these are.
      epoch: of the mesh that had the KV.
      replicas: of that mesh.
      sequences: key to the positions whose tokens were recorded when it was saved. What is there of later positions is
        not to be used; what is there of these may be less.
      digests: key to a hash of these tokens: a log that has lost its end may have others there, or another request.
    """

    path: str
    service: str
    epoch: int
    replicas: int
    sequences: dict[int, int]
    digests: dict[int, str] = {}


def next_path(checkpoint: str, service: str, given: int = 0) -> str:
    """Directory of another save, which does not exist yet.

    Args:
      checkpoint: where saves are.
      service: whose it will be.
      given: last number that was given; a save begins to exist with its first unit.

    Raises:
      CheckpointError: the checkpoint cannot be read.
    """
    number = max([given, *list_saves(checkpoint, service)]) + 1
    return str(_directory(checkpoint, service) / f"{number:06d}")


def number_of(path: str) -> int:
    """Number of a save, by its directory."""
    return int(path.rpartition("/")[2])


def with_number(path: str, number: int) -> str:
    """The directory beside it that has another number."""
    return f"{path.rpartition('/')[0]}/{number:06d}"


def complete(
    path: str,
    service: str,
    epoch: int,
    replicas: int,
    sequences: Mapping[int, int],
    digests: Mapping[int, str] = MappingProxyType({}),
) -> Save:
    """Makes what workers have put into a directory a save.

    Raises:
      CheckpointError: that cannot be written.
    """
    save = Save(path, service, epoch, replicas, dict(sequences), dict(digests))
    try:
        make_private(epath.Path(path))  # there is none if no worker had anything
    except FAILURES as error:
        raise CheckpointError(f"{path}: {SAVED} cannot be written: {error}") from error
    write_files(path, {SAVED: msgspec.json.encode(save)})
    return save


def newest(checkpoint: str, service: str) -> Save | None:
    """The last complete save of a service, None if there is none.

    Raises:
      CheckpointError: the checkpoint cannot be read.
    """
    for _, names in sorted(list_saves(checkpoint, service).items(), reverse=True):
        for name in filter(str.isdigit, names):
            if (save := open_save(str(_directory(checkpoint, service) / name))) is not None:
                return save
    return None


def list_saves(checkpoint: str, service: str) -> dict[int, set[str]]:
    """Numbers of a service's saves, complete or not, to the names of what is there of each.

    Raises:
      CheckpointError: the checkpoint cannot be read.
    """
    try:
        return _saves_in(_directory(checkpoint, service))
    except FAILURES as error:
        raise CheckpointError(f"the checkpoint {checkpoint} cannot be read: {error}") from error


def open_save(path: str) -> Save | None:
    """The save in a directory, wherever it was when it was made; None if it was cut off or is damaged."""
    try:
        save = msgspec.json.decode((epath.Path(path) / SAVED).read_bytes(), type=Save)
    except FileNotFoundError:
        log.warning("a save was cut off and is not used", extra={"path": path})
    except (*FAILURES, msgspec.MsgspecError) as error:
        log.warning("a save cannot be read and is not used: %s", error, extra={"path": path})
    else:
        return msgspec.structs.replace(save, path=path)
    return None


def make_private(directory: epath.Path) -> None:
    """Makes a directory, and those above it that are missing, for their user alone; a bucket has rules of its own.

    Raises OSError if that cannot be done.
    """
    if is_url(os.fspath(directory)):
        directory.mkdir(parents=True, exist_ok=True)
        return
    for path in (*reversed(directory.parents), directory):  # a mode would only be that of the last
        if not path.exists():
            path.mkdir(mode=0o700, exist_ok=True)


def remove_older(path: str, but: Collection[str] = ()) -> None:
    """Removes what is older than the newest complete saves beside one, complete or not, as far as that is possible.

    Args:
      path: of the save.
      but: paths of those that stay all the same.
    """
    directory = epath.Path(path).parent
    try:
        found = _saves_in(directory)
        complete = sorted(number for number in found if (directory / f"{number:06d}" / SAVED).exists())
    except FAILURES as error:
        log.warning("older saves cannot be removed: %s", error, extra={"path": path})
        return
    for number in sorted(found):
        if number < min(complete[-KEPT:], default=0) and with_number(path, number) not in but:
            for name in found[number]:
                discard(str(directory / name))


def discard(path: str) -> None:
    """Removes a save, or what workers have put into a directory that will not be one, as far as that is possible."""
    try:
        epath.Path(path).rmtree(missing_ok=True)
    except FAILURES as error:
        log.warning("a save that is not needed cannot be removed: %s", error, extra={"path": path})


def _saves_in(directory: epath.Path) -> dict[int, set[str]]:
    """See ``list_saves``. Raises ``FAILURES``."""
    found: dict[int, set[str]] = {}
    for path in directory.iterdir() if directory.exists() else ():
        if (number := path.name.partition(".")[0]).isdigit():
            found.setdefault(int(number), set()).add(path.name)
    return found


def _directory(checkpoint: str, service: str) -> epath.Path:
    root = checkpoint if is_url(checkpoint) else os.path.abspath(os.path.expanduser(checkpoint))  # others run elsewhere
    return epath.Path(root) / SAVES / service
