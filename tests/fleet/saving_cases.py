"""A pure cluster that saves: what it is told, and saves that are only remembered."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from functools import wraps
from pathlib import Path
from random import Random
from typing import Any

from fleet_cases import TIGHT, instances, make_service
from timed_cases import Fleet, TimedCluster, now
from virtual_time import run

from spotjax.checkpoint.saves import Save
from spotjax.engine.request import RequestState
from spotjax.errors import CheckpointError
from spotjax.fleet.checkpoint_files import CheckpointFiles
from spotjax.fleet.cluster import SavedKv
from spotjax.fleet.recovery import certain
from spotjax.fleet.saving import Saves
from spotjax.meshes.placement import Placement


class Remembered(Saves):
    """Saves in no directory.

    Attributes:
      made: complete ones.
      given_up: paths of those that were removed.
      newest: paths of those whose completion removes older ones.
      problem: why nothing can be saved.
      seconds: that looking for a path takes.
      completing: seconds that the end takes.
    """

    def __init__(self, checkpoint: str = "/checkpoint") -> None:
        super().__init__(checkpoint, "service")
        self.made: list[Save] = []
        self.given_up: list[str] = []
        self.newest: list[str] = []
        self.problem, self.seconds, self.completing = "", 0.0, 0.0
        self._paths = 0

    async def next_path(self, checkpoint: str) -> str:
        await asyncio.sleep(self.seconds)
        if self.problem:
            raise CheckpointError(self.problem)
        self._paths += 1
        return f"{checkpoint}/{self._paths}"

    async def complete(self, path: str, placement: Placement, recorded: Mapping[int, RequestState]) -> Save:
        await asyncio.sleep(self.completing)
        sequences = {key: certain(state) for key, state in recorded.items()}
        self.made.append(Save(path, self.service, placement.epoch, placement.shape.data, sequences))
        return self.made[-1]

    async def remove_older(self, path: str) -> None:
        self.newest.append(path)

    async def discard(self, path: str) -> None:
        self.given_up.append(path)


class SavingCluster(TimedCluster):
    """A cluster in time that saves.

    Attributes:
      told: (time, path, seconds, last) of what was to be saved.
      saves: that it was told to use.
      takes: seconds that the last part of a save takes, unless less are given.
      parameters: called when they are to be saved; may raise.
    """

    def __init__(self, random: Random, takes: float = 0.1) -> None:
        super().__init__(random)
        self.told: list[tuple[float, str, float, bool]] = []
        self.saves: list[Save] = []
        self.takes = takes
        self.parameters: Callable[[], int] = lambda: 100
        self.on_last: Callable[[], None] = lambda: None

    async def save_kv(self, path: str, seconds: float, *, last: bool) -> SavedKv | None:
        self.told.append((now(), path, seconds, last))
        if last:
            self.on_last()
            await asyncio.sleep(min(seconds, self.takes))
        return SavedKv(7, {"i0": "no time"} if last and seconds < self.takes else {})

    def use_save(self, save: Save) -> None:
        self.saves.append(save)

    async def save_parameters(self, path: str) -> int:
        await asyncio.sleep(self.takes)
        return self.parameters()


class Files(CheckpointFiles):
    """Writes nothing.

    Attributes:
      complete_in: checkpoints that are complete.
      states: saves beside which there is generation state.
      problem: why that cannot be written.
    """

    def __init__(self, log: Path | None = Path("log")) -> None:
        self._log = log
        self.complete_in: list[str] = []
        self.states: list[str] = []
        self.problem = ""

    async def require_free(self, directory: str) -> None:
        if directory in self.complete_in:
            raise CheckpointError("complete already")

    async def complete(self, directory: str) -> None:
        self.complete_in.append(directory)

    async def save_generation(self, save: str) -> int:
        await asyncio.sleep(0.5)
        if self.problem:
            raise CheckpointError(self.problem)
        self.states.append(save)
        return 3


class SavingFleet(Fleet):
    """A fleet whose instances all are needed, and that saves.

    Attributes:
      cluster: its devices.
      saves: what was saved.
      files: what else.
    """

    cluster: SavingCluster
    saves: Remembered
    files: Files

    def told(self) -> list[tuple[str, bool]]:
        """Where KV was to be saved, and whether that was the last of it."""
        return [(path, last) for _, path, _, last in self.cluster.told]

    def events(self, kind: str) -> list[str]:
        return [event.message for event in self.service.controller.recent() if event.kind == kind]


async def make_saving_fleet(checkpoint: str = "/checkpoint", log: Path | None = Path("log")) -> SavingFleet:
    """Two instances that serve together."""
    random = Random(1)
    cluster, saves, files = SavingCluster(random), Remembered(checkpoint), Files(log)
    service = make_service(
        random, instances(2, 1, TIGHT), retain_seconds=1e9, cluster=cluster, saves=saves, files=files
    )
    await service.controller.start()
    fleet = SavingFleet(service, cluster)
    fleet.saves, fleet.files = saves, files
    return fleet


Scenario = Callable[..., Coroutine[Any, Any, None]]


def in_virtual_time(scenario: Scenario) -> Callable[..., None]:
    @wraps(scenario)
    def test(**arguments: object) -> None:
        run(scenario(**arguments))

    return test


async def busy(checkpoint: str = "/checkpoint") -> SavingFleet:
    """A fleet in the middle of work that takes minutes."""
    fleet = await make_saving_fleet(checkpoint)
    for n in range(60):
        fleet.service.submit(f"r{n}", max_tokens=30, ignore_eos=True, seed=n)
    await asyncio.sleep(1)
    return fleet


async def bring_back(fleet: SavingFleet) -> None:
    for name in ("i0", "i1"):
        fleet.register(name)
        fleet.arrive(name)
    await fleet.finish()
    fleet.service.check_complete()
