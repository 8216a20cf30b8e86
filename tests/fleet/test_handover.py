"""At a switch every sequence has exactly one place, and its KV exactly the pages that it is brought to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pure_model import PurePipeline

from spotjax.engine.pages import PageAllocator
from spotjax.engine.replica import Replica
from spotjax.engine.request import FinishReason, RequestState, SamplingParams
from spotjax.engine.scheduler import Limits, Scheduler
from spotjax.engine.sequence import Sequence
from spotjax.fleet.dispatch import Dispatcher
from spotjax.fleet.handover import Handover, hand_over, live_sequence
from spotjax.planner.cohorts import assign_cohorts, choose_heirs
from spotjax.planner.kv_cohorts import KvCohort, LiveSequence

PAGE_SIZE = 4


def sequence(key: int, prompt: int = 3, output: int = 0) -> Sequence:
    sampling = SamplingParams(max_tokens=50)
    return Sequence(key, RequestState(f"r{key}", 0, (1,) * prompt, sampling, tokens=(2,) * output))


@dataclass
class OldMesh:
    """Stopped replicas, as a handover finds them."""

    replicas: list[list[Sequence]]
    waiting: list[Sequence]
    pages: int
    allocators: list[PageAllocator]

    @property
    def sequences(self) -> list[Sequence]:
        return [*self.waiting, *(one for replica in self.replicas for one in replica)]

    @property
    def live(self) -> dict[int, list[LiveSequence]]:
        return {
            number: [live_sequence(s, s.computed, self.allocators[number]) for s in replica if s.computed]
            for number, replica in enumerate(self.replicas)
        }


@st.composite
def old_meshes(draw: st.DrawFn) -> OldMesh:
    random = Random(draw(st.integers(0, 2**32)))
    pages = draw(st.integers(8, 24))
    keys = iter(random.sample(range(100), 60))
    replicas, old_allocators = [], []
    for _ in range(draw(st.integers(1, 3))):
        allocator, running = PageAllocator(pages, PAGE_SIZE), []
        for _ in range(random.randint(0, 12)):
            one = sequence(next(keys), random.randint(1, 12), random.randint(0, 6))
            one.computed = random.randint(0, one.state.length - 1)
            spared = one.computed and random.random() < 0.5  # its next position may still lack a page
            like = random.choice(running) if running and random.random() < 0.6 else one
            shared = like.pages[: random.randint(0, min(like.computed, one.computed) // PAGE_SIZE)]
            more = allocator.needed(one.computed if spared else one.state.length) - len(shared)
            if more > allocator.free:
                break
            allocator.share(shared)
            one.pages = shared + allocator.allocate(more)
            running.append(one)
        replicas.append(running)
        old_allocators.append(allocator)
    waiting = [sequence(next(keys)) for _ in range(random.randint(0, 3))]
    return OldMesh(replicas, waiting, pages, old_allocators)


@given(old_meshes(), st.integers(1, 3), st.randoms(use_true_random=False))
def test_every_sequence_has_one_place_and_pages_balance(old: OldMesh, replicas: int, random: Random) -> None:
    heirs = choose_heirs(old.live, replicas)
    cohorts = assign_cohorts(old.live, replicas, old.pages - 1, PAGE_SIZE, heirs).cohorts
    cohorts = tuple(cohort for cohort in cohorts if random.random() < 0.8)  # others lost their KV
    handover = hand_over(old.sequences, cohorts, heirs, allocators(old.pages, replicas))

    adopted = [one for sequences in handover.adopted.values() for one in sequences]
    assert sorted(s.key for s in [*adopted, *handover.recomputed]) == sorted(s.key for s in old.sequences)
    assert [s.key for s in handover.recomputed] == sorted(s.key for s in handover.recomputed)
    assert handover.pages.keys() == {s.key for s in adopted}
    for number, allocator in enumerate(handover.allocators):
        allocator.check(handover.pages[s.key] for s in handover.adopted.get(number, ()))
    for one in adopted:
        assert len(handover.pages[one.key]) == allocator.needed(one.state.length), "room for the next position"
    for number, sequences in handover.adopted.items():
        for one in sequences:
            for page in handover.pages[one.key][one.computed // PAGE_SIZE :]:
                assert handover.allocators[number].references(page) == 1, "a page that is still written is shared"
    check_pages(old, handover, heirs, cohorts)


def check_pages(old: OldMesh, handover: Handover, heirs: dict[int, int], cohorts: tuple[KvCohort, ...]) -> None:
    """Inherited pages keep their numbers, all others are brought to where they belong, and nothing else moves."""
    homes = {one.key: number for number, replica in enumerate(old.replicas) for one in replica}
    expected: dict[tuple[int, int], set[tuple[int, int]]] = {(cohort.old, cohort.new): set() for cohort in cohorts}
    for new, adopted in handover.adopted.items():
        for one in adopted:
            filled = -(-one.computed // PAGE_SIZE)
            pairs = list(zip(one.pages[:filled], handover.pages[one.key][:filled], strict=True))
            if heirs.get(homes[one.key]) == new:
                assert all(before == after for before, after in pairs), "inherited pages stay"
            expected[homes[one.key], new] |= set(pairs)
    assert {(t.old, t.new): set(t.pages) for t in handover.transfers} == expected
    owners = {one.key: one for one in old.sequences}
    for transfer in handover.transfers:
        for side in zip(*transfer.pages, strict=True):
            assert len(side) == len(set(side)), "a page goes to two places, or two to one"
        for (before, after), (key, number) in zip(transfer.pages, transfer.owners, strict=True):
            assert (owners[key].pages[number], handover.pages[key][number]) == (before, after), "it is not its owner's"


@given(old_meshes(), st.integers(1, 3))
def test_where_a_replica_goes_on_all_its_kv_finds_room(old: OldMesh, replicas: int) -> None:
    """However many sequences share a page: else pages would be written over that others are still to be read from."""
    live, heirs = old.live, choose_heirs(old.live, replicas)
    cohorts = assign_cohorts(live, replicas, old.pages - 1, PAGE_SIZE, heirs).cohorts
    kept = {(cohort.old, cohort.new): {one.key for one in cohort.sequences} for cohort in cohorts}
    for number, new in heirs.items():
        assert kept.get((number, new), set()) == {one.key for one in live[number]}


def allocators(pages: int, replicas: int) -> tuple[PageAllocator, ...]:
    return tuple(PageAllocator(pages, PAGE_SIZE) for _ in range(replicas))


def test_without_room_for_its_next_position_a_sequence_is_recomputed_and_its_pages_are_free() -> None:
    full, short = sequence(0, prompt=8), sequence(1, prompt=5)
    full.pages, full.computed = [1, 2], 7
    short.pages, short.computed = [1], 4
    cohorts = (
        KvCohort(0, 0, (LiveSequence(0, 2, 7),), PAGE_SIZE),
        KvCohort(1, 0, (LiveSequence(1, 1, 4),), PAGE_SIZE),
    )
    handover = hand_over([full, short], cohorts, {0: 0}, allocators(4, 1))
    assert handover.adopted == {0: (full,)} and handover.recomputed == (short,)
    assert [transfer.pages for transfer in handover.transfers] == [((1, 1), (2, 2)), ()]
    assert handover.allocators[0].free == 1


# --- dispatch -------------------------------------------------------------------------------------------------------


class Idle(PurePipeline):
    """A pipeline that is never asked to run."""


def make_dispatcher(pages: int = 10, *, caching: bool = False) -> Dispatcher:
    def make_replica(scheduler: Scheduler, pipeline: PurePipeline) -> Replica:
        return Replica(scheduler, pipeline, None, None, print)  # type: ignore[arg-type]  # nothing runs

    def fail(problem: BaseException) -> None:
        raise problem

    limits: Callable[[int], Limits] = lambda depth: Limits(4, 8, depth, lambda lengths: True)  # noqa: E731
    return Dispatcher(make_replica, limits, pages, PAGE_SIZE, fail, caching=caching)  # type: ignore[arg-type]


def install(dispatcher: Dispatcher, replicas: int) -> None:
    """An empty mesh of so many replicas, whose loops have not begun to run."""
    dispatcher.install([Idle(PAGE_SIZE) for _ in range(replicas)], dispatcher.hand_over(replicas, (), {}))


async def stop(dispatcher: Dispatcher) -> None:
    for replica in dispatcher.replicas:
        replica.stop()
    await dispatcher.stop()


async def test_sequences_are_parked_until_a_replica_exists_and_shared_out_in_order() -> None:
    dispatcher = make_dispatcher()
    for key in (3, 1, 2):
        dispatcher.add(sequence(key))
    assert [one.key for one in dispatcher.parked] == [3, 1, 2] and dispatcher.waiting == 3
    install(dispatcher, 2)
    assert not dispatcher.parked
    assert [[one.key for one in r.scheduler.waiting] for r in dispatcher.replicas] == [[1, 3], [2]]
    await stop(dispatcher)


async def test_a_new_sequence_goes_to_the_replica_with_the_least_load_that_is_not_stopping() -> None:
    dispatcher = make_dispatcher()
    install(dispatcher, 3)
    for key in range(4):
        dispatcher.add(sequence(key))
    dispatcher.replicas[1].stop()
    dispatcher.add(sequence(4))
    assert [[one.key for one in r.scheduler.waiting] for r in dispatcher.replicas] == [[0, 3], [1], [2, 4]]
    await stop(dispatcher)
    dispatcher.add(sequence(5))
    assert [one.key for one in dispatcher.parked] == [5], "all are stopping"


async def test_at_rest_sequences_stay_where_they_are_and_nothing_of_them_is_under_way() -> None:
    dispatcher = make_dispatcher()
    install(dispatcher, 2)
    for key in range(4):
        dispatcher.add(sequence(key, output=key))
    for replica in dispatcher.replicas:
        assert replica.scheduler.schedule() is not None
    await stop(dispatcher)
    dispatcher.rest()
    dispatcher.add(sequence(4))
    assert [one.key for one in dispatcher.parked] == [4] and dispatcher.sequences == 5
    resting = [one for replica in dispatcher.replicas for one in replica.scheduler.sequences()]
    assert sorted((one.key, len(one.state.tokens)) for one in resting) == [(n, n) for n in range(4)]
    assert not any(one.in_flight for one in resting)
    install(dispatcher, 1)
    assert [one.key for one in dispatcher.replicas[0].scheduler.waiting] == [0, 1, 2, 3, 4]
    dispatcher.check()
    await stop(dispatcher)


async def test_replicas_of_an_earlier_controller_are_as_if_this_one_had_stopped_them() -> None:
    dispatcher = make_dispatcher()
    waiting, kept, ending = (sequence(key, prompt=6) for key in range(3))
    dispatcher.parked = [waiting, kept, ending]
    scheduler = Scheduler(Limits(4, 8, 2, lambda lengths: True), PageAllocator(10, PAGE_SIZE))
    for one in (kept, ending):
        one.pages, one.computed = scheduler.pages.allocate(2), 5
        scheduler.adopt(one)
    empty = Scheduler(Limits(4, 8, 2, lambda lengths: True), PageAllocator(10, PAGE_SIZE))
    dispatcher.recall([scheduler, empty])
    assert dispatcher.parked == [waiting] and dispatcher.sequences == 3
    assert dispatcher.live() == {0: [LiveSequence(1, 2, 5), LiveSequence(2, 2, 5)], 1: []}
    assert dispatcher.computed([0, 1]) == {0: {1: 5, 2: 5}, 1: {}} and dispatcher.running() == frozenset()
    dispatcher.add(late := sequence(3))
    assert dispatcher.parked == [waiting, late], "they have stopped"
    assert dispatcher.cancel(ending, FinishReason.CANCELLED)
    live = dispatcher.live()
    heirs = choose_heirs(live, 1)
    handover = dispatcher.hand_over(1, assign_cohorts(live, 1, 9, PAGE_SIZE, heirs).cohorts, heirs)
    dispatcher.install([Idle(PAGE_SIZE)], handover)
    (replica,) = dispatcher.replicas
    assert list(replica.scheduler.running.values()) == [kept] and kept.computed == 5
    assert list(replica.scheduler.waiting) == [waiting, late]
    dispatcher.check()
    await stop(dispatcher)


async def test_what_is_cancelled_or_arrives_during_a_switch_is_not_revived_or_lost() -> None:
    dispatcher = make_dispatcher()
    install(dispatcher, 1)
    kept, ended = sequence(0, prompt=6), sequence(1, prompt=6)
    for one in (kept, ended):
        one.pages, one.computed = dispatcher.replicas[0].scheduler.pages.allocate(2), 5
        dispatcher.replicas[0].scheduler.adopt(one)
    await stop(dispatcher)
    live = dispatcher.live()
    heirs = choose_heirs(live, 1)
    cohorts = assign_cohorts(live, 1, 9, PAGE_SIZE, heirs).cohorts
    handover = dispatcher.hand_over(1, cohorts, heirs)
    assert dispatcher.cancel(ended, FinishReason.CANCELLED)
    late = sequence(2)
    dispatcher.add(late)
    dispatcher.install([Idle(PAGE_SIZE)], handover)
    scheduler = dispatcher.replicas[0].scheduler
    assert list(scheduler.running.values()) == [kept] and list(scheduler.waiting) == [late]
    assert scheduler.pages.free == scheduler.pages.total - 2
    dispatcher.check()
    await stop(dispatcher)


async def test_what_was_cancelled_in_a_step_that_was_lost_ends_at_the_stop() -> None:
    dispatcher = make_dispatcher()
    install(dispatcher, 1)
    one = sequence(0)
    dispatcher.add(one)
    assert dispatcher.replicas[0].scheduler.schedule() is not None
    dispatcher.replicas[0].lost = True
    assert not dispatcher.cancel(one, FinishReason.DEADLINE)
    await stop(dispatcher)
    assert [state.finish for state in dispatcher.take_cancelled()] == [FinishReason.DEADLINE]
    assert one.state.finish is FinishReason.DEADLINE and dispatcher.waiting == 0
    assert dispatcher.live() == {0: []}
    dispatcher.check()


async def test_cancelling_a_parked_sequence_ends_it() -> None:
    dispatcher, one = make_dispatcher(), sequence(0)
    dispatcher.add(one)
    assert dispatcher.cancel(one, FinishReason.CANCELLED)
    assert one.state.finish is FinishReason.CANCELLED and not dispatcher.parked


async def test_a_sequence_that_is_nowhere_cannot_be_cancelled() -> None:
    with pytest.raises(LookupError, match="sequence 7 is neither parked nor on a replica"):
        make_dispatcher().cancel(sequence(7), FinishReason.CANCELLED)


async def test_a_page_that_is_to_be_completed_again_is_not_taken_along_where_others_share_it() -> None:
    dispatcher = make_dispatcher()
    install(dispatcher, 1)
    scheduler = dispatcher.replicas[0].scheduler
    first, second = sequence(0, prompt=10), sequence(1, prompt=10)
    first.pages, first.computed = scheduler.pages.allocate(3), 9
    scheduler.pages.share(first.pages[:2])
    second.pages, second.computed = [*first.pages[:2], *scheduler.pages.allocate(1)], 9
    for one in (first, second):
        scheduler.adopt(one)
    shared = tuple(first.pages[:2])
    dispatcher.replicas[0].lost = True
    live = dispatcher.live({0: {0: 6, 1: 9}})
    assert live == {0: [LiveSequence(0, 1, 4, shared[:1]), LiveSequence(1, 3, 9, shared)]}
    heirs = choose_heirs(live, 1)
    handover = dispatcher.hand_over(1, assign_cohorts(live, 1, 9, PAGE_SIZE, heirs).cohorts, heirs)
    assert handover.pages[0][0] == handover.pages[1][0] and not set(handover.pages[0][1:]) & set(handover.pages[1])
    for replica in dispatcher.replicas:
        replica.scheduler.running.clear()
    await stop(dispatcher)


async def test_of_replicas_with_close_loads_the_one_that_has_the_prefix_gets_a_sequence() -> None:
    dispatcher = make_dispatcher(caching=True)
    install(dispatcher, 2)
    before = sequence(0, prompt=9)
    before.pages, before.computed = dispatcher.replicas[1].scheduler.pages.allocate(3), 9
    dispatcher.replicas[1].scheduler.adopt(before)
    for key in range(1, 5):
        dispatcher.add(sequence(key, prompt=9))
    waiting = [[one.key for one in replica.scheduler.waiting] for replica in dispatcher.replicas]
    assert waiting == [[3], [1, 2, 4]], "until the other has nothing to do for too long"
    dispatcher.replicas[1].scheduler.running.clear()
    await stop(dispatcher)


async def test_kv_of_a_replica_that_lost_an_instance_is_worth_nothing() -> None:
    dispatcher = make_dispatcher()
    install(dispatcher, 2)
    for number, replica in enumerate(dispatcher.replicas):
        one = sequence(number, prompt=6)
        one.pages, one.computed = replica.scheduler.pages.allocate(2), 5
        replica.scheduler.adopt(one)
    dispatcher.replicas[0].lost = True
    assert dispatcher.live() == {0: [], 1: [LiveSequence(1, 2, 5)]}
    for replica in dispatcher.replicas:
        replica.scheduler.running.clear()
    await stop(dispatcher)
