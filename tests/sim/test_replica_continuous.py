"""Whatever comes, stops and goes on elsewhere: every token comes exactly once, and every wait is seen."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from spotjax.meshes.layout import split_layers
from spotjax.meshes.shape import MeshShape
from spotjax.planner.latency import Stage, Work
from spotjax.sim.events import EventQueue
from spotjax.sim.replica_continuous import ContinuousReplica
from spotjax.sim.requests import RequestBook
from spotjax.sim.times import ReplicaTimes
from spotjax.sim.workload import RequestTrace

STEP, TOKEN = 0.01, 0.0001


class Even:
    """A ``LatencyModel``: a token of a prompt takes 0.1 ms, a step of a whole replica 10 ms, whatever its batch."""

    def __init__(self, stages: int) -> None:
        self.stages = stages

    def stage_seconds(self, stage: Stage, tensor: int, work: Work) -> float:
        return (TOKEN * work.tokens if work.tokens > work.sequences else STEP) / self.stages

    def hop_seconds(self, tokens: int) -> float:
        return 0.0


class CountingQueue(EventQueue):
    """Counts what was announced."""

    announced = 0

    def at(self, seconds: float, function: Callable[..., None], *args: object) -> None:
        self.announced += 1
        super().at(seconds, function, *args)


@dataclass
class Bench:
    """Replicas and their clock."""

    requests: list[tuple[float, int, int]]
    """(Arrival, prompt, output)."""
    stages: int = 1
    max_batch: int = 4
    pages: int = 1000
    page_size: int = 16
    prefill_tokens: int = 512
    ended: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        columns = list(zip(*self.requests, strict=True))
        self.book = RequestBook(RequestTrace.of("bench", *columns))
        self.queue = CountingQueue()

    def replica(self) -> ContinuousReplica:
        times = ReplicaTimes(Even(self.stages), MeshShape(1, self.stages, 1), split_layers(12, self.stages))
        return ContinuousReplica(
            times, self.max_batch, self.pages, self.page_size, self.book, self.queue, self.ended.append,
            self.prefill_tokens,
        )  # fmt: skip

    def run(self, arrived: Callable[[int], None], until: float = 1e6) -> None:
        self.queue.run(until, self.book.arrival, arrived)

    def check_all_ended(self) -> None:
        book = self.book
        assert Counter(self.ended) == Counter(range(len(book))), "every request ends exactly once"
        assert book.generated == book.output
        for request in range(len(book)):
            assert book.arrival[request] <= book.first_token[request] <= book.finish[request]
            assert book.last_token[request] == book.finish[request]
            assert (book.output[request] > 1) == (book.largest_gap[request] > 0)
            waited = book.finish[request] - book.first_token[request]
            assert book.largest_gap[request] <= waited + 1e-9
            if self.stages == 1:  # an estimate else
                assert book.largest_gap[request] * (book.output[request] - 1) >= waited - 1e-9


# Exact times, one stage


def test_a_request_alone_takes_its_prompt_and_its_steps() -> None:
    bench = Bench([(2.0, 300, 101)])

    bench.run(bench.replica().add)

    assert bench.book.first_token == [pytest.approx(2.03)]
    assert bench.book.finish == [pytest.approx(2.03 + 100 * STEP)]
    assert bench.book.largest_gap == [pytest.approx(STEP)]


def test_a_prompt_waits_for_the_step_under_way_and_holds_up_who_decodes() -> None:
    bench = Bench([(0.0, 100, 50), (0.103, 400, 10)])

    bench.run(bench.replica().add)

    # The first decodes from 0.01 s on; the step under way at 0.103 s ends at 0.11 s.
    assert bench.book.first_token == [pytest.approx(0.01), pytest.approx(0.15)]
    assert bench.book.finish == [pytest.approx(0.01 + 49 * STEP + 0.04), pytest.approx(0.15 + 9 * STEP)]
    assert bench.book.largest_gap == [pytest.approx(STEP + 0.04), pytest.approx(STEP)]


def test_chunks_of_a_long_prompt_alternate_with_steps() -> None:
    bench = Bench([(0.0, 100, 50), (0.1, 250, 2)], prefill_tokens=100)

    bench.run(bench.replica().add)

    assert bench.book.first_token[1] == pytest.approx(0.1 + 0.025 + 2 * STEP)
    assert bench.book.largest_gap[0] == pytest.approx(STEP + 0.01)


def test_who_comes_when_all_places_are_taken_waits_for_the_first_end() -> None:
    bench = Bench([(0.0, 100, 11), (0.0, 100, 21), (0.001, 100, 11)], max_batch=2)

    bench.run(bench.replica().add)

    assert bench.book.finish[0] == pytest.approx(0.02 + 10 * STEP)
    assert bench.book.first_token[2] == pytest.approx(0.02 + 10 * STEP + 0.01)


def test_the_youngest_is_preempted_when_pages_run_out_and_its_wait_counts() -> None:
    # 10 pages of 10: both fit with their prompts, not with all their tokens (7 pages each).
    bench = Bench([(0.0, 40, 31), (0.0, 40, 31)], pages=11, page_size=10)

    bench.run(bench.replica().add)
    bench.check_all_ended()

    first, second = bench.book.finish
    assert first == pytest.approx(0.008 + 30 * STEP)
    # One step ahead, the first needs its sixth page after 9 steps of the second, which goes on when the first ended.
    assert bench.book.recomputed == [0, 49]
    assert second == pytest.approx(first + 50 * TOKEN + 20 * STEP)
    assert bench.book.largest_gap[1] == pytest.approx(20 * STEP + 50 * TOKEN)


def test_a_pause_is_waited_out_by_all_that_run() -> None:
    bench = Bench([(0.0, 100, 50), (1.0, 100, 2)])
    replica = bench.replica()
    bench.queue.at(0.105, replica.pause, 2.0)
    bench.queue.at(0.2, lambda: bench.ended.append(-1) if replica.boundary_seconds() < 1.9 else None)

    bench.run(replica.add)

    assert bench.ended == [1, 0] or bench.ended == [0, 1]
    assert bench.book.largest_gap[0] == pytest.approx(2.0 + STEP + 0.01, abs=STEP)
    assert bench.book.finish[0] == pytest.approx(0.01 + 49 * STEP + 2.0 + 0.01, abs=STEP)
    assert bench.book.first_token[1] == pytest.approx(2.105 + 0.01, abs=STEP)


def test_what_runs_and_the_next_boundary_are_known_at_every_moment() -> None:
    bench = Bench([(0.0, 100, 50), (0.0, 1000, 50)], prefill_tokens=1000)
    replica = bench.replica()
    seen: list[tuple[list[tuple[int, int, int]], float]] = []

    def look() -> None:
        seen.append((sorted(replica.remaining()), replica.boundary_seconds()))

    for seconds in (0.005, 0.04, 0.135):
        bench.queue.at(seconds, look)
    bench.run(replica.add)

    # A prompt of 10 ms, at whose end the other is let in, a step, its prompt of 100 ms, then steps of both.
    assert seen[0] == ([(0, 50, 0)], pytest.approx(0.005))
    assert seen[1] == ([(0, 48, 101), (1, 50, 0)], pytest.approx(0.08))
    assert seen[2] == ([(0, 47, 102), (1, 48, 1001)], pytest.approx(0.005))
    assert replica.remaining() == [] and replica.boundary_seconds() == 0.0


def test_a_stop_keeps_whole_tokens_and_another_replica_goes_on_with_the_kv() -> None:
    bench = Bench([(0.0, 100, 50), (0.1, 1000, 5)], prefill_tokens=1000)
    old, new = bench.replica(), bench.replica()
    given_up = []

    def move() -> None:
        given_up.extend(old.stop())
        assert old.load == 0 and old.remaining() == []
        bench.queue.at(1.0, lambda: [new.add(request, computed) for request, computed in given_up])

    bench.queue.at(0.15, move)  # in the middle of the second prompt
    bench.run(old.add)
    bench.check_all_ended()

    assert given_up == [(0, 109), (1, 0)]
    assert bench.book.recomputed == [0, 0], "the prompt had not been finished"
    # Tokens before: one with the prompt at 0.01 s, nine until 0.1 s. The prompt comes first, after it the tenth.
    assert bench.book.largest_gap[0] == pytest.approx(1.0 + 0.1 + STEP - 0.1)
    assert bench.book.finish[0] == pytest.approx(1.1 + 40 * STEP)


def test_without_its_kv_a_request_goes_on_after_all_its_positions_are_computed_again() -> None:
    bench = Bench([(0.0, 100, 50)])
    old, new = bench.replica(), bench.replica()

    def move() -> None:
        (progress,) = old.stop()
        new.add(progress.request)

    bench.queue.at(0.1149, move)  # 11 tokens
    bench.run(old.add)
    bench.check_all_ended()

    assert bench.book.recomputed == [110]
    assert bench.book.finish == [pytest.approx(0.1149 + 111 * TOKEN + 38 * STEP)]
    assert bench.book.largest_gap == [pytest.approx(0.1149 + 111 * TOKEN - 0.11)]


def test_a_request_that_can_never_fit_is_refused() -> None:
    bench = Bench([(0.0, 100, 50)], pages=10)

    with pytest.raises(ValueError, match="needs 10 KV pages, the replica has 9"):
        bench.replica().add(0)


def test_events_do_not_grow_with_tokens() -> None:
    few = Bench([(n * 0.1, 100, 5) for n in range(50)])
    many = Bench([(n * 50.0, 100, 5000) for n in range(50)])
    for bench in (few, many):
        bench.run(bench.replica().add)
        bench.check_all_ended()

    assert few.queue.announced <= 4 * 50
    assert many.queue.announced <= few.queue.announced + 50 * 5000 / 256


def test_no_array_library_is_loaded() -> None:
    program = "import sys, spotjax.sim.replica_continuous, spotjax.sim.dispatch; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


# Invariants

lengths = st.tuples(st.integers(1, 90), st.integers(1, 40))
workloads = st.lists(st.tuples(st.floats(0, 0.3), lengths), min_size=1, max_size=25).map(
    lambda rows: [(sum(gap for gap, _ in rows[: n + 1]), *rows[n][1]) for n in range(len(rows))]
)
benches = st.builds(
    Bench,
    workloads,
    stages=st.integers(1, 4),
    max_batch=st.integers(1, 6),
    pages=st.sampled_from([15, 20, 1000]),
    page_size=st.just(10),
    prefill_tokens=st.sampled_from([16, 64, 512]),
)


@given(benches)
def test_every_request_ends_once_with_all_its_tokens(bench: Bench) -> None:
    replica = bench.replica()
    added = 0

    def arrived(request: int) -> None:
        nonlocal added
        replica.add(request)
        added += 1
        assert replica.load == added - len(bench.ended)
        assert len(replica.remaining()) <= bench.max_batch

    bench.run(arrived)
    bench.check_all_ended()
    assert replica.load == 0


@given(benches, st.lists(st.tuples(st.floats(0, 8), st.booleans(), st.floats(0, 0.2)), max_size=8))
def test_moves_in_the_middle_lose_no_token_and_give_none_twice(
    bench: Bench, moves: list[tuple[float, bool, float]]
) -> None:
    replica, book = bench.replica(), bench.book

    def move(with_kv: bool, stall: float) -> None:
        nonlocal replica
        before = {request: left for request, left, _ in replica.remaining()}
        load, ended = replica.load, len(bench.ended)
        given_up = replica.stop()
        assert [progress.request for progress in given_up] == sorted(progress.request for progress in given_up)
        assert len(given_up) == load - (len(bench.ended) - ended) and replica.load == 0
        for request, computed in given_up:
            if request in before:
                assert book.output[request] - book.generated[request] == before[request], "whole tokens are kept"
            assert book.generated[request] < book.output[request]
            assert computed < book.prompt[request] + book.generated[request]
            assert book.generated[request] == 0 or book.last_token[request] <= bench.queue.now + 1e-6
        replica = bench.replica()

        def go_on() -> None:
            for request, computed in given_up:
                replica.add(request, computed if with_kv else 0)

        bench.queue.at(bench.queue.now + stall, go_on)

    for seconds, with_kv, stall in moves:
        bench.queue.at(seconds, move, with_kv, stall)
    bench.run(lambda request: replica.add(request))
    bench.check_all_ended()
    assert replica.load == 0


@given(benches, st.lists(st.tuples(st.floats(0, 3), st.floats(0.001, 1.0)), max_size=6))
@example(Bench([(0.0, 2, 2), (0.2, 1, 1)], max_batch=2), [(0.005, 1.0)])  # somebody joins before its second token
@example(Bench([(0.0, 1, 6), (0.04, 24, 2), (0.04, 2, 2)], max_batch=3), [(0.055, 1.0)])  # prompts wait meanwhile
def test_whoever_had_tokens_before_and_after_a_pause_waited_that_long(
    bench: Bench, pauses: list[tuple[float, float]]
) -> None:
    replica = bench.replica()
    waiting: list[tuple[set[int], float, float]] = []

    def pause(seconds: float) -> None:
        running = {request for request, left, _ in replica.remaining() if left < bench.book.output[request]}
        waiting.append((running, bench.queue.now, seconds))
        replica.pause(seconds)

    for at, seconds in pauses:
        bench.queue.at(at, pause, seconds)
    bench.run(replica.add)
    bench.check_all_ended()
    for running, at, seconds in waiting:
        for request in running:
            assert bench.book.finish[request] >= at + seconds - STEP - 1e-9
            if bench.stages == 1:
                assert bench.book.largest_gap[request] >= seconds - 1e-9


@given(benches)
def test_the_largest_wait_is_that_of_a_look_at_every_token(bench: Bench) -> None:
    """One stage: tokens are looked at one by one, at every boundary."""
    bench.stages = 1
    replica, book = bench.replica(), bench.book
    tokens: dict[int, tuple[int, float]] = {}
    gaps = [0.0] * len(book)

    def look() -> None:
        running = {request: book.output[request] - left for request, left, _ in replica.remaining()}
        for request in range(len(book)):
            came = running.get(request, book.generated[request])
            had, since = tokens.get(request, (0, inf))
            if came > had:
                if had:
                    gaps[request] = max(gaps[request], bench.queue.now - since)
                tokens[request] = came, bench.queue.now
        if replica.load:
            bench.queue.at(bench.queue.now + (replica.boundary_seconds() or STEP / 100), look)

    def arrived(request: int) -> None:
        replica.add(request)
        if replica.load == 1:
            bench.queue.at(bench.queue.now, look)

    bench.run(arrived)
    bench.check_all_ended()
    for request, gap in enumerate(gaps):
        assert tokens[request] == (book.output[request], pytest.approx(book.finish[request]))
        assert book.largest_gap[request] == pytest.approx(gap, abs=1e-6)
