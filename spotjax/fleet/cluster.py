"""What the controller needs of whoever holds the devices.

Embedded mode has ``reshard.local.LocalCluster``, fleet mode ``fleet.remote.RemoteCluster``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from spotjax.checkpoint.saves import Save
from spotjax.engine.batch import Pipeline
from spotjax.meshes.instance import DeviceRef
from spotjax.planner.needs import Needs
from spotjax.reshard.transfer import PageTransfer, Preparation, Remains, Survivors, Traffic


@dataclass(frozen=True)
class SavedKv:
    """What has come of saving KV.

    Attributes:
      bytes: that were saved.
      left_out: instances that did not save all they had, and why.
    """

    bytes: int = 0
    left_out: Mapping[str, str] = field(default_factory=dict)


class Cluster(Protocol):
    """The devices of all instances and what is on them."""

    async def prepare(self, preparation: Preparation) -> Traffic:
        """Brings parameters into place and makes room for KV, while decoding goes on. Replaces an earlier preparation.

        Raises:
          InstanceLost: a source or target instance was lost meanwhile; plan again.
        """
        ...

    async def copy_pages(self, transfers: Sequence[PageTransfer]) -> Traffic:
        """Copies KV pages of the current placement into the prepared one, while decoding goes on.

        Raises:
          InstanceLost: as above.
        """
        ...

    async def switch(self, transfers: Sequence[PageTransfer]) -> tuple[Sequence[Pipeline], Traffic]:
        """Moves KV and makes the prepared placement the current one, which it stays until the next switch.

        No step may be in flight but on replicas that are carried over.

        Returns: the pipeline of every replica; those carried over keep theirs.

        Raises:
          InstanceLost: as above; the old placement is still the current one, the preparation is void.
        """
        ...

    async def reunite(self, sequences: Mapping[int, int]) -> Remains | None:
        """Asks whoever worked for the controller before this one what is left of its mesh; None if nothing is.

        Args:
          sequences: all that are to be gone on with: key to the positions, from the first on, whose tokens are certain.
            KV of others, and of later positions, is of no use to anybody any more.
        """
        ...

    async def save_kv(self, path: str, seconds: float, *, last: bool) -> SavedKv | None:
        """Has the KV of the current placement saved into a directory, while steps go on or after they have stopped.

        Whoever cannot save leaves its KV out; it will be computed again. Who has begun to save into another directory
        gives that up.

        Args:
          path: of the directory.
          seconds: for all of it, when ``last``; 0 to give up what was begun.
          last: save what there is now and end. Else begin, and go on in the background.

        Returns: what has come of it; None if nobody here keeps account of whose pages are whose.
        """
        ...

    def use_save(self, save: Save) -> None:
        """What was saved there is a copy of KV like any other from now on."""
        ...

    async def save_parameters(self, path: str) -> int:
        """Has the parameters of the current placement saved as parts of a checkpoint. Returns: bytes of them.

        Raises:
          CheckpointError: they cannot be written, or an instance was lost or the mesh changed meanwhile.
        """
        ...

    def held(self) -> Mapping[DeviceRef, Needs]:
        """Which parts of parameters each device of an alive instance has, in a placement or not."""
        ...

    async def survivors(self, hurt: Mapping[int, Mapping[int, int]]) -> Survivors:
        """What is left of the KV of replicas that lost an instance.

        Args:
          hurt: by replica of the current placement: key of a sequence to the positions that were computed.
        """
        ...

    def forget(self, sequences: Sequence[int]) -> None:
        """Sequences with these keys have ended."""
        ...

    def joinable(self, instance: str) -> bool:
        """Whether a joining instance can be given work: it has loaded and compiled what it needs."""
        ...

    def join(self, instance: str) -> None:
        """An instance of that name is there, for the first time or again, with nothing on its devices."""
        ...

    def lose(self, instance: str) -> None:
        """An instance is gone: steps that run on it fail, and nothing can be read from its devices any more."""
        ...

    def evict(self, instance: str, *, at_once: bool) -> None:
        """Makes an instance go, in order or ``at_once`` as if its machine were taken; ``lose`` is called next."""
        ...

    async def close(self) -> None:
        """Frees everything."""
        ...
