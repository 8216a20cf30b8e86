"""What is in a checkpoint directory: parameters, saves of KV, generation state. Reads none of it but what says so.

Imports no jax.
"""

from __future__ import annotations

from dataclasses import dataclass

from etils import epath

from spotjax.checkpoint.saves import FAILURES, GENERATION, SAVES, list_saves, open_save
from spotjax.errors import CheckpointError
from spotjax.models.orbax_checkpoint import OrbaxCheckpoint
from spotjax.models.orbax_manifest import MANIFEST, PARAMETERS


@dataclass(frozen=True)
class StoredParameters:
    """Parameters.

    Attributes:
      complete: there is a manifest, and its parts are there.
      dtype: that they are stored as; empty if they are not complete.
      parts: how many.
      bytes: of their arrays.
      parameters: how many numbers that is.
    """

    complete: bool
    dtype: str = ""
    parts: int = 0
    bytes: int = 0
    parameters: int = 0


@dataclass(frozen=True)
class StoredSave:
    """What was saved at one time.

    Attributes:
      service: identity of the commit log.
      number: counts saves of a service.
      kv: ``complete``, ``cut off`` or ``none``.
      epoch: of the mesh that had the KV.
      sequences: unfinished ones, whose KV that is.
      positions: of these, at most.
      generation: whether the requests' tokens were saved, too.
    """

    service: str
    number: int
    kv: str
    epoch: int
    sequences: int
    positions: int
    generation: bool


@dataclass(frozen=True)
class Contents:
    """Of one directory.

    Attributes:
      directory: of the checkpoint.
      parameters: None if there are none.
      saves: by service and number.
    """

    directory: str
    parameters: StoredParameters | None
    saves: tuple[StoredSave, ...]


def contents_of(directory: str) -> Contents:
    """What is in a directory.

    Raises:
      CheckpointError: there is no such directory, it cannot be read, or its parameters are damaged.
    """
    root = epath.Path(directory).expanduser()
    try:
        if not root.exists():
            raise CheckpointError(f"there is no directory {directory}")
        services = [path.name for path in (root / SAVES).iterdir()] if (root / SAVES).exists() else []
        saves = tuple(one for service in sorted(services) for one in _saves_of(directory, service))
        return Contents(directory, _parameters_of(root), saves)
    except FAILURES as error:
        raise CheckpointError(f"{directory} cannot be read: {error}") from error


def _parameters_of(root: epath.Path) -> StoredParameters | None:
    if not (root / MANIFEST).exists():
        return StoredParameters(complete=False) if (root / PARAMETERS).exists() else None
    checkpoint = OrbaxCheckpoint(str(root))
    manifest = checkpoint.manifest
    total = sum(part.bytes for part in manifest.parts.values())
    spec = checkpoint.spec
    count = sum(array.size for array in spec.parameters if spec.element_type(array.name) != "float32")
    stored_as = manifest.dtype if spec.quantization == "none" else f"{spec.quantization} and {manifest.dtype}"
    return StoredParameters(True, stored_as, len(manifest.parts), total, count)


def _saves_of(directory: str, service: str) -> list[StoredSave]:
    found = []
    for number, names in sorted(list_saves(directory, service).items()):
        path = epath.Path(directory).expanduser() / SAVES / service / f"{number:06d}"
        generation = path.name + GENERATION in names
        save = open_save(str(path)) if path.name in names else None
        kv = "complete" if save is not None else "cut off" if path.name in names else "none"
        epoch, sequences = (save.epoch, save.sequences) if save is not None else (0, {})
        found.append(StoredSave(service, number, kv, epoch, len(sequences), sum(sequences.values()), generation))
    return found
