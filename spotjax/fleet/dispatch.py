"""The replicas of the current placement and the sequences on them: who runs where, and how all change over at a switch.

Knows nothing of instances or plans.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from spotjax.engine.batch import Pipeline
from spotjax.engine.observer import Work
from spotjax.engine.pages import PageAllocator
from spotjax.engine.replica import Replica
from spotjax.engine.request import FinishReason, RequestState
from spotjax.engine.scheduler import Limits, Scheduler
from spotjax.engine.sequence import Sequence as ScheduledSequence
from spotjax.fleet.handover import CopiedPages, Handover, full_pages, hand_over, live_sequence
from spotjax.fleet.recovery import StoppedPipeline
from spotjax.planner.kv_cohorts import KvCohort, LiveSequence
from spotjax.reshard.transfer import PageTransfer

MakeReplica = Callable[[Scheduler, Pipeline], Replica]
MakeLimits = Callable[[int], Limits]
"""Limits of a replica whose pipeline is that deep."""
CLOSE_LOADS = 2
"""A replica that has the beginning of a prompt gets it, unless it has so many more sequences than another."""
NOBODY: Mapping[int, Any] = MappingProxyType({})


class Dispatcher:
    """Gives sequences to replicas and keeps them while there are none.

    Args:
      make_replica: builds the loop of one replica.
      make_limits: what a replica can do at once.
      pages, page_size: KV pages of one replica, page 0 included.
      failed: told about an error that a replica cannot go on from.
      caching: whether replicas keep pages for prompts that begin alike.
    """

    def __init__(
        self,
        make_replica: MakeReplica,
        make_limits: MakeLimits,
        pages: int,
        page_size: int,
        failed: Callable[[BaseException], None],
        *,
        caching: bool = False,
    ) -> None:
        self.replicas: tuple[Replica, ...] = ()
        self.parked: list[ScheduledSequence] = []
        """Sequences that wait for a replica to exist, oldest first."""
        self._make_replica, self._make_limits = make_replica, make_limits
        self._pages, self._page_size, self._caching, self._failed = pages, page_size, caching, failed
        self._loops: list[asyncio.Task[None]] = []
        self._work_before = Work()
        """Of replicas that are no more."""

    @property
    def work(self) -> Work:
        """What all replicas have done that there ever were."""
        return sum((replica.scheduler.work for replica in self.replicas), self._work_before)

    @property
    def waiting(self) -> int:
        """Sequences that no step has taken up yet."""
        return len(self.parked) + sum(len(replica.scheduler.waiting) for replica in self.replicas)

    @property
    def sequences(self) -> int:
        """Sequences that have not ended."""
        return len(self.parked) + sum(replica.scheduler.load for replica in self.replicas)

    def add(self, sequence: ScheduledSequence) -> None:
        """Queues a sequence on the replica with the least load, or one close to that which has more of its prefix."""
        replicas = [replica for replica in self.replicas if not replica.stopping]
        if not replicas:
            self.parked.append(sequence)
            return
        most = min(replica.scheduler.load for replica in replicas) + (CLOSE_LOADS if self._caching else 0)
        close = [replica for replica in replicas if replica.scheduler.load <= most]
        replica = min(close, key=lambda r: (-len(r.scheduler.reuse.find(sequence.state)), r.scheduler.load))
        replica.scheduler.add(sequence)
        replica.wake()

    def cancel(self, sequence: ScheduledSequence, reason: FinishReason) -> bool:
        """Ends a sequence; True if it ended now, False if at the next token boundary."""
        if sequence in self.parked:
            self.parked.remove(sequence)
            sequence.state, sequence.matcher = sequence.state.finished(reason), None
            return True
        for replica in self.replicas:
            if any(sequence is other for other in replica.scheduler.sequences()):
                ended = replica.scheduler.cancel(sequence, reason)
                replica.wake()  # its pages may let others in
                return ended
        raise LookupError(f"sequence {sequence.key} is neither parked nor on a replica")

    async def stop(self, carried: Collection[int] = ()) -> None:
        """Stops all replicas but some at their next token boundary."""
        loops = []
        for number, (replica, loop) in enumerate(zip(self.replicas, self._loops, strict=True)):
            if number not in carried:
                replica.stop()
                loops.append(loop)
        await asyncio.gather(*loops, return_exceptions=True)

    def running(self) -> frozenset[int]:
        """Replicas that are not stopping."""
        return frozenset(number for number, replica in enumerate(self.replicas) if not replica.stopping)

    def live(self, survivors: Mapping[int, Mapping[int, int]] = NOBODY) -> dict[int, list[LiveSequence]]:
        """What has KV worth keeping on every replica.

        Args:
          survivors: for replicas that lost an instance: key of a sequence to the positions whose KV is still there.
            Others that are lost have nothing.
        """
        return {
            number: [
                live_sequence(s, positions, replica.scheduler.pages)
                for s in replica.scheduler.running.values()
                if (positions := self._positions(s, replica, survivors.get(number)))
            ]
            for number, replica in enumerate(self.replicas)
        }

    def begun(self, carried: Collection[int]) -> list[tuple[ScheduledSequence, int]]:
        """The sequences that have begun, with their computed positions, but for those on some replicas."""
        return [
            (s, s.computed)
            for number, replica in enumerate(self.replicas)
            for s in replica.scheduler.running.values()
            if s.computed and number not in carried
        ]

    def computed(self, replicas: Collection[int]) -> dict[int, dict[int, int]]:
        """Key to computed positions of the sequences that run on some replicas."""
        return {
            number: {s.key: s.computed for s in self.replicas[number].scheduler.running.values() if s.computed}
            for number in replicas
        }

    def full_pages(self, heirs: Mapping[int, int]) -> tuple[PageTransfer, ...]:
        """KV that can be copied while decoding goes on; see ``handover.full_pages``."""
        return full_pages(self._with_kv(), heirs, self._page_size)

    def hand_over(
        self,
        replicas: int,
        cohorts: Sequence[KvCohort],
        heirs: Mapping[int, int],
        carried: Mapping[int, int] = NOBODY,
        copied: CopiedPages = frozenset(),
    ) -> Handover:
        """Works out where every sequence of the stopped replicas goes; see ``handover.hand_over``.

        Pages of replicas that are carried over are taken at once; ``give_back`` them if the switch comes to nothing.
        """
        going_on = {new: self.replicas[old].scheduler.pages for old, new in carried.items()}
        allocators = tuple(
            going_on.get(number) or PageAllocator(self._pages, self._page_size, caching=self._caching)
            for number in range(replicas)
        )
        handover = hand_over(self._all(carried), cohorts, heirs, allocators, copied)
        for old, new in carried.items():
            for sequence in handover.adopted.get(new, ()):
                self.replicas[old].scheduler.reserved[sequence.key] = handover.pages[sequence.key]
        return handover

    def room(self, replicas: int, carried: Mapping[int, int]) -> list[int]:
        """Free KV pages of every new replica."""
        going_on = {new: self.replicas[old].scheduler.pages.free for old, new in carried.items()}
        return [going_on.get(number, self._pages - 1) for number in range(replicas)]

    def give_back(self, handover: Handover, carried: Mapping[int, int]) -> None:
        """Frees what ``hand_over`` took of replicas that go on, because nothing is handed over to them after all."""
        for old, new in carried.items():
            for sequence in handover.adopted.get(new, ()):
                self.replicas[old].scheduler.release_reserved(sequence.key)

    def forget(self, handover: Handover, carried: Collection[int]) -> None:
        """The move was cut off: on stopped replicas only the KV of sequences that were handed over is what it was."""
        keys = {sequence.key for sequence in handover.recomputed}
        for number, replica in enumerate(self.replicas):
            if number not in carried:
                replica.scheduler.ground()
                replica.scheduler.forget(keys)

    def take_cancelled(self, carried: Collection[int] = ()) -> list[RequestState]:
        """Removes the sequences that were to end at the token boundary that a stopped replica never reached."""
        ended = []
        for number, replica in enumerate(self.replicas):
            for sequence in list(replica.scheduler.running.values()):
                if sequence.cancelled is not None and number not in carried:
                    sequence.ground()
                    replica.scheduler.cancel(sequence, sequence.cancelled)
                    ended.append(sequence.state)
        return ended

    def install(self, pipelines: Sequence[Pipeline], handover: Handover, carried: Mapping[int, int] = NOBODY) -> None:
        """Starts the new replicas with what was handed over, less what was cancelled and with what came meanwhile.

        Args:
          pipelines: one for every replica of the new mesh.
          handover: where the sequences of stopped replicas go.
          carried: old to new number of those that did not stop; they go on as they are.
        """
        others = {sequence.key: sequence for sequence in self._all(carried)}
        going_on = {new: (self.replicas[old], self._loops[old]) for old, new in carried.items()}
        replicas, loops = [], []
        for number, pipeline in enumerate(pipelines):
            if number in going_on:
                replica, loop = going_on[number]
                self._adopt(number, replica.scheduler, handover, others)
                replica.wake()
            else:
                scheduler = Scheduler(self._make_limits(pipeline.depth), handover.allocators[number])
                self._adopt(number, scheduler, handover, others)
                replica = self._make_replica(scheduler, pipeline)
                loop = asyncio.create_task(self._watch(replica))
            replicas.append(replica)
            loops.append(loop)
        for replica in set(self.replicas).difference(replicas):
            self._work_before += replica.scheduler.work
        self.parked, self.replicas, self._loops = [], tuple(replicas), loops
        for _, sequence in sorted(others.items()):
            _forget_kv(sequence)
            self.add(sequence)

    def _adopt(
        self, number: int, scheduler: Scheduler, handover: Handover, others: dict[int, ScheduledSequence]
    ) -> None:
        """Gives a scheduler what was handed over to its replica; takes that out of ``others``."""
        for sequence in handover.adopted.get(number, ()):
            if others.pop(sequence.key, None) is None:
                scheduler.reserved.pop(sequence.key, None)
                scheduler.pages.release(handover.pages[sequence.key])
            else:
                sequence.ground()
                sequence.pages = handover.pages[sequence.key]
                sequence.fall_back(handover.progress[sequence.key])
                scheduler.adopt(sequence)

    def rest(self) -> None:
        """Nothing goes on: what was in flight never comes back. The replicas must be stopped."""
        for replica in self.replicas:
            replica.scheduler.ground()

    def recall(self, schedulers: Sequence[Scheduler]) -> None:
        """Takes up stopped replicas with what they have: those of a mesh that another controller had."""
        assert not self.replicas, "there are replicas already"
        replicas = [self._make_replica(scheduler, StoppedPipeline(scheduler.limits.depth)) for scheduler in schedulers]
        for replica in replicas:
            replica.stop()
        self.replicas = tuple(replicas)
        self._loops = [asyncio.create_task(self._watch(replica)) for replica in replicas]
        taken = {sequence.key for replica in replicas for sequence in replica.scheduler.sequences()}
        self.parked = [sequence for sequence in self.parked if sequence.key not in taken]

    def check(self) -> None:
        """Verifies that page accounting balances on every replica."""
        for replica in self.replicas:
            replica.scheduler.check()

    def _all(self, carried: Collection[int] = ()) -> Iterator[ScheduledSequence]:
        """Every sequence but those of replicas that are carried over."""
        yield from self.parked
        for number, replica in enumerate(self.replicas):
            if number not in carried:
                yield from replica.scheduler.sequences()

    def _positions(self, sequence: ScheduledSequence, replica: Replica, survivors: Mapping[int, int] | None) -> int:
        """Positions whose KV is worth keeping, without a page that would have to be completed and that others share."""
        if survivors is None:
            return 0 if replica.lost else sequence.computed
        positions = min(sequence.computed, survivors.get(sequence.key, 0))
        full, partial = divmod(positions, self._page_size)
        shared = partial and replica.scheduler.pages.references(sequence.pages[full]) > 1
        return full * self._page_size if shared else positions

    def _with_kv(self) -> dict[int, list[ScheduledSequence]]:
        return {
            number: [s for s in replica.scheduler.running.values() if s.computed and not replica.lost]
            for number, replica in enumerate(self.replicas)
        }

    async def _watch(self, replica: Replica) -> None:
        try:
            await replica.run()
        except Exception as problem:
            self._failed(problem)


def _forget_kv(sequence: ScheduledSequence) -> None:
    """Nothing of it is on any device any more."""
    sequence.ground()
    sequence.fall_back()
    sequence.pages, sequence.cached = [], 0
