"""What stages say of their KV becomes stopped replicas whose sequences have exactly the KV that is there."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from random import Random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from pure_model import Letters, next_token

from spotjax.engine.batch import Batch
from spotjax.engine.pages import PageAllocator
from spotjax.engine.request import RequestState, SamplingParams
from spotjax.engine.scheduler import Limits, Scheduler
from spotjax.engine.sequence import Sequence
from spotjax.engine.text import advance
from spotjax.fleet.recovery import certain, common_remains, recalled
from spotjax.meshes.instance import DeviceRef
from spotjax.meshes.placement import Placement
from spotjax.meshes.shape import MeshShape
from spotjax.reshard.transfer import Remains
from spotjax.worker.ledger import StageLedger

PAGE_SIZE, PAGES = 2, 9
LETTERS = Letters()


def limits(depth: int) -> Limits:
    return Limits(4, 3, depth, lambda lengths: len(lengths) <= 2)


def state(key: int, prompt: int = 3, output: int = 0, *, alike: bool = False) -> RequestState:
    sampling = SamplingParams(max_tokens=8, seed=key, ignore_eos=True)
    first = 100 if alike else key
    one = RequestState(f"r{key}", 0, tuple(range(first, first + prompt)), sampling)
    for _ in range(output):
        one = advance(one, next_token((*one.prompt, *one.tokens), one), LETTERS)
    return one


def mesh(data: int, stages: int) -> Placement:
    shape = MeshShape(data, stages, 1)
    devices = {at: DeviceRef(f"{at.data}.{at.stage}", 0) for at in shape.positions()}
    return Placement(4, shape, tuple((n, n + 1) for n in range(stages)), devices)


def sequences(*states: RequestState) -> dict[int, Sequence]:
    return {int(one.request_id[1:]): Sequence(int(one.request_id[1:]), one) for one in states}


def recall(
    remains: Remains, waiting: dict[int, Sequence], pages: int = PAGES, *, caching: bool = False
) -> list[Scheduler]:
    schedulers = recalled(remains, waiting, limits, pages, PAGE_SIZE, caching=caching)
    for scheduler in schedulers:
        scheduler.check()
        assert not scheduler.waiting and not any(one.in_flight for one in scheduler.sequences())
    keys = [key for scheduler in schedulers for key in scheduler.running]
    assert len(set(keys)) == len(keys), "a sequence is in two places"
    assert all(waiting[key].computed <= certain(waiting[key].state) for key in keys)
    assert all((one.pages, one.computed) == ([], 0) for key, one in waiting.items() if key not in keys)
    return schedulers


# --- what stages have in common ---------------------------------------------------------------------------------------


def test_of_a_sequence_counts_what_every_stage_has() -> None:
    stages = {
        (0, 0): [(1, (5, 3, 8), 5), (2, (7,), 2), (3, (9,), 1)],
        (0, 1): [(1, (5, 3), 4), (2, (7,), 2)],
        (1, 0): [(1, (4,), 2)],
    }
    assert common_remains(stages) == {0: {1: ((5, 3), 4), 2: ((7,), 2)}, 1: {1: ((4,), 2)}}


def test_a_sequence_whose_pages_stages_do_not_agree_on_is_left_out() -> None:
    stages = {(0, 0): [(1, (5, 8), 4), (2, (6,), 2)], (0, 1): [(1, (5, 3, 8), 5), (2, (6,), 1)], (2, 3): []}
    assert common_remains(stages) == {0: {2: ((6,), 1)}, 2: {}}
    assert common_remains({}) == {}


# --- stopped replicas -------------------------------------------------------------------------------------------------


def test_sequences_are_where_they_were_with_what_is_certain_of_them() -> None:
    waiting = sequences(state(1, 4, 2), state(2, 3), state(3, 1), state(4, 5))
    kept = {0: {1: ((5, 3, 8), 6), 3: ((2,), 1), 9: ((6,), 2)}, 1: {2: ((5,), 1), 1: ((1,), 2)}}
    (first, second) = recall(Remains(mesh(2, 1), frozenset({"0.0", "1.0"}), kept), waiting)
    assert first.running == {1: waiting[1]} and second.running == {2: waiting[2]}, "3 has no certain position"
    assert (waiting[1].pages, waiting[1].computed) == ([5, 3, 8], 5)
    assert (waiting[2].pages, waiting[2].computed) == ([5], 1)
    assert first.pages.free == PAGES - 1 - 3


def test_pages_that_are_said_to_be_of_two_or_do_not_exist_are_nobodys() -> None:
    waiting = sequences(*(state(key, 4) for key in range(1, 6)))
    kept = {0: {1: ((5, 3), 3), 2: ((3, 4), 3), 3: ((PAGES,), 2), 4: ((0,), 2), 5: ((6, 6), 3)}}
    (scheduler,) = recall(Remains(mesh(1, 1), frozenset({"0.0"}), kept), waiting)
    assert scheduler.running.keys() == {1}


def test_pages_that_are_not_enough_for_the_positions_bound_them() -> None:
    waiting = sequences(state(1, 8))
    recall(Remains(mesh(1, 1), frozenset({"0.0"}), {0: {1: ((5, 3), 7)}}), waiting)
    assert (waiting[1].pages, waiting[1].computed) == ([5, 3], 4)


def test_where_nobody_is_left_there_may_be_copies_of_what_no_other_has() -> None:
    waiting = sequences(state(1, 4), state(2, 3), state(3, 1), state(4, 9))
    remains = Remains(mesh(3, 2), frozenset({"1.0"}), {1: {1: ((5, 3), 3)}})
    first, second, third = recall(remains, waiting)
    assert second.running == {1: waiting[1]} and not third.running
    assert first.running == {2: waiting[2], 4: waiting[4]}, "nothing of 3 can be copied"
    assert (waiting[2].computed, waiting[4].computed) == (2, 8)


def test_copies_are_not_hoped_for_beyond_the_pages_of_one_replica() -> None:
    waiting = sequences(state(1, 9), state(2, 9), state(3, 4))
    (scheduler,) = recall(Remains(mesh(1, 2), frozenset(), {}), waiting, pages=8)
    assert scheduler.running.keys() == {1, 3} and scheduler.pages.free == 7 - 4 - 2


def test_a_replica_of_which_somebody_is_left_is_not_one_for_copies() -> None:
    waiting = sequences(state(1, 4))
    (scheduler,) = recall(Remains(mesh(1, 2), frozenset({"0.1"}), {0: {}}), waiting)
    assert not scheduler.running


@dataclass
class Stage:
    """One stage of a replica: hears of steps in order, though not always of the last ones."""

    ledger: StageLedger = field(default_factory=lambda: StageLedger(None, PAGE_SIZE))  # type: ignore[arg-type]
    content: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)
    """(page, slot) to the tokens up to the position whose KV it has: that is what KV depends on."""
    heard: int = 0

    def run(self, batch: Batch) -> None:
        keys = [span.sequence for span in batch.spans]
        rows, pages = np.zeros((len(keys), 3), np.int32), np.zeros((len(keys), PAGES), np.int32)
        for row, span in enumerate(batch.spans):
            rows[row, :2] = span.start, len(span.tokens)
            pages[row, : len(span.pages)] = span.pages
        self.ledger.begin(keys, rows, pages)
        for span in batch.spans:
            own = (*span.state.prompt, *span.state.tokens)
            for position in range(span.start, span.start + len(span.tokens)):
                self.content[span.pages[position // PAGE_SIZE], position % PAGE_SIZE] = own[: position + 1]
        self.ledger.written(keys, rows)
        self.heard += 1


class Replica:
    """A replica whose controller may die between any two of its steps' ways."""

    def __init__(self, stages: int, *, caching: bool) -> None:
        self.scheduler = Scheduler(limits(stages), PageAllocator(PAGES, PAGE_SIZE, caching=caching))
        self.stages = [Stage() for _ in range(stages)]
        self.steps: list[Batch] = []

    def run(self, random: Random) -> None:
        """Schedules a step, or has one that all stages have run come back."""
        batch = self.scheduler.schedule() if random.random() < 0.7 else None
        if batch is not None:
            self.steps.append(batch)
        for before, stage in zip([None, *self.stages], self.stages, strict=False):
            reached = len(self.steps) if before is None else before.heard
            while stage.heard < reached and random.random() < 0.6:
                stage.run(self.steps[stage.heard])

    def come_back(self, done: int, states: dict[int, RequestState]) -> int:
        """Commits the steps that the last stage has run."""
        for batch in self.steps[done : self.stages[-1].heard]:
            for span in batch.spans:
                if span.samples:
                    own = span.state
                    states[span.sequence] = advance(own, next_token((*own.prompt, *own.tokens), own), LETTERS)
            self.scheduler.commit(batch, {s.sequence: states[s.sequence] for s in batch.spans if s.samples})
        return self.stages[-1].heard


@settings(max_examples=300, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    moments=st.integers(0, 40),
    lost=st.sets(st.tuples(st.integers(0, 1), st.integers(0, 2)), max_size=3),
    caching=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_whoever_goes_on_with_kv_has_its_own_on_every_stage_that_is_left(
    shape: tuple[int, int], moments: int, lost: set[tuple[int, int]], caching: bool, seed: int
) -> None:
    random, (data, depth) = Random(seed), shape
    replicas, done = [Replica(depth, caching=caching) for _ in range(data)], [0] * data
    states = {key: state(key, random.randint(1, 6), alike=caching and random.random() < 0.8) for key in range(6)}
    for key, one in states.items():
        replicas[key % data].scheduler.add(Sequence(key, one))
    for _ in range(moments):
        number = random.randrange(data)
        replicas[number].run(random)
        done[number] = replicas[number].come_back(done[number], states)
    recorded = {key: _cut(one, random) for key, one in states.items()}  # the log did not get to the rest
    waiting = {key: Sequence(key, one) for key, one in recorded.items() if one.finish is None}
    left = {(r, s): replica.stages[s] for r, replica in enumerate(replicas) for s in range(depth) if (r, s) not in lost}
    for stage in left.values():
        stage.ledger.keep({key: certain(one.state) for key, one in waiting.items()})
    kept = common_remains({place: stage.ledger.remains() for place, stage in left.items()})
    holders = frozenset(f"{replica}.{stage}" for replica, stage in left)
    schedulers = recall(Remains(mesh(data, depth), holders, kept), waiting, caching=caching)
    for (number, _), stage in left.items():
        for one in schedulers[number].running.values():
            own = (*one.state.prompt, *one.state.tokens)
            for position in range(one.computed):
                found = stage.content[one.pages[position // PAGE_SIZE], position % PAGE_SIZE]
                assert found == own[: position + 1]
    for number, replica in enumerate(replicas):
        idle = all(stage.heard == len(replica.steps) for stage in replica.stages)
        if idle and any(place[0] == number for place in left):
            last = {span.sequence: span for batch in replica.steps for span in batch.spans}
            for key, before in replica.scheduler.running.items():
                if caching and (replica.scheduler.preempted or key not in last or last[key].stop < before.computed):
                    continue  # it may have found what no stage has been told yet that it has
                expected = min(before.computed, certain(recorded[key])) if key in waiting else 0
                expected -= caching * (expected % PAGE_SIZE)  # of a page that others have in full no part is taken
                assert not expected or waiting[key].computed >= expected, "KV was there and is not used"


def _cut(one: RequestState, random: Random) -> RequestState:
    """The sequence as it was some tokens ago."""
    cut = random.choice([0, 0, 1, 2])
    if not cut:
        return one
    again = replace(one, tokens=(), text="", text_ends=(), pending="", decoded=0, finish=None)
    for _ in range(max(0, len(one.tokens) - cut)):
        again = advance(again, next_token((*again.prompt, *again.tokens), again), LETTERS)
    return again
