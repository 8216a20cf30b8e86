"""The baselines of SpotServe's evaluation, as its artifact runs them (Miao et al. 2024, section 6.1).

*Reparallelization* takes the best shape for what is left and restarts everything: daemons and engines start anew, all
parameters are read from storage, every request that was running begins again. *Rerouting* keeps P and M as they were
chosen for the whole pool; replicas that lose an instance are closed, their requests begin again elsewhere, and others
go on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from spotjax.planner.published import OriginalChoice
from spotjax.sim.replica_static import CONSERVATIVE, GENEROUS, Parked, StaticReplica
from spotjax.sim.systems.artifact import ArtifactSystem, FleetEvent, Workload

STOP_SECONDS = 0.5
"""What the baselines of the artifact expect a change to take from its deadline."""


class Reparallelization(ArtifactSystem):
    """Best shape, restart from storage."""

    name = "reparallelization"

    def start(self, names: Sequence[str]) -> None:
        """The first mesh, with everything in place."""
        self._names = list(names)
        self._on: list[str] = []
        self._choice = self.choose(len(names))
        self._open(self._choice, 0.0, 0)

    def handle(self, event: FleetEvent) -> None:
        """Stops all, starts all."""
        grace = self.world.scenario.assumptions.notice_seconds
        self._names = [name for name in (*self._names, *event.added) if name not in event.removed]
        choice = self.choose(len(self._names))
        if choice == self._choice and not set(event.removed) & set(self._on):
            self.done()
            return
        left, dropped = set(range(len(self.replicas))), list[int]()

        def stopped(number: int, batch: Parked | None, waiting: list[int]) -> None:
            dropped.extend([] if batch is None else batch.requests)
            self.requeue(waiting, restart=True)
            left.discard(number)
            if not left:
                self._restart(choice, dropped)

        if not left:
            self._restart(choice, dropped)
        late = max(0.0, grace - (event.seconds - self.world.now)) if event.removed else 0.0
        seconds, caution = (-STOP_SECONDS - late, CONSERVATIVE) if event.removed else (STOP_SECONDS, GENEROUS)
        for number, replica in enumerate(list(self.replicas)):
            replica.stop_by(self.world.now + grace + seconds, caution, partial(stopped, number))

    def standing(self) -> list[tuple[StaticReplica, frozenset[str]]]:
        """In order, each on as many instances of the mesh as it takes."""
        used = self._on
        size = max(1, len(used) // max(1, len(self.replicas)))
        return [
            (replica, frozenset(used[number * size : (number + 1) * size]))
            for number, replica in enumerate(self.replicas)
        ]

    def _restart(self, choice: OriginalChoice | None, dropped: Sequence[int]) -> None:
        self.requeue(dropped, restart=True)
        self.replicas, self._choice = [], choice
        if choice is None:
            self.record(None, "too few instances", recomputed=len(dropped))
            self.done()
            return
        start = self.world.scenario.assumptions.engine_start_seconds
        stall = start + max(start, self.load_seconds(choice.shape))  # daemons, then engines while they load
        self.world.at(self.world.now + stall, self._open, choice, stall, len(dropped))

    def _open(self, choice: OriginalChoice | None, stall: float, dropped: int) -> None:
        if choice is not None:
            self.replicas = [self.replica(choice) for _ in range(choice.shape.data)]
            # The latest to come. In the artifact their order is that of a set.
            self._on = self._names[-(choice.shape.devices // self.world.scenario.kind.devices) :]
            loaded = self.world.scenario.spec.parameter_bytes * choice.shape.data if stall else 0
            self.record(choice.shape, "restarted", stall=stall, loaded=loaded, recomputed=dropped)
        self.dispatch()
        if stall:
            self.done()


class Rerouting(ArtifactSystem):
    """Fixed shape, whole replicas come and go.

    Args:
      pool: instances that P and M are chosen for.
    """

    name = "rerouting"

    def __init__(self, workload: Workload, batches_ahead: int, pool: int) -> None:
        super().__init__(workload, batches_ahead)
        self._pool = pool

    def start(self, names: Sequence[str]) -> None:
        """The first replicas, with everything in place."""
        self._idle = list(names)
        self._of: dict[int, tuple[StaticReplica, tuple[str, ...]]] = {}
        self._numbers = 0
        choice = self.choose(self._pool)
        assert choice is not None, "the whole pool carries no replica"
        self._choice = choice
        self._size = choice.shape.stage * choice.shape.tensor // self.world.scenario.kind.devices
        while len(self._idle) >= self._size:
            self._open(self._take())
        self._tell("start")

    def handle(self, event: FleetEvent) -> None:
        """Closes replicas that lose an instance, opens those for which there are enough instances."""
        grace = self.world.scenario.assumptions.notice_seconds
        self._idle = [name for name in self._idle if name not in event.removed]
        hurt = {number for number, (_, names) in self._of.items() if set(names) & set(event.removed)}
        if not hurt:
            self._idle += event.added
            self.world.at(event.seconds, self._more)
            return
        dropped: list[int] = []

        def stopped(number: int, batch: Parked | None, waiting: list[int]) -> None:
            replica, names = self._of.pop(number)
            self.replicas.remove(replica)
            self._idle += [name for name in names if name not in event.removed]
            dropped.extend([] if batch is None else batch.requests)
            self.requeue([*waiting, *([] if batch is None else batch.requests)], restart=True)
            hurt.discard(number)
            if not hurt:
                self._tell("closed", recomputed=len(dropped))
                self._more()

        by = self.world.now + grace - STOP_SECONDS - max(0.0, grace - (event.seconds - self.world.now))
        for number in sorted(hurt):
            self._of[number][0].stop_by(by, CONSERVATIVE, partial(stopped, number))
        self.dispatch()

    def standing(self) -> list[tuple[StaticReplica, frozenset[str]]]:
        """As they were opened."""
        return [(replica, frozenset(names)) for replica, names in self._of.values()]

    def _more(self) -> None:
        """New replicas on idle instances: their engines start, read the parameters, and wait once more (artifact)."""
        start = self.world.scenario.assumptions.engine_start_seconds
        stall = max(start, self.load_seconds(self._choice.shape)) + start
        opening = []
        while len(self._idle) >= self._size:
            opening.append(self._take())
        for names in opening:
            self.world.at(self.world.now + stall, self._opened, names, stall)
        self.dispatch()
        self.done()

    def _opened(self, names: tuple[str, ...], stall: float) -> None:
        if all(name in self.world.instances for name in names):
            self._open(names)
            self._tell("opened", stall=stall, loaded=self.world.scenario.spec.parameter_bytes)
            self.dispatch()
        else:  # one of them went before it served
            self._idle += [name for name in names if name in self.world.instances]

    def _take(self) -> tuple[str, ...]:
        names, self._idle = tuple(self._idle[: self._size]), self._idle[self._size :]
        return names

    def _open(self, names: tuple[str, ...]) -> None:
        replica = self.replica(self._choice)
        self._of[self._numbers] = replica, names
        self._numbers += 1
        self.replicas.append(replica)

    def _tell(self, reason: str, **figures: float) -> None:
        shape = replace(self._choice.shape, data=len(self.replicas)) if self.replicas else None
        self.record(shape, reason, **figures)
