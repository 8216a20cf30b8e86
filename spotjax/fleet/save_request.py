"""Saves what operators ask for: parameters, then the requests with their KV, one save at a time."""

from __future__ import annotations

import asyncio

from spotjax.errors import CheckpointError
from spotjax.fleet.checkpoint_files import CheckpointFiles
from spotjax.fleet.cluster import Cluster
from spotjax.fleet.events import EventLog
from spotjax.fleet.reconfigure import Clock, Reconfigurer
from spotjax.fleet.saving import Saving
from spotjax.fleet.status import Saved


class SaveRequests:
    """Carries them out, even if who asked goes away.

    Args:
      cluster: has parameters and KV.
      reconfigurer: knows the mesh.
      saving: saves KV.
      files: writes the rest.
      events: told about saves.
      clock: monotonic seconds.
    """

    def __init__(
        self,
        cluster: Cluster,
        reconfigurer: Reconfigurer,
        saving: Saving,
        files: CheckpointFiles,
        events: EventLog,
        clock: Clock,
    ) -> None:
        self._cluster, self._reconfigurer, self._saving, self._files = cluster, reconfigurer, saving, files
        self._events, self._clock = events, clock
        self._under_way: asyncio.Task[Saved] | None = None
        self._where = ""

    async def save(self, directory: str, *, parameters: bool, state: bool, seconds: float) -> Saved:
        """See ``FleetService.save``."""
        if self._under_way is not None:
            raise CheckpointError(f"a save to {self._where} is under way; try again when it is done")
        self._under_way = task = asyncio.create_task(self._save(directory, parameters, state, seconds))
        self._where = directory
        task.add_done_callback(self._done)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():
                raise CheckpointError("the service ended before all was saved") from None
            raise

    async def close(self) -> None:
        """Gives up what is under way."""
        if (task := self._under_way) is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def _done(self, task: asyncio.Task[Saved]) -> None:
        self._under_way = None
        if not task.cancelled() and (problem := task.exception()) is not None:
            self._events.record("saved", self._reconfigurer.epoch, f"not all was saved to {self._where}: {problem}")

    async def _save(self, directory: str, parameters: bool, state: bool, seconds: float) -> Saved:
        started, parameter_bytes = self._clock(), 0
        if state:
            self._files.require_log()
        if parameters:
            await self._files.require_free(directory)
            parameter_bytes = await self._save_parameters(directory)
        try:
            found = await self._save_state(directory, seconds) if state else (0, 0, 0, 0, ())
        except CheckpointError as problem:
            if not parameters:
                raise
            raise CheckpointError(f"{problem}; the parameters are saved, ask for the state alone") from problem
        return Saved(directory, parameter_bytes, *found, self._clock() - started)

    async def _save_parameters(self, directory: str) -> int:
        epoch = self._reconfigurer.epoch
        if self._reconfigurer.placement is None:
            raise CheckpointError("there is no mesh whose parameters could be saved; try again when there is one")
        count = await self._cluster.save_parameters(directory)
        await self._files.complete(directory)
        self._events.record("saved", epoch, f"parameters were saved to {directory}", path=directory, bytes=count)
        return count

    async def _save_state(self, directory: str, seconds: float) -> tuple[int, int, int, int, tuple[str, ...]]:
        """Saves KV, then the tokens, which the KV must not be ahead of.

        Returns: requests, sequences with KV, positions of these, bytes of KV, instances that left something out.
        """
        path, save, kv = await self._saving.save(directory, self._reconfigurer.placement, seconds)
        requests = await self._files.save_generation(path)
        sequences = save.sequences if save is not None else {}
        return requests, len(sequences), sum(sequences.values()), kv.bytes, tuple(sorted(kv.left_out))
