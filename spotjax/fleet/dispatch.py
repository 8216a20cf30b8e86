"""The replicas of the current placement and the sequences on them: who runs where, and how all change over at a switch.

Knows nothing of instances or plans.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence

from spotjax.engine.batch import Pipeline
from spotjax.engine.pages import PageAllocator
from spotjax.engine.replica import Replica
from spotjax.engine.request import FinishReason, RequestState
from spotjax.engine.scheduler import Limits, Scheduler
from spotjax.engine.scheduler import Sequence as ScheduledSequence
from spotjax.fleet.handover import Handover, hand_over
from spotjax.planner.holdings import KvCohort, LiveSequence

MakeReplica = Callable[[Scheduler, Pipeline], Replica]
MakeLimits = Callable[[int], Limits]
"""Limits of a replica whose pipeline is that deep."""


class Dispatcher:
    """Gives sequences to replicas and keeps them while there are none.

    Args:
      make_replica: builds the loop of one replica.
      make_limits: what a replica can do at once.
      pages, page_size: KV pages of one replica, page 0 included.
      failed: told about an error that a replica cannot go on from.
    """

    def __init__(
        self,
        make_replica: MakeReplica,
        make_limits: MakeLimits,
        pages: int,
        page_size: int,
        failed: Callable[[BaseException], None],
    ) -> None:
        self.replicas: tuple[Replica, ...] = ()
        self.parked: list[ScheduledSequence] = []
        """Sequences that wait for a replica to exist, oldest first."""
        self._make_replica, self._make_limits = make_replica, make_limits
        self._pages, self._page_size, self._failed = pages, page_size, failed
        self._loops: list[asyncio.Task[None]] = []

    @property
    def waiting(self) -> int:
        """Sequences that no step has taken up yet."""
        return len(self.parked) + sum(len(replica.scheduler.waiting) for replica in self.replicas)

    def add(self, sequence: ScheduledSequence) -> None:
        """Queues a sequence on the replica with the least load."""
        replicas = [replica for replica in self.replicas if not replica.stopping]
        if not replicas:
            self.parked.append(sequence)
            return
        replica = min(replicas, key=lambda candidate: candidate.scheduler.load)
        replica.scheduler.add(sequence)
        replica.wake()

    def cancel(self, sequence: ScheduledSequence, reason: FinishReason) -> bool:
        """Ends a sequence; True if it ended now, False if at the next token boundary."""
        if sequence in self.parked:
            self.parked.remove(sequence)
            sequence.state = sequence.state.finished(reason)
            return True
        for replica in self.replicas:
            if any(sequence is other for other in replica.scheduler.sequences()):
                ended = replica.scheduler.cancel(sequence, reason)
                replica.wake()  # its pages may let others in
                return ended
        raise LookupError(f"sequence {sequence.key} is neither parked nor on a replica")

    async def stop(self) -> None:
        """Stops all replicas at their next token boundary."""
        for replica in self.replicas:
            replica.stop()
        await asyncio.gather(*self._loops, return_exceptions=True)

    def live(self) -> dict[int, list[LiveSequence]]:
        """What has KV worth keeping on every replica that lost no instance; the others have nothing."""
        return {
            number: [
                LiveSequence(s.key, -(-s.computed // self._page_size), s.computed)
                for s in replica.scheduler.running.values()
                if s.computed and not replica.lost
            ]
            for number, replica in enumerate(self.replicas)
        }

    def hand_over(self, replicas: int, cohorts: Sequence[KvCohort], heirs: Mapping[int, int]) -> Handover:
        """Works out where every sequence of the stopped replicas goes; see ``handover.hand_over``."""
        allocators = tuple(PageAllocator(self._pages, self._page_size) for _ in range(replicas))
        return hand_over(self._all(), cohorts, heirs, allocators)

    def take_cancelled(self) -> list[RequestState]:
        """Removes the sequences that were to end at the token boundary that a lost instance never reached."""
        ended = []
        for replica in self.replicas:
            for sequence in list(replica.scheduler.running.values()):
                if sequence.cancelled is not None:
                    sequence.in_flight = False
                    replica.scheduler.cancel(sequence, sequence.cancelled)
                    ended.append(sequence.state)
        return ended

    def install(self, pipelines: Sequence[Pipeline], handover: Handover) -> None:
        """Starts the new replicas with what was handed over, less what was cancelled and with what came meanwhile."""
        others = {sequence.key: sequence for sequence in self._all()}
        replicas = []
        for number, pipeline in enumerate(pipelines):
            pages = handover.allocators[number]
            scheduler = Scheduler(self._make_limits(pipeline.depth), pages)
            for sequence in handover.adopted.get(number, ()):
                if others.pop(sequence.key, None) is None:
                    pages.release(handover.pages[sequence.key])
                else:
                    sequence.pages = handover.pages[sequence.key]
                    scheduler.adopt(sequence)
            replicas.append(self._make_replica(scheduler, pipeline))
        self.parked, self.replicas = [], tuple(replicas)
        self._loops = [asyncio.create_task(self._watch(replica)) for replica in replicas]
        for _, sequence in sorted(others.items()):
            _forget_kv(sequence)
            self.add(sequence)

    def park(self) -> None:
        """Gives up the replicas without new ones; their sequences wait with their tokens. They must be stopped."""
        self.parked = sorted(self._all(), key=lambda s: s.key)
        self.replicas, self._loops = (), []
        for sequence in self.parked:
            _forget_kv(sequence)

    def check(self) -> None:
        """Verifies that page accounting balances on every replica."""
        for replica in self.replicas:
            replica.scheduler.check()

    def _all(self) -> Iterator[ScheduledSequence]:
        yield from self.parked
        for replica in self.replicas:
            yield from replica.scheduler.sequences()

    async def _watch(self, replica: Replica) -> None:
        try:
            await replica.run()
        except Exception as problem:
            self._failed(problem)


def _forget_kv(sequence: ScheduledSequence) -> None:
    """Nothing of it is on any device any more."""
    sequence.pages, sequence.computed, sequence.in_flight = [], 0, False
