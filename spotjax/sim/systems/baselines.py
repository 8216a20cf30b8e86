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

    def start(self) -> None:
        """The first mesh, with everything in place."""
        self._choice = self.choose(len(self.names))
        if self._choice is not None:
            self._open(self._choice, self.names)
            self.record(self._choice.shape, "start")

    def handle(self, event: FleetEvent) -> None:
        """Stops all, starts all."""
        self.update_names(event)
        choice = self.choose(len(self.names))
        used = frozenset[str]().union(*self.replicas.values())
        if _same(choice, self._choice) and used.isdisjoint(event.removed):
            self.done()
            return
        left, dropped = set(range(len(self.replicas))), list[int]()

        def stopped(number: int, batch: Parked | None, waiting: list[int]) -> None:
            requests = [] if batch is None else batch.requests
            dropped.extend(requests)
            self.requeue([*waiting, *requests])
            left.discard(number)
            if not left:
                self._restart(len(dropped))

        if not left:
            self.world.at(self.there_at(self.names), self._restart, 0)
        if event.removed:
            by, caution = event.seconds - STOP_SECONDS, CONSERVATIVE
        else:  # the artifact counts from when it begins, also where that is late
            by = self.world.now + self.world.scenario.assumptions.announced_seconds + STOP_SECONDS
            caution = GENEROUS
        for number, replica in enumerate(list(self.replicas)):
            replica.stop_by(by, caution, partial(stopped, number))

    def _restart(self, dropped: int) -> None:
        """All have stopped. What went by now does not count, what is announced does."""
        self.replicas, self._choice = {}, self.choose(len(self.names))
        if self._choice is None:
            self.record(None, "too few instances", recomputed=dropped)
            self.done()
            return
        start = self.world.scenario.assumptions.engine_start_seconds
        load = self.load_seconds(self._choice.shape)
        wait = self.there_at(self.names) - self.world.now
        stall = wait + start + max(start, load)  # daemons, then engines while they load
        self.world.at(self.world.now + stall, self._restarted, self._choice, list(self.names), stall, dropped)

    def _restarted(self, choice: OriginalChoice, names: Sequence[str], stall: float, dropped: int) -> None:
        self._open(choice, names)
        loaded = self.world.scenario.spec.parameter_bytes * choice.shape.data
        self.record(choice.shape, "restarted", stall=stall, loaded=loaded, recomputed=dropped)
        self.dispatch()
        self.done()

    def _open(self, choice: OriginalChoice, names: Sequence[str]) -> None:
        """On the latest to come. In the artifact their order is that of a set."""
        devices = [name for name in names for _ in range(self.world.scenario.kind.devices)]
        size = choice.shape.stage * choice.shape.tensor
        first = len(devices) - choice.shape.data * size
        for number in range(choice.shape.data):
            self.open(choice, devices[first + number * size : first + (number + 1) * size])


class Rerouting(ArtifactSystem):
    """Fixed shape, whole replicas come and go.

    Args:
      pool: instances that P and M are chosen for.
    """

    name = "rerouting"

    def __init__(self, workload: Workload, batches_ahead: int, pool: int) -> None:
        super().__init__(workload, batches_ahead)
        self._pool = pool
        self._opening = frozenset[str]()

    def start(self) -> None:
        """The first replicas, with everything in place."""
        choice = self.choose(self._pool)
        assert choice is not None, "the whole pool carries no replica"
        self._choice = choice
        self._size = choice.shape.stage * choice.shape.tensor // self.world.scenario.kind.devices
        for names in self._take(self._idle()):
            self.open(choice, names)
        self._tell("start")

    def handle(self, event: FleetEvent) -> None:
        """Closes replicas that lose an instance, opens those for which there are enough instances."""
        self.update_names(event)
        hurt = {replica for replica, names in self.replicas.items() if not names.isdisjoint(event.removed)}
        if not hurt:
            self.world.at(event.seconds if event.added else self.world.now, self._more)
            return
        dropped: list[int] = []

        def stopped(replica: StaticReplica, batch: Parked | None, waiting: list[int]) -> None:
            del self.replicas[replica]
            requests = [] if batch is None else batch.requests
            dropped.extend(requests)
            self.requeue([*waiting, *requests])
            hurt.discard(replica)
            if not hurt:
                self._tell("closed", recomputed=len(dropped))
                self._more()

        for replica in [replica for replica in self.replicas if replica in hurt]:
            replica.stop_by(event.seconds - STOP_SECONDS, CONSERVATIVE, partial(stopped, replica))
        self.dispatch()

    def _more(self) -> None:
        self._fill()
        self.dispatch()
        self.done()

    def _fill(self) -> None:
        """New replicas on idle instances: their engines start, read the parameters, and wait once more (artifact)."""
        start = self.world.scenario.assumptions.engine_start_seconds
        stall = max(start, self.load_seconds(self._choice.shape)) + start
        for names in self._take(self._idle()):
            self._opening |= names
            self.world.at(self.world.now + stall, self._opened, names, stall)

    def _opened(self, names: frozenset[str], stall: float) -> None:
        self._opening -= names
        if names <= set(self._usable()):
            self.open(self._choice, names)
            self._tell("opened", stall=stall, loaded=self.world.scenario.spec.parameter_bytes)
            self.dispatch()
        else:  # one of them went, or is about to: the others are idle again
            self._fill()

    def _usable(self) -> list[str]:
        """Instances that are there and stay, as far as it knows."""
        there = {instance.name for instance in self.world.ready_instances()}
        return [name for name in self.names if name in there]

    def _idle(self) -> list[str]:
        taken = self._opening.union(*self.replicas.values())
        return [name for name in self._usable() if name not in taken]

    def _take(self, names: Sequence[str]) -> list[frozenset[str]]:
        """As many groups of instances as make replicas, in order."""
        return [frozenset(names[end - self._size : end]) for end in range(self._size, len(names) + 1, self._size)]

    def _tell(self, reason: str, **figures: float) -> None:
        shape = replace(self._choice.shape, data=len(self.replicas)) if self.replicas else None
        self.record(shape, reason, **figures)


def _same(one: OriginalChoice | None, other: OriginalChoice | None) -> bool:
    """Whether two choices are run alike."""
    if one is None or other is None:
        return one is other
    return (one.shape, one.micro_batches) == (other.shape, other.micro_batches)
