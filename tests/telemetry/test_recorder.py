"""Counts and latencies of requests and migrations, one by one."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scraped import Scraped

from spotjax.engine.generation import GenerationRequest
from spotjax.engine.request import FinishReason, RequestState, SamplingParams
from spotjax.fleet.observer import Bytes, Migration, Paused
from spotjax.telemetry import metrics
from spotjax.telemetry.recorder import Recorder


def request(name: str = "r", prompt: int = 3, n: int = 1) -> GenerationRequest:
    return GenerationRequest(name, tuple(range(prompt)), SamplingParams(max_tokens=8), n)


def state(tokens: int, finish: FinishReason | None = None, name: str = "r", choice: int = 0) -> RequestState:
    return RequestState(name, choice, (0, 1, 2), SamplingParams(max_tokens=8), tokens=(7,) * tokens, finish=finish)


def test_latencies_are_from_arrival_to_what_clients_may_see() -> None:
    recorder = Recorder()
    recorder.arrived(request(), 10.0)
    recorder.begun(state(0), 10.5)
    recorder.committed([state(1)], 12.0)
    recorder.begun(state(1), 12.5)  # it had lost its place
    recorder.committed([state(2)], 13.0)
    recorder.committed([state(3, FinishReason.LENGTH)], 16.0)
    scraped = Scraped(recorder)
    assert scraped(metrics.QUEUE_TIME, "_sum") == 0.5
    assert scraped(metrics.TTFT, "_sum") == 2.0
    assert (scraped(metrics.INTER_TOKEN, "_count"), scraped(metrics.INTER_TOKEN, "_sum")) == (2, 4.0)
    assert scraped(metrics.E2E, "_sum") == 6.0
    assert (scraped(metrics.PROMPT_TOKENS), scraped(metrics.GENERATION_TOKENS)) == (3, 3)
    assert scraped(metrics.SUCCESS, finish="length") == 1


def test_who_ends_early_has_no_latency_and_who_was_refused_nothing_at_all() -> None:
    recorder = Recorder()
    recorder.arrived(request("cancelled"), 1.0)
    recorder.committed([state(0, FinishReason.CANCELLED, "cancelled")], 2.0)
    recorder.arrived(request("refused"), 1.0)
    recorder.withdrawn("refused")
    recorder.committed([state(1, name="refused")], 2.0)
    scraped = Scraped(recorder)
    assert (
        scraped(metrics.E2E, "_count") == scraped(metrics.TTFT, "_count") == scraped(metrics.QUEUE_TIME, "_count") == 0
    )
    assert scraped(metrics.SUCCESS, finish="cancelled") == 1
    assert scraped(metrics.GENERATION_TOKENS) == 0


def test_of_a_request_from_before_only_what_is_new_counts() -> None:
    recorder = Recorder()
    recorder.recalled(request(n=2), [state(2), state(1, FinishReason.STOP, choice=1)])
    recorder.begun(state(2), 5.0)
    recorder.committed([state(3)], 6.0)
    recorder.committed([state(4, FinishReason.STOP)], 7.5)
    scraped = Scraped(recorder)
    assert (scraped(metrics.GENERATION_TOKENS), scraped(metrics.PROMPT_TOKENS)) == (2, 0)
    assert (scraped(metrics.INTER_TOKEN, "_count"), scraped(metrics.INTER_TOKEN, "_sum")) == (1, 1.5)
    assert (
        scraped(metrics.TTFT, "_count") == scraped(metrics.E2E, "_count") == scraped(metrics.QUEUE_TIME, "_count") == 0
    )
    assert scraped(metrics.SUCCESS, finish="stop") == 1


def test_migrations_count_by_way_and_outcome_and_only_those_that_switched_have_a_duration() -> None:
    recorder = Recorder()
    paused = (Paused("a", 0, 10, 10), Paused("b", 1, 9, 0))
    recorder.migrated(Migration("planned", "lost", 3, 10.0, (("plan", 11.0),), Bytes()))
    recorder.migrated(
        Migration("loss", "switched", 4, 10.0, (("plan", 11.0), ("switch", 14.0)), Bytes(1, 2, 4, 8), 2.0, paused)
    )
    scraped = Scraped(recorder)
    assert scraped(metrics.MIGRATIONS, path="planned", outcome="lost") == 1
    assert scraped(metrics.MIGRATIONS, path="loss", outcome="switched") == 1
    assert scraped(metrics.MIGRATIONS, path="planned", outcome="switched") == 0
    assert (scraped(metrics.MIGRATION_TIME, "_count"), scraped(metrics.MIGRATION_TIME, "_sum")) == (1, 4.0)
    assert scraped(metrics.MIGRATION_PAUSE, "_sum") == 2.0
    assert scraped(metrics.MIGRATION_BYTES, source="instance", content="parameters") == 1
    assert scraped(metrics.MIGRATION_BYTES, source="checkpoint", content="parameters") == 2
    assert scraped(metrics.MIGRATION_BYTES, source="instance", content="kv") == 12
    assert scraped(metrics.RESUMED) == 2


STEPS = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True), max_size=30)


@given(STEPS)
def test_gaps_of_one_step_are_counted_as_if_one_by_one(steps: list[list[int]]) -> None:
    recorder, told, last = Recorder(), Counter[int](), dict[int, float]()
    gaps: list[float] = []
    for number in range(4):
        recorder.arrived(request(str(number)), 0.0)
    for step, chosen in enumerate(steps, 1):
        now = step * step / 7
        states = []
        for number in chosen:
            told[number] += 1
            gaps += [now - last[number]] if number in last else []
            last[number] = now
            states.append(state(told[number], name=str(number)))
        recorder.committed(states, now)
    scraped = Scraped(recorder)
    assert scraped(metrics.INTER_TOKEN, "_count") == len(gaps)
    assert scraped(metrics.INTER_TOKEN, "_sum") == pytest.approx(sum(gaps))
    for bound in (0.1, 0.5, 1.0, 5.0):
        assert scraped(metrics.INTER_TOKEN, "_bucket", le=str(bound)) == sum(gap <= bound for gap in gaps)
