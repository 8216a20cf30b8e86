"""Saves of KV in a checkpoint: where they are and which of them counts. Imports no jax, so that a controller can.

    <checkpoint>/saves/<service>/<number>/    what every worker has saved, and ``saved.json`` when all have

A save without ``saved.json`` was cut off and is not used: what is in it may be of tokens that were never told.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import msgspec
from etils import epath

from spotjax.errors import CheckpointError

log = logging.getLogger(__name__)

SAVES = "saves"
SAVED = "saved.json"


class Save(msgspec.Struct, frozen=True):
    """A complete save.

    Attributes:
      path: its directory.
      service: identity of the commit log whose sequences these are.
      model: fingerprint of the weights.
      epoch: of the mesh that had the KV.
      replicas: of that mesh.
      sequences: key to the positions whose tokens were recorded when it was saved. What is there of later positions is
        not to be used; what is there of these may be less.
    """

    path: str
    service: str
    model: str
    epoch: int
    replicas: int
    sequences: dict[int, int]


def next_path(checkpoint: str, service: str) -> str:
    """Directory of another save, which does not exist yet."""
    numbers = [int(path.name) for path in _numbered(checkpoint, service)]
    return str(epath.Path(checkpoint) / SAVES / service / f"{max(numbers, default=0) + 1:06d}")


def complete(path: str, service: str, model: str, epoch: int, replicas: int, sequences: Mapping[int, int]) -> Save:
    """Makes what workers have put into a directory a save.

    Raises:
      CheckpointError: that cannot be written.
    """
    save = Save(path, service, model, epoch, replicas, dict(sequences))
    try:
        directory = epath.Path(path)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f".{SAVED}").write_bytes(msgspec.json.encode(save))
        (directory / f".{SAVED}").rename(directory / SAVED)
    except OSError as error:
        raise CheckpointError(f"the save {path} cannot be completed: {error}") from error
    return save


def newest(checkpoint: str, service: str) -> Save | None:
    """The last complete save of a service, None if there is none."""
    for path in sorted(_numbered(checkpoint, service), key=lambda path: int(path.name), reverse=True):
        try:
            save = msgspec.json.decode((path / SAVED).read_bytes(), type=Save)
        except FileNotFoundError:
            log.warning("a save was cut off and is not used", extra={"path": str(path)})
        except (OSError, msgspec.MsgspecError) as error:
            log.warning("a save cannot be read and is not used: %s", error, extra={"path": str(path)})
        else:
            return msgspec.structs.replace(save, path=str(path))  # it may have been moved
    return None


def _numbered(checkpoint: str, service: str) -> list[epath.Path]:
    directory = epath.Path(checkpoint) / SAVES / service
    return [path for path in directory.iterdir() if path.name.isdigit()] if directory.exists() else []
