"""Where the KV of a fleet is: on which workers' stages, in whose copies, in which save. Asks the workers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from functools import partial

from spotjax.checkpoint.saves import Save
from spotjax.errors import CheckpointError, InstanceLost
from spotjax.fleet.cluster import SavedKv
from spotjax.fleet.recovery import common_remains
from spotjax.fleet.sessions import CommandFailed, Sessions, WorkerSession
from spotjax.meshes.instance import DeviceRef
from spotjax.meshes.placement import Placement
from spotjax.meshes.shape import MeshShape
from spotjax.meshes.slices import Range
from spotjax.protocol import control
from spotjax.reshard.transfer import Remains, Survivors

log = logging.getLogger(__name__)

LATE_SECONDS = 0.1
"""For the answer of who has saved until the last moment."""
FORGET_SECONDS = 0.5
"""Sequences that end within this time are told to the workers together."""


class RemoteKv:
    """The KV of the workers. Methods are those of ``fleet.cluster.Cluster``.

    Args:
      sessions: the workers.
      layers: of the model.
      save: KV that was saved before this controller started, which all workers can read.

    Attributes:
      placement: the mesh whose stages have it; None before the first.
      serving: who was part of that mesh.
      trusted: whose KV and copies this controller knows of: who was asked in a reunion, or joined with nothing.
    """

    def __init__(self, sessions: Sessions, layers: int, save: Save | None) -> None:
        self.placement: Placement | None = None
        self.serving: Mapping[str, WorkerSession] = {}
        self.trusted: set[WorkerSession] = set()
        self._sessions, self._layers, self._save = sessions, layers, save
        self._ended: list[int] = []

    async def survivors(self, hurt: Mapping[int, Mapping[int, int]]) -> Survivors:
        """See ``Cluster.survivors``: asks every worker what it keeps of the layers that are gone."""
        positions: dict[int, Mapping[int, int]] = {}
        backups: dict[tuple[int, int], str] = {}
        if self.placement is None:
            return Survivors({replica: {} for replica in hurt})
        for replica, computed in hurt.items():
            left = dict(computed)
            for number in range(self.placement.shape.stage):
                serving = self.serving.get(self.placement.group(replica, number)[0].instance)
                if serving is not None and not serving.over.done():
                    continue
                keeper, kept = await self._most_kept(self.placement.layers[number], tuple(computed))
                if keeper:
                    backups[replica, number] = keeper
                left = {key: min(positions, kept.get(key, 0)) for key, positions in left.items()}
            positions[replica] = left
        return Survivors(positions, backups)

    async def _most_kept(self, layers: Range, sequences: tuple[int, ...]) -> tuple[str, Mapping[int, int]]:
        """The worker that keeps most of these sequences' KV over these layers, and how many positions of each."""
        ready = [session for session in self._sessions.all() if session in self.trusted]
        save = (self._save.path, tuple(self._save.sequences.items())) if self._save is not None else ("", ())
        command = partial(_coverage_command, layers, sequences, *save)
        answers = await asyncio.gather(*(session.ask(command) for session in ready), return_exceptions=True)
        best: tuple[str, Mapping[int, int]] = ("", {})
        for session, answer in zip(ready, answers, strict=True):
            if isinstance(answer, control.Done) and sum(answer.positions) > sum(best[1].values()):
                best = session.instance, dict(zip(sequences, answer.positions, strict=True))
        return best

    def forget(self, sequences: Sequence[int]) -> None:
        """See ``Cluster.forget``; workers are told soon, of many at once."""
        if sequences:
            self._ended += sequences
            if len(self._ended) == len(sequences):
                asyncio.get_running_loop().call_later(FORGET_SECONDS, self._tell_ended)

    def _tell_ended(self) -> None:
        ended, self._ended = tuple(self._ended), []
        for session in self._sessions.all():
            if session.offer is not None:
                session.tell(control.Forget(ended))

    async def reunite(self, sequences: Mapping[int, int]) -> Remains | None:
        """See ``Cluster.reunite``; of several meshes that workers were part of the last one counts."""
        ready = [session for session in self._sessions.all() if session.offer is not None]
        offers = [session.offer for session in ready if session.offer is not None]
        meshes = [offer.placement for offer in offers if offer.placement is not None]
        if meshes:
            placement = max(meshes, key=lambda mesh: mesh.epoch).placement()
        elif self._save is not None or any(offer.copies for offer in offers):
            placement = self._vanished()
        else:
            return None
        command = partial(_reunite_command, placement.epoch, tuple(sequences.items()))
        answers = await asyncio.gather(*(session.ask(command) for session in ready), return_exceptions=True)
        self.trusted = {s for s, answer in zip(ready, answers, strict=True) if isinstance(answer, control.Done)}
        stages = {
            (session, stage.replica, stage.stage): stage.sequences
            for session, answer in zip(ready, answers, strict=True)
            if isinstance(answer, control.Done) and not session.over.done()
            for stage in answer.remains
        }
        self.placement = placement
        self.serving = {session.instance: session for session, _, _ in stages}
        by_place = {(replica, stage): kept for (_, replica, stage), kept in stages.items()}
        return Remains(placement, frozenset(self.serving), common_remains(by_place))

    async def save_kv(self, path: str, seconds: float, *, last: bool) -> SavedKv:
        """See ``Cluster.save_kv``. Who has not answered in time may go on; what is complete then counts."""
        command, serving = partial(_save_command, path, seconds, last), self.serving.items()
        asked = {name: asyncio.create_task(session.ask(command)) for name, session in serving}
        try:
            if asked:
                await asyncio.wait(asked.values(), timeout=seconds + LATE_SECONDS if last else None)
        finally:
            for task in asked.values():
                task.cancel()
        saved, left_out = 0, dict[str, str]()
        for name, answer in zip(asked, await asyncio.gather(*asked.values(), return_exceptions=True), strict=True):
            if isinstance(answer, control.Done):
                saved, why = saved + answer.moved, answer.left_out
            else:
                why = "no answer in time" if isinstance(answer, asyncio.CancelledError) else str(answer)
            if why:
                left_out[name] = why
                log.warning("KV of instance %s is not all saved: %s", name, why)
        return SavedKv(saved, left_out)

    def use_save(self, save: Save) -> None:
        """See ``Cluster.use_save``."""
        self._save = save

    async def save_parameters(self, path: str) -> int:
        """See ``Cluster.save_parameters``."""
        command, serving = partial(_save_parameters_command, path), self.serving.values()
        asked = [asyncio.create_task(session.ask(command)) for session in serving]
        try:
            return sum(done.moved for done in await asyncio.gather(*asked))
        except (InstanceLost, CommandFailed) as problem:
            raise CheckpointError(f"parameters are not all saved, save them again: {problem}") from problem
        finally:
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)

    def _vanished(self) -> Placement:
        """A mesh of which nobody is left, one stage each replica: there may be copies of its KV."""
        shape = MeshShape(self._save.replicas if self._save is not None else 1, 1, 1)
        devices = {position: DeviceRef("(vanished)", position.data) for position in shape.positions()}
        return Placement(self._save.epoch if self._save is not None else 0, shape, ((0, self._layers),), devices)


def _reunite_command(epoch: int, sequences: tuple[tuple[int, int], ...], number: int) -> control.Reunite:
    return control.Reunite(number, epoch, sequences)


def _coverage_command(
    layers: Range, sequences: tuple[int, ...], save: str, saved: tuple[tuple[int, int], ...], number: int
) -> control.Coverage:
    return control.Coverage(number, layers, sequences, save, saved)


def _save_parameters_command(path: str, number: int) -> control.SaveParameters:
    return control.SaveParameters(number, path)


def _save_command(path: str, seconds: float, last: bool, number: int) -> control.SaveKv:
    return control.SaveKv(number, path, seconds, last)
