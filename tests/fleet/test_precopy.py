"""Rounds of copying leave out what is there, and count nothing as copied that may be somebody else's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

from fleet_cases import PureCluster
from pure_model import PurePipeline

from spotjax.engine.replica import Replica
from spotjax.engine.request import RequestState, SamplingParams
from spotjax.engine.scheduler import Limits
from spotjax.engine.sequence import Sequence as ScheduledSequence
from spotjax.fleet.dispatch import Dispatcher
from spotjax.fleet.precopy import Precopy
from spotjax.reshard.transfer import PageTransfer, Traffic

HEIRS = {0: 0}


class Copier(PureCluster):
    """Notes what is copied; something can happen meanwhile."""

    def __init__(self) -> None:
        super().__init__(Random(0))
        self.rounds: list[list[int]] = []
        self.meanwhile: Callable[[], object] = lambda: None

    async def copy_pages(self, transfers: Sequence[PageTransfer]) -> Traffic:
        pages = [old for transfer in transfers for old, _ in transfer.pages]
        self.rounds.append(pages)
        self.meanwhile()
        return Traffic(moved=len(pages))


def running(key: int, pages: list[int], positions: int) -> ScheduledSequence:
    state = RequestState(f"r{key}", 0, tuple(range(positions)), SamplingParams())
    return ScheduledSequence(key, state, pages=pages, computed=positions)


async def one_replica(*sequences: ScheduledSequence) -> tuple[Dispatcher, Copier, Precopy]:
    """A replica that runs these, with four positions per page, and never steps."""

    def make(scheduler, pipeline):  # type: ignore[no-untyped-def]
        return Replica(scheduler, pipeline, None, None, print)  # type: ignore[arg-type]  # nothing runs

    limits = Limits(8, 8, 1, lambda lengths: True)
    dispatcher, cluster = Dispatcher(make, lambda depth: limits, 20, 4, print), Copier()
    dispatcher.install([PurePipeline(4)], dispatcher.hand_over(1, [], {}))
    for sequence in sequences:
        dispatcher.replicas[0].scheduler.pages.claim(sequence.pages)
        dispatcher.replicas[0].scheduler.adopt(sequence)
    return dispatcher, cluster, Precopy(dispatcher, cluster)


async def test_the_second_round_copies_only_what_was_filled_since() -> None:
    sequence = running(0, [1, 2, 3], 9)
    dispatcher, cluster, precopy = await one_replica(sequence)
    await precopy.round(HEIRS)
    assert (await precopy.round(HEIRS)).moved == 0
    sequence.computed = 12
    await precopy.round(HEIRS)
    assert cluster.rounds == [[1, 2], [3]] and precopy.bytes_moved == 3
    assert precopy.copied == {(0, 1), (0, 2), (0, 3)}
    await dispatcher.stop()


async def test_a_page_that_sequences_share_is_copied_once() -> None:
    first, second = running(0, [1, 2], 8), running(1, [1, 3], 8)
    dispatcher, cluster, precopy = await one_replica(first)
    pages = dispatcher.replicas[0].scheduler.pages
    pages.share([1])
    pages.claim([3])
    dispatcher.replicas[0].scheduler.adopt(second)
    await precopy.round(HEIRS)
    assert cluster.rounds == [[1, 2, 3]]
    await dispatcher.stop()


async def test_a_page_that_another_has_filled_since_is_copied_again() -> None:
    first, second = running(0, [1], 4), running(1, [2], 4)
    dispatcher, cluster, precopy = await one_replica(first, second)
    await precopy.round(HEIRS)
    pass_on(dispatcher, first, 1)
    assert precopy.copied == {(0, 2)}
    await precopy.round(HEIRS)
    assert precopy.copied == {(0, 1), (0, 2)} and cluster.rounds == [[1, 2], [1]]
    await dispatcher.stop()


async def test_a_page_that_was_given_away_while_it_was_copied_is_copied_again() -> None:
    first = running(0, [1], 4)
    dispatcher, cluster, precopy = await one_replica(first)
    cluster.meanwhile = lambda: pass_on(dispatcher, first, 1)
    await precopy.round(HEIRS)
    assert precopy.copied == frozenset()
    cluster.meanwhile = lambda: None
    await precopy.round(HEIRS)
    assert precopy.copied == {(0, 1)} and cluster.rounds == [[1], [1]]
    await dispatcher.stop()


async def test_a_page_that_has_been_given_away_since_it_was_copied_is_not_there() -> None:
    sequence = running(0, [1, 2], 8)
    dispatcher, _, precopy = await one_replica(sequence)
    await precopy.round(HEIRS)
    pass_on(dispatcher, sequence, 2)
    assert precopy.copied == {(0, 1)}
    await dispatcher.stop()


def pass_on(dispatcher: Dispatcher, sequence: ScheduledSequence, page: int) -> None:
    """A sequence loses a page, and another takes it, and the very page comes back to it full."""
    pages = dispatcher.replicas[0].scheduler.pages
    pages.release([page])
    pages.claim([page])
