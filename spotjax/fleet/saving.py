"""Saves the service's KV into a checkpoint: on request, and when the whole fleet is about to be taken.

What is saved counts once the save is complete, for the tokens that the commit log had by then.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from spotjax.checkpoint import saves
from spotjax.checkpoint.saves import Save
from spotjax.errors import CheckpointError
from spotjax.fleet.cluster import Cluster
from spotjax.fleet.events import EventLog
from spotjax.meshes.placement import Placement

RESERVE_SECONDS = 2.0
"""At the end of a grace period, for what was written since the last round of saving; at most half of what is left."""
MARGIN_SECONDS = 0.2
"""Of these, to be left when all is saved."""


class Saves:
    """Where one service's saves go, and the last of them.

    Args:
      checkpoint: where the fleet's last KV goes; empty if nowhere.
      service: identity of the commit log.
      model: fingerprint of the weights.
      newest: the last save from before.

    Attributes:
      newest: the last complete one.
    """

    def __init__(self, checkpoint: str = "", service: str = "", model: str = "", newest: Save | None = None) -> None:
        self.checkpoint, self.service, self.model, self.newest = checkpoint, service, model, newest

    async def next_path(self, checkpoint: str) -> str:
        """Directory of the next one."""
        return await asyncio.to_thread(saves.next_path, checkpoint, self.service)

    async def complete(self, path: str, placement: Placement, sequences: Mapping[int, int]) -> Save:
        """Makes what workers have written a save.

        Raises:
          CheckpointError: that cannot be written.
        """
        work = (path, self.service, self.model, placement.epoch, placement.shape.data, sequences)
        self.newest = await asyncio.to_thread(saves.complete, *work)
        return self.newest


class Saving:
    """Makes saves.

    Args:
      cluster: has the KV.
      events: told about saves.
      saves: where they go.
      recorded: key of every unfinished sequence to the positions whose tokens are recorded.
    """

    def __init__(
        self, cluster: Cluster, events: EventLog, saves: Saves, recorded: Callable[[], Mapping[int, int]]
    ) -> None:
        self._cluster, self._events, self._saves, self._recorded = cluster, events, saves, recorded
        self._path = ""

    @property
    def wanted(self) -> bool:
        """Whether there is a place for the fleet's last KV."""
        return bool(self._saves.checkpoint)

    async def begin(self, epoch: int) -> None:
        """The fleet is about to be taken: saves KV in the background from now on, unless that has begun."""
        if self.wanted and not self._path:
            self._path = await self._saves.next_path(self._saves.checkpoint)
            self._events.record("saving", epoch, f"KV is saved to {self._path}", path=self._path)
            await self._cluster.save_kv(self._path, 0.0, last=False)

    async def end(self, placement: Placement, seconds: float) -> None:
        """Decoding has stopped: saves what there is, as far as the time allows. Nothing if it has not begun."""
        path, self._path = self._path, ""
        if not path:
            return
        try:
            await self._finish(path, placement, max(0.0, seconds - MARGIN_SECONDS))
        except CheckpointError as problem:
            self._events.record("saved", placement.epoch, f"nothing was saved: {problem}")

    async def save(self, checkpoint: str, placement: Placement, seconds: float) -> Save:
        """A save on request, while decoding goes on.

        Raises:
          CheckpointError: it cannot be written.
        """
        return await self._finish(await self._saves.next_path(checkpoint), placement, seconds)

    async def _finish(self, path: str, placement: Placement, seconds: float) -> Save:
        sequences = dict(self._recorded())  # before: what is written from now on may be of tokens that are not recorded
        await self._cluster.save_kv(path, seconds, last=True)
        save = await self._saves.complete(path, placement, sequences)
        message = f"KV of {len(sequences)} sequences was saved to {path}"
        self._events.record("saved", placement.epoch, message, path=path, sequences=len(sequences))
        return save
