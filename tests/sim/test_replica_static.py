"""Static batches, against a model that makes token after token, and the artifact's rule at the end of a mesh."""

from __future__ import annotations

from math import inf, isnan

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spotjax.planner.published_tables import TABLES
from spotjax.sim.events import EventQueue
from spotjax.sim.replica_static import CONSERVATIVE, GENEROUS, Parked, StaticReplica, StaticTimes
from spotjax.sim.requests import RequestBook
from spotjax.sim.workload import RequestTrace

TABLE, STAGES, TENSOR, BATCH = TABLES["gpt-20b"], 3, 4, 4
TIMES = StaticTimes(TABLE, STAGES, TENSOR, (1, 1), 1.0)
PROMPT, STEP = 37.562 * 15 * 3, 1.968 * 15 * 3
"""Milliseconds of one sequence by the table, communication and the final factor aside."""


class Bench:
    """One replica with a clock and a book, requests 0, 1 and so on of the same arrival as they are added."""

    def __init__(self, arrivals: list[float], output: int | list[int] = 128) -> None:
        self.queue, self.book = EventQueue(), RequestBook(RequestTrace.of("given", arrivals, 512, output))
        self.changes = 0
        self.ends: list[tuple[float, Parked | None, list[int]]] = []
        self.refused: list[int] = []
        self.replica = self.new()

    def new(self) -> StaticReplica:
        return StaticReplica(TIMES, BATCH, self.book, self.queue, self.changed)

    def changed(self) -> None:
        self.changes += 1

    def add(self, *requests: int) -> None:
        if self.replica.ended:
            self.refused += requests
        else:
            self.replica.add_all(requests)

    def stop_by(self, seconds: float, caution: float) -> None:
        self.replica.stop_by(seconds, caution, self.stopped)

    def stopped(self, parked: Parked | None, waiting: list[int]) -> None:
        self.ends.append((self.queue.now, parked, waiting))

    def run(self, until: float = 1e6) -> None:
        self.queue.run(until, (), lambda request: None)


class Slowly:
    """The same, as loops over tokens. Decides at batch boundaries, knows no events."""

    def __init__(self, adds: list[tuple[float, list[int]]], output: list[int], told: float, by: float, caution: float):
        self.finish: dict[int, float] = {}
        self.first: dict[int, float] = {}
        self.tokens = dict.fromkeys(range(len(output)), 0)
        self.batches: list[list[int]] = []
        self.end: tuple[float, list[int] | None, list[int]] | None = None
        coming, waiting, now = list(adds), list[int](), 0.0
        while self.end is None:
            while coming and coming[0][0] <= now:
                waiting += coming.pop(0)[1]
            until = by if now >= told else inf
            if until - now <= TIMES.prompt(1):
                self.end = now, None, waiting
            elif not waiting:
                following = min([at for at, _ in coming[:1]] + [told if now < told else by - TIMES.prompt(1)])
                if following == inf:
                    return
                if now >= told and following == by - TIMES.prompt(1):
                    self.end = following, None, []
                now = following
            else:
                now = self.batch(waiting, output, now, until, caution)
        at, _, left = self.end
        left += [request for when, requests in coming if when <= at for request in requests]
        self.refused = [request for when, requests in coming if when > at for request in requests]

    def batch(self, waiting: list[int], output: list[int], now: float, until: float, caution: float) -> float:
        size = 4 if len(waiting) >= 4 else 2 if len(waiting) >= 2 else 1
        batch, later = waiting[:size], waiting[size:]
        most = inf
        if until < inf:
            most = (until - now - TIMES.prompt(size) * caution) // (TIMES.step(size) * caution)
            most += 1 if caution < 1 else -1
        if most <= 0:
            self.end = now, None, waiting
            return now
        waiting[:] = later
        self.batches.append(batch)
        now += TIMES.prompt(size)
        steps = 0
        while steps < most and any(self.tokens[request] < output[request] for request in batch):
            now += TIMES.step(size)
            steps += 1
            for request in batch:
                self.first.setdefault(request, now)
                self.tokens[request] = min(output[request], self.tokens[request] + 1)
        going_on = [request for request in batch if self.tokens[request] < output[request]]
        self.finish |= {request: now for request in batch if request not in going_on}
        if going_on:
            self.end = now, going_on, waiting
        return now


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_replica_does_what_loops_over_tokens_do(data: st.DataObject) -> None:
    gaps = [eighths / 8 for eighths in data.draw(st.lists(st.integers(1, 240), max_size=8))]
    groups = [data.draw(st.integers(1, 5)) for _ in gaps]
    output = [data.draw(st.integers(1, 60)) for _ in range(sum(groups))]
    told = data.draw(st.one_of(st.just(inf), st.integers(0, 960).map(lambda eighths: eighths / 8 + 1 / 16)))
    by, caution = told + data.draw(st.integers(-8, 320)) / 8, data.draw(st.sampled_from((CONSERVATIVE, GENEROUS)))
    adds: list[tuple[float, list[int]]] = []
    arrivals: list[float] = []
    for gap, count in zip(gaps, groups, strict=True):
        at = (arrivals[-1] if arrivals else 0.0) + gap
        adds.append((at, list(range(len(arrivals), len(arrivals) + count))))
        arrivals += [at] * count
    bench = Bench(arrivals, output)
    for at, requests in adds:
        bench.queue.at(at, bench.add, *requests)
    if told < inf:
        bench.queue.at(told, bench.stop_by, by, caution)
    bench.run()
    slowly = Slowly(adds, output, told, by, caution)

    finish = {request: at for request, at in enumerate(bench.book.finish) if not isnan(at)}
    assert finish == pytest.approx(slowly.finish)
    assert {r: at for r, at in enumerate(bench.book.first_token) if not isnan(at)} == pytest.approx(slowly.first)
    assert bench.book.generated == [slowly.tokens[request] for request in range(len(output))]
    assert bench.book.restarts == [0] * len(output)
    if slowly.end is None:
        assert bench.ends == [] and len(finish) == len(output) and bench.replica.pool == 0
    else:
        [(at, parked, waiting)] = bench.ends
        assert at == pytest.approx(max(slowly.end[0], told))
        assert (None if parked is None else list(parked.requests)) == slowly.end[1]
        assert waiting == slowly.end[2]
        assert bench.refused == slowly.refused


def test_batches_are_powers_of_two_and_nothing_joins_one() -> None:
    bench = Bench([0.0] * 7 + [1.0])
    bench.queue.at(0.0, bench.add, *range(7))
    bench.queue.at(1.0, bench.add, 7)
    bench.run()
    four = TIMES.prompt(4) + 128 * TIMES.step(4)
    assert bench.book.finish == pytest.approx([four] * 4 + [2 * four] * 4)
    bench = Bench([0.0] * 3)
    bench.add(0, 1, 2)
    bench.run()
    two, one = (TIMES.prompt(size) + 128 * TIMES.step(size) for size in (2, 1))
    assert bench.book.finish == pytest.approx([two, two, two + one])


@pytest.mark.parametrize(
    ("caution", "factor", "more"), [(CONSERVATIVE, 1.1, -1), (GENEROUS, 1 / 1.1, 1)], ids=["loss", "arrival"]
)
def test_as_many_steps_run_as_the_artifact_counts(caution: float, factor: float, more: int) -> None:
    """Its times are those of the table, times the final factor before a loss, divided by it before an arrival."""
    prompt, step = ((value + hops) * factor / 1000 for value, hops in ((PROMPT, 7.0 * 2), (STEP, 0.1 * 2)))
    for slot in (5.0, 7.77, 9.0, 11.1):
        bench = Bench([0.0])
        bench.stop_by(slot, caution)
        bench.add(0)
        bench.run()
        [(at, parked, waiting)] = bench.ends
        assert parked == Parked((0,), int((slot - prompt) / step) + more) and waiting == []
        assert caution < 1 or at <= slot
        assert bench.book.generated == [parked.steps] and isnan(bench.book.finish[0])


def test_a_batch_that_fits_runs_in_full_and_one_without_a_step_not_at_all() -> None:
    whole = TIMES.prompt(1) + 128 * TIMES.step(1)
    bench = Bench([0.0, 0.0])
    bench.stop_by(whole + 2.5 * TIMES.step(1), CONSERVATIVE)
    bench.add(0)
    bench.queue.at(1.0, bench.add, 1)
    bench.run()
    assert bench.book.finish[0] == pytest.approx(whole)
    assert bench.ends == [(pytest.approx(whole), None, [1])]  # what is left is less than a prompt takes

    bench = Bench([0.0] * 4)
    bench.stop_by(TIMES.prompt(1) + 1.5 * TIMES.step(1), CONSERVATIVE)  # more than a prompt of one, less than of four
    bench.add(0, 1, 2, 3)
    bench.run()
    assert bench.ends == [(0.0, None, [0, 1, 2, 3])]
    assert all(map(isnan, bench.book.first_token))


def test_with_nothing_to_do_it_ends_when_nothing_could_be_begun_any_more() -> None:
    for caution in (CONSERVATIVE, GENEROUS):
        bench = Bench([])
        bench.queue.at(10.0, bench.stop_by, 40.0, caution)
        bench.run()
        assert bench.ends == [(pytest.approx(40 - TIMES.prompt(1)), None, [])]


def test_a_running_batch_is_not_cut() -> None:
    bench = Bench([0.0])
    bench.add(0)
    bench.queue.at(1.0, bench.stop_by, 2.0, CONSERVATIVE)
    bench.run()
    whole = TIMES.prompt(1) + 128 * TIMES.step(1)
    assert bench.book.finish == pytest.approx([whole]) and bench.ends == [(pytest.approx(whole), None, [])]


def test_a_parked_batch_goes_on_at_its_step_without_a_prompt() -> None:
    bench = Bench([0.0, 0.0], output=[20, 100])
    bench.stop_by(8.0, CONSERVATIVE)
    bench.add(0, 1)
    bench.run(50.0)
    [(at, parked, _)] = bench.ends
    assert parked is not None and parked.requests == (1,) and 20 < parked.steps < 100
    assert bench.book.finish[0] == at and isnan(bench.book.finish[1])
    other = bench.new()
    other.resume(parked)
    assert other.pool == 1
    bench.run()
    assert bench.book.finish[1] == pytest.approx(50 + (100 - parked.steps) * TIMES.step(1))
    assert bench.book.generated == [20, 100] and bench.book.restarts == [0, 0]
    assert bench.book.largest_gap[1] == pytest.approx(50 - at + TIMES.step(1))
    assert other.pool == 0 and not other.ended


def test_killing_gives_back_everything_and_tells_who_waits_for_the_end() -> None:
    bench = Bench([0.0] * 6)
    bench.add(*range(6))
    bench.stop_by(100.0, CONSERVATIVE)
    bench.run(TIMES.prompt(4) + 3.5 * TIMES.step(4))
    assert bench.replica.kill() == list(range(6))
    assert bench.ends == [(bench.queue.now, None, [])] and bench.replica.ended and bench.replica.pool == 0
    assert bench.book.generated == [3, 3, 3, 3, 0, 0]
    assert bench.book.last_token[0] == pytest.approx(TIMES.prompt(4) + 3 * TIMES.step(4))
    bench.run()
    assert all(map(isnan, bench.book.finish)) and bench.changes == 0
    bench.stop_by(1e7, CONSERVATIVE)
    assert len(bench.ends) == 2, "one that has ended says so at once"


def test_a_token_that_never_came_is_not_in_the_book() -> None:
    bench = Bench([0.0])
    bench.add(0)
    bench.run(TIMES.prompt(1))
    assert bench.replica.kill() == [0]
    assert isnan(bench.book.first_token[0]) and bench.book.generated == [0]
