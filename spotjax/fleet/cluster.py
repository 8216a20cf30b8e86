"""What the controller needs of whoever holds the devices. Embedded mode has ``reshard.local.LocalCluster``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from spotjax.engine.batch import Pipeline
from spotjax.reshard.transfer import PageTransfer, Preparation, Traffic


class Cluster(Protocol):
    """The devices of all instances and what is on them."""

    async def prepare(self, preparation: Preparation) -> Traffic:
        """Brings parameters into place and makes room for KV, while decoding goes on. Replaces an earlier preparation.

        Raises:
          InstanceLost: a source or target instance was lost meanwhile; plan again.
        """
        ...

    async def switch(self, transfers: Sequence[PageTransfer]) -> tuple[Sequence[Pipeline], Traffic]:
        """Moves KV and makes the prepared placement the current one. No step may be in flight.

        Returns: the pipeline of every replica.

        Raises:
          InstanceLost: as above; the old placement is still the current one.
        """
        ...

    async def clear(self) -> None:
        """Gives up the current placement without a new one; what is left of parameters stays as a source."""
        ...

    def join(self, instance: str) -> None:
        """An instance of that name is there, for the first time or again, with nothing on its devices."""
        ...

    def lose(self, instance: str) -> None:
        """An instance is gone: steps that run on it fail, and nothing can be read from its devices any more."""
        ...

    async def close(self) -> None:
        """Frees everything."""
        ...
