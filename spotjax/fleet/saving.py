"""Saves the service's KV into a checkpoint: on request, and when the whole fleet is about to be taken.

What is saved counts once the save is complete, for the tokens that the commit log had by then.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

import msgspec
import numpy as np
from xxhash import xxh3_64_hexdigest

from spotjax.checkpoint import saves
from spotjax.checkpoint.saves import Save
from spotjax.engine.commit_log import CommitLog
from spotjax.engine.request import RequestState
from spotjax.errors import CheckpointError
from spotjax.fleet.cluster import Cluster, SavedKv
from spotjax.fleet.events import EventLog
from spotjax.fleet.recovery import certain
from spotjax.meshes.placement import Placement

log = logging.getLogger(__name__)

RESERVE_SECONDS = 2.0
"""At the end of a grace period, for what was written since the last round of saving; at most half of what is left."""
MARGIN_SECONDS = 0.2
"""Of these, to be left when all is saved."""


class Saves:
    """Where one service's saves go.

    Args:
      checkpoint: where the fleet's last KV goes; empty if nowhere.
      service: identity of the commit log.
      used: path of the save that copies of KV are read from, empty if there is none.

    Attributes:
      used: the same, to be kept up to date: it is not removed.
    """

    def __init__(self, checkpoint: str = "", service: str = "", used: str = "") -> None:
        self.checkpoint, self.service, self.used = checkpoint, service, used
        self._given: dict[str, int] = {}
        """The last number of a save in each checkpoint, so that none is given twice."""
        self._unfinished: set[str] = set()
        """Paths that were given; somebody may be writing there."""

    async def next_path(self, checkpoint: str) -> str:
        """Directory of the next one.

        Raises:
          CheckpointError: the checkpoint cannot be read.
        """
        path = await asyncio.to_thread(saves.next_path, checkpoint, self.service, self._given.get(checkpoint, 0))
        number = max(saves.number_of(path), self._given.get(checkpoint, 0) + 1)  # another may have asked meanwhile
        self._given[checkpoint] = number
        path = saves.with_number(path, number)
        self._unfinished.add(path)
        return path

    async def complete(self, path: str, placement: Placement, recorded: Mapping[int, RequestState]) -> Save:
        """Makes what workers have written a save.

        Args:
          path: where that is.
          placement: the mesh that had it.
          recorded: key to what was recorded of every sequence.

        Raises:
          CheckpointError: that cannot be written.
        """
        save = await asyncio.to_thread(self._complete, path, placement, dict(recorded))
        self._unfinished.discard(path)
        return save

    def _complete(self, path: str, placement: Placement, recorded: Mapping[int, RequestState]) -> Save:
        sequences = {key: certain(state) for key, state in recorded.items()}
        digests = {key: tokens_digest(state, sequences[key]) for key, state in recorded.items()}
        replicas = placement.shape.data
        return saves.complete(path, self.service, placement.epoch, replicas, sequences, digests)

    async def remove_older(self, path: str) -> None:
        """A save is complete: removes those that are not needed any more, as far as that is possible."""
        await asyncio.to_thread(saves.remove_older, path, {*self._unfinished, self.used})

    async def discard(self, path: str) -> None:
        """Removes what workers have written, as far as that is possible."""
        await asyncio.to_thread(saves.discard, path)
        self._unfinished.discard(path)


class Saving:
    """Makes saves.

    Args:
      cluster: has the KV.
      events: told about saves.
      saves: where they go.
      recorded: key of every unfinished sequence to what of it is recorded.
    """

    def __init__(
        self, cluster: Cluster, events: EventLog, saves: Saves, recorded: Callable[[], Mapping[int, RequestState]]
    ) -> None:
        self._cluster, self._events, self._saves, self._recorded = cluster, events, saves, recorded
        self._path: asyncio.Future[str] | None = None
        """Of the save that has begun."""
        self._background: set[asyncio.Task[None]] = set()

    @property
    def wanted(self) -> bool:
        """Whether there is a place for the fleet's last KV."""
        return bool(self._saves.checkpoint)

    def begin(self, epoch: int) -> None:
        """The fleet is about to be taken: saves KV in the background from now on, unless that has begun."""
        if self.wanted and self._path is None:
            self._path = asyncio.get_running_loop().create_future()
            self._do(self._begin(self._path, epoch))

    async def end(self, placement: Placement, seconds: float) -> None:
        """Decoding has stopped: saves what there is, as far as the time allows. Nothing if it has not begun."""
        if not self._recorded():
            self.give_up()
        begun, self._path = self._path, None
        if begun is None:
            return
        end = _now() + max(0.0, seconds - MARGIN_SECONDS)
        try:
            async with asyncio.timeout_at(end + MARGIN_SECONDS):  # whatever the disk does: others wait for a mesh
                path = await asyncio.wait_for(begun, end - _now())
                save, _ = await self._finish(path, placement, max(0.0, end - _now()))
        except (CheckpointError, TimeoutError) as problem:
            why = str(problem) or "the checkpoint did not answer in time"
            self._events.record("saved", placement.epoch, f"nothing was saved: {why}")
        else:
            if save is not None:
                self._cluster.use_save(save)
                self._saves.used = save.path

    def give_up(self) -> None:
        """There is a mesh again, or nothing to save: the save that has begun, if one has, is not wanted any more."""
        begun, self._path = self._path, None
        if begun is not None:
            self._do(self._give_up(begun))

    async def save(
        self, checkpoint: str, placement: Placement | None, seconds: float
    ) -> tuple[str, Save | None, SavedKv]:
        """A save on request, while decoding goes on.

        Returns: its directory; the save, None if there is no mesh or it keeps no account of KV; what has come of it.

        Raises:
          CheckpointError: it cannot be written.
        """
        path = await self._saves.next_path(checkpoint)
        return path, *(await self._finish(path, placement, seconds) if placement is not None else (None, SavedKv()))

    async def close(self) -> None:
        """Leaves what is under way as it is."""
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)

    async def _begin(self, path: asyncio.Future[str], epoch: int) -> None:
        try:
            found = await self._saves.next_path(self._saves.checkpoint)
        except CheckpointError as problem:
            if not path.cancelled():
                path.set_exception(problem)
                path.exception()  # that nobody may ask for it is no oversight
            return
        if path.cancelled():  # there was no time to wait for it
            return
        self._events.record("saving", epoch, f"KV is saved to {found}", path=found)
        path.set_result(found)
        await self._cluster.save_kv(found, 0.0, last=False)

    async def _give_up(self, begun: asyncio.Future[str]) -> None:
        try:
            path = await begun
        except CheckpointError as problem:
            log.warning("KV could not have been saved: %s", problem)
            return
        await self._cluster.save_kv(path, 0.0, last=True)
        await self._saves.discard(path)

    async def _finish(self, path: str, placement: Placement, seconds: float) -> tuple[Save | None, SavedKv]:
        recorded = dict(self._recorded())  # before: what is written from now on may be of tokens that are not recorded
        kept = await self._cluster.save_kv(path, seconds, last=True)
        if kept is None:
            return None, SavedKv()
        save = await self._saves.complete(path, placement, recorded)
        self._do(self._saves.remove_older(path))  # for which nobody waits
        message = f"KV of {len(recorded)} sequences was saved to {path}"
        if kept.left_out:
            message += f", in part: {'; '.join(f'{name}: {why}' for name, why in sorted(kept.left_out.items()))}"
        names = " ".join(sorted(kept.left_out))
        self._events.record(
            "saved", placement.epoch, message, path=path, sequences=len(recorded), bytes=kept.bytes, left_out=names
        )
        return save, kept

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._background.discard(task)
        if not task.cancelled() and (problem := task.exception()) is not None:
            log.error("saving of KV, or removing what was saved, failed", exc_info=problem)


def still_certain(save: Save, commits: CommitLog) -> Save | None:
    """A save as far as it is of tokens that the log has; None if it is of none that are of use.

    A log that has lost its end may have gone on with other tokens since. Reads it as it was when it was opened.
    """
    recorded = {
        recorded.key + choice: state
        for recorded in commits.replay()
        for choice, state in enumerate(recorded.states)
        if state.finish is None
    }
    same = {
        key: positions
        for key, positions in save.sequences.items()
        if key in recorded
        and positions <= certain(recorded[key])
        and save.digests.get(key) == tokens_digest(recorded[key], positions)
    }
    return msgspec.structs.replace(save, sequences=same) if same else None


def tokens_digest(state: RequestState, positions: int) -> str:
    """A hash of a sequence's first tokens, which the KV of so many positions is a function of."""
    return xxh3_64_hexdigest(np.array((*state.prompt, *state.tokens)[:positions], np.int32).data)


def _now() -> float:
    return asyncio.get_running_loop().time()
