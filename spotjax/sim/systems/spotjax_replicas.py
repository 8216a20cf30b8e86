"""The replicas of a simulated Spotjax and the requests on them: who runs where, and how all change over at a switch.

What ``fleet.dispatch`` is in the server. Knows nothing of plans or of when things happen.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from spotjax.fleet.change import Live
from spotjax.meshes.placement import Placement
from spotjax.planner.kv_cohorts import KvCohort, LiveSequence
from spotjax.reshard.transfer import Survivors
from spotjax.sim.dispatch import least_loaded
from spotjax.sim.replica import Progress
from spotjax.sim.replica_continuous import ContinuousReplica
from spotjax.sim.requests import RequestBook
from spotjax.sim.systems.spotjax_backup import Backups, keepers_of


@dataclass(eq=False)
class Member:
    """One replica of the mesh.

    Attributes:
      replica: its engine.
      since: when it began, in simulated seconds.
      stopped: what was on it when it stopped; None while it runs.
      stopped_at: when that was.
      keepers: stages of which an instance is gone, and who has copies of their KV, or None.
      backed_up: positions of each request that are in those copies.
    """

    replica: ContinuousReplica
    since: float
    stopped: list[Progress] | None = None
    stopped_at: float = 0.0
    keepers: dict[int, str | None] = field(default_factory=dict)
    backed_up: dict[int, int] = field(default_factory=dict)


class Replicas:
    """Gives requests to replicas and keeps them while there are none.

    Args:
      make: an engine for a placement.
      pages, page_size: KV pages of one replica, page 0 included, and positions of one.
      backups: of KV; None where there are none.
      book: says when requests had their first token.
    """

    def __init__(
        self,
        make: Callable[[Placement], ContinuousReplica],
        pages: int,
        page_size: int,
        backups: Backups | None,
        book: RequestBook,
    ) -> None:
        self.placement: Placement | None = None
        """The mesh that serves, or that served last."""
        self.members: list[Member] = []
        self.parked: list[int] = []
        """Requests that wait for a replica to exist, oldest first."""
        self._make, self._pages, self._page_size = make, pages, page_size
        self._backups, self._book = backups, book
        self._running: list[ContinuousReplica] = []

    def add(self, request: int) -> None:
        """Queues a request on the replica with the least load."""
        if self._running:
            least_loaded(self._running).add(request)
        else:
            self.parked.append(request)

    def running(self) -> frozenset[int]:
        """Numbers of those that run."""
        return frozenset(number for number, member in enumerate(self.members) if member.stopped is None)

    def standing_on(self) -> frozenset[str]:
        """Instances of the mesh."""
        return (
            frozenset(device.instance for device in self.placement.devices.values()) if self.placement else frozenset()
        )

    def lose(self, names: Collection[str], others: Iterable[str], now: float) -> bool:
        """Instances are gone: replicas that stand on them stop, and have left of their KV what others have copies of.

        Args:
          names: of those that are gone.
          others: all that are there.
          now: simulated seconds.

        Returns: whether the mesh stood on any of them.
        """
        if self.placement is None:
            return False
        hurt: dict[int, dict[int, str]] = defaultdict(dict)
        for at, device in self.placement.devices.items():
            if device.instance in names:
                hurt[at.data][at.stage] = device.instance
        if not hurt:
            return False
        keepers = {} if self._backups is None else keepers_of(names, self.placement, others)
        for number, stages in hurt.items():
            member = self.members[number]
            self.stop([number], now)
            if not member.keepers and self._backups is not None:
                member.backed_up = self._backups.positions(
                    now, member.since, self._book, member.stopped or (), self.placement
                )
            member.keepers |= {stage: keepers.get(name) for stage, name in stages.items()}
        for name in {name for stages in hurt.values() for name in stages.values()}:
            self.placement = self.placement.without(name)
        return True

    def stop(self, numbers: Iterable[int], now: float) -> None:
        """Stops some at the token boundary that they passed last."""
        for number in numbers:
            member = self.members[number]
            if member.stopped is None:
                member.stopped, member.stopped_at = member.replica.stop(), now
        self._running = [member.replica for member in self.members if member.stopped is None]

    def stall_seconds(self, now: float) -> float:
        """How long the first of those that have stopped has; 0 if none that was at work has."""
        return max((now - member.stopped_at for member in self.members if member.stopped), default=0.0)

    def live(self, survivors: Mapping[int, Mapping[int, int]], but: Collection[int] = ()) -> Live:
        """Sequences with KV, by replica.

        Args:
          survivors: for those that lost an instance: positions of each request that are still there.
          but: left out.
        """
        size = self._page_size
        return {
            number: [
                LiveSequence(request, -(-positions // size), positions)
                for request, computed in self._computed(member)
                if (positions := min(computed, survivors[number].get(request, 0)) if number in survivors else computed)
            ]
            for number, member in enumerate(self.members)
            if number not in but
        }

    def room(self, replicas: int, carried: Mapping[int, int]) -> list[int]:
        """Free KV pages of every new replica."""
        free = [self._pages - 1] * replicas
        for old, new in carried.items():
            free[new] -= sum(-(-(computed + 1) // self._page_size) for _, computed in self._computed(self.members[old]))
        return [max(0, pages) for pages in free]

    def install(
        self, placement: Placement, carried: Mapping[int, int], cohorts: Iterable[KvCohort], now: float
    ) -> tuple[int, int]:
        """Makes another mesh the one that serves.

        Args:
          placement: the mesh.
          carried: old to new number of the replicas that go on; all others have stopped.
          cohorts: who goes on with KV, and where.
          now: simulated seconds.

        Returns: sequences that were moved with their KV, and sequences whose KV is computed again.
        """
        left = dict.fromkeys(self.parked, 0)
        for member in self.members:
            left |= dict(member.stopped or ())
        going_on = {new: self.members[old] for old, new in carried.items()}
        self.placement, self.parked = placement, []
        self.members = [
            going_on.get(number) or Member(self._make(placement), now) for number in range(placement.shape.data)
        ]
        self._running = [member.replica for member in self.members]
        kept, book = 0, self._book
        for cohort in cohorts:
            for sequence in cohort.sequences:
                computed = left.pop(sequence.key, None)
                if computed is not None:
                    if not book.generated[sequence.key]:  # else they are counted when they are computed again
                        book.recomputed[sequence.key] += computed - sequence.progress
                    self.members[cohort.new].replica.add(sequence.key, sequence.progress)
                    kept += 1
        for request in sorted(left):
            if not book.generated[request]:
                book.recomputed[request] += left[request]
            self.add(request)
        return kept, sum(computed > 0 for computed in left.values())

    def boundary_seconds(self, numbers: Collection[int]) -> float:
        """Until all of them have passed another token boundary."""
        return max((self.members[number].replica.boundary_seconds() for number in numbers), default=0.0)

    @staticmethod
    def _computed(member: Member) -> list[tuple[int, int]]:
        if member.stopped is not None:
            return [(request, computed) for request, computed in member.stopped]
        return [(request, computed) for request, _, computed in member.replica.remaining()]


def survivors(members: Sequence[Member], alive: Container[str]) -> Survivors:
    """What is left of the KV of the replicas that lost an instance.

    Args:
      members: the replicas of the mesh.
      alive: instances that are there.
    """
    positions: dict[int, Mapping[int, int]] = {}
    backups: dict[tuple[int, int], str] = {}
    for number, member in enumerate(members):
        kept = {stage: keeper for stage, keeper in member.keepers.items() if keeper is not None and keeper in alive}
        if len(kept) < len(member.keepers):
            positions[number] = {}
        elif kept:
            positions[number] = member.backed_up
            backups |= {(number, stage): keeper for stage, keeper in kept.items()}
    return Survivors(positions, backups)
