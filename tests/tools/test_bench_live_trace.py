"""What a live race is run on and what is made of it. No process is started here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotjax.engine.generation import Delta
from spotjax.engine.request import FinishReason
from spotjax.errors import ConfigError
from spotjax.fleet.status import FleetEvent
from spotjax.models.catalog import open_model
from spotjax.models.spec import ModelSpec
from spotjax.planner.demand import Demand
from spotjax.planner.latency import Stage, Work
from spotjax.planner.profile import MeasuredProfile, Sample
from spotjax.tools.bench_live_trace import instance_memory
from spotjax.tools.cpu_limits import CpuLimits, cpu_limits
from spotjax.tools.live_race import Answer, Run, wrong_tokens
from spotjax.tools.live_trace import (
    DEFAULT_TRACE,
    Arrivals,
    Workload,
    arrival_times,
    ends,
    first,
    instance_seconds,
    parse_trace,
    questions,
    spot_trace,
)
from spotjax.tools.race_results import advantage, document, longest_gap, percentile, read_race, scenario, summary, table
from spotjax.tools.random_model import random_config, write_random_model

TRACE = parse_trace("0 join a\n0 join b  # a comment\n\n5 kill a\n6 join c\n8 leave b\n")
GRACE = 2.0
EXPECTED = {"q0": (1, 2, 3), "q1": (4, 5)}


def answered(question: str, arrival: float, *times: float, tokens: tuple[int, ...] | None = None) -> Answer:
    """An answer whose tokens came at these times."""
    wanted = EXPECTED[question] if tokens is None else tokens
    return Answer(question, arrival, list(wanted), list(times), 0, times[-1])


def run_of(recovery: str = "spotjax", slower: float = 1.0) -> Run:
    answers = [answered("q0", 1.0, 2.0, 3.0, 1.0 + 4.0 * slower), answered("q1", 2.0, 4.0, 5.0)]
    events = [
        FleetEvent(-1.0, "precopy", 1, "", {"bytes_loaded": 50, "seconds": 1.0}),
        FleetEvent(1.0, "precopy", 2, "", {"bytes_loaded": 100, "seconds": 0.5}),
        FleetEvent(2.0, "switch", 2, "", {"recomputed": 3}),
    ]
    return Run(recovery, "poisson", answers, 10.0, events, {"c": 1.5})  # type: ignore[arg-type]


# --- traces -----------------------------------------------------------------------------------------------------------


def test_a_trace_says_who_is_there_when() -> None:
    assert first(TRACE) == ["a", "b"]
    assert ends(TRACE, GRACE) == {"a": 5.0, "b": 10.0}
    assert instance_seconds(TRACE, GRACE, until=9.0) == 5 + 9 + 3
    assert spot_trace(TRACE, GRACE, 20.0).counts() == [(0, 2), (5, 1), (6, 2), (10, 1)]
    assert {e.removed: e.notice for e in spot_trace(TRACE, GRACE, 20.0).events if e.removed} == {
        ("a",): 0,
        ("b",): GRACE,
    }
    assert spot_trace(TRACE, GRACE, 9.0).counts() == [(0, 2), (5, 1), (6, 2)]


def test_the_default_trace_loses_instances_both_ways_and_leaves_enough() -> None:
    trace = parse_trace(DEFAULT_TRACE)
    assert {one.what for one in trace} == {"join", "leave", "kill"}
    assert min(count for seconds, count in spot_trace(trace, 6.0, 120.0).counts() if seconds > 0) >= 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0 join a\n1 kill", "line 2: expected SECONDS WHAT NAME"),
        ("0 join a\nsoon kill a", "line 2: expected SECONDS"),
        ("0 join a\n1 kill a now", "line 2"),
        ("0 join a\n1 stop a", "line 2: 'stop' is none of join, leave, kill"),
        ("0 join a\n5 join b\n4 kill a", "line 3: 4 s is out of order"),
        ("0 join a\nnan kill a", "line 2: nan s is out of order"),
        ("0 join a\n1 join a", "line 2: a is there already"),
        ("0 join a\n1 kill a\n2 leave a", "line 3: a is not there"),
        ("1 join a", "no instance is there at the start"),
        ("", "no instance is there at the start"),
    ],
)
def test_a_line_that_is_none_is_named(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_trace(text)


@given(st.sampled_from(["poisson", "bursty"]), st.integers(0, 2**32))
def test_arrivals_are_in_order_and_the_same_for_a_seed(kind: Arrivals, seed: int) -> None:
    times = arrival_times(kind, 2.0, 50.0, 3.0, seed)
    assert (np.diff(times) >= 0).all() and ((times >= 0) & (times < 50.0)).all()
    assert (times == arrival_times(kind, 2.0, 50.0, 3.0, seed)).all()


def test_gaps_vary_as_much_as_they_should() -> None:
    for kind, cv in (("poisson", 1.0), ("bursty", 3.0)):
        times = arrival_times(kind, 10.0, 20_000.0, 3.0, seed=1)  # type: ignore[arg-type]
        gaps = np.diff(times)
        assert len(times) / 20_000 == pytest.approx(10.0, rel=0.03)
        assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.05)


@pytest.mark.parametrize(("rate", "cv"), [(0.0, 1.0), (1.0, 0.0)])
def test_arrivals_without_rate_or_cv_are_refused(rate: float, cv: float) -> None:
    with pytest.raises(ConfigError, match="above 0"):
        arrival_times("bursty", rate, 10.0, cv, 0)


def test_a_workload_asks_known_questions() -> None:
    asked = questions(4, (3, 9), (2, 5), 100, seed=7)
    assert asked == questions(4, (3, 9), (2, 5), 100, seed=7)
    assert all(3 <= len(q.prompt) <= 9 and 2 <= q.output <= 5 and max(q.prompt) < 100 for q in asked)
    workload = Workload.drawn("poisson", [0.5, 1.5, 4.0], asked, seed=7)
    trace = workload.request_trace()
    assert trace.arrival.tolist() == [0.5, 1.5, 4.0] and set(workload.asked) <= set(asked)
    assert trace.prompt.tolist() == [len(q.prompt) for q in workload.asked]
    assert trace.output.tolist() == [q.output for q in workload.asked]


# --- results ----------------------------------------------------------------------------------------------------------


def test_an_answer_counts_what_comes_twice_and_notes_what_is_left_out() -> None:
    answer = Answer("q0", 0.0)
    answer.take(Delta("r", 0, 0, (1, 2), ""), 1.0)
    answer.take(Delta("r", 0, 1, (2, 3), "", finish=FinishReason.LENGTH), 2.0)
    assert (answer.tokens, answer.times, answer.repeated, answer.done) == ([1, 2, 3], [1.0, 1.0, 2.0], 1, 2.0)
    assert not answer.problem
    answer.take(Delta("r", 0, 5, (9,), ""), 3.0)
    assert "token 5 came after 3" in answer.problem


def test_tokens_that_are_lost_come_again_or_differ_are_counted() -> None:
    assert wrong_tokens([answered("q0", 0, 1, 2, 3), answered("q1", 0, 1, 2)], EXPECTED) == (0, 0, 0)
    short = answered("q0", 0, 1, 2, tokens=(1, 2))
    assert wrong_tokens([short], EXPECTED) == (1, 0, 0)
    short.done = None
    assert wrong_tokens([short], EXPECTED) == (0, 0, 0), "the rest may still come"
    short.problem = "Unavailable"
    assert wrong_tokens([short], EXPECTED) == (1, 0, 0)
    assert wrong_tokens([answered("q1", 0, 1, 2, 3, tokens=(4, 9, 9))], EXPECTED) == (0, 1, 1)


def test_a_summary_is_of_what_clients_saw() -> None:
    one = summary(run_of(), EXPECTED, TRACE, GRACE, price=3600.0)
    assert (one.requests, one.unfinished, one.tokens) == (2, 0, 5)
    assert (one.average, one.p50, one.p99) == (3.5, 4.0, 4.0)
    assert (one.first, one.first_p99, one.gap) == (1.5, 2.0, 2.0)
    assert (one.lost, one.repeated, one.wrong) == (0, 0, 0)
    assert (one.loaded, one.recomputed, one.changes) == (100, 3, 1), "what was before the first request does not count"
    assert one.cost == one.instance_seconds == instance_seconds(TRACE, GRACE, 10.0)


def test_requests_that_did_not_end_count_with_their_age() -> None:
    run = run_of()
    run.answers[1].done, run.answers[0].done, run.answers[0].times = None, None, []
    one = summary(run, EXPECTED, TRACE, GRACE, 1.0)
    assert one.unfinished == 2 and one.average == (9 + 8) / 2 and one.first == (9 + 2) / 2
    assert one.gap == 5.0 == longest_gap(run.answers[1], 10.0)


def test_percentiles_are_values_that_were_there() -> None:
    assert percentile(range(200), 0.99) == 198 and percentile([7.0], 0.99) == 7.0 and percentile([1, 2], 0.5) == 2


def test_the_advantage_is_over_the_best_baseline() -> None:
    runs = [run_of(), run_of("reparallelization", 3.0), run_of("rerouting", 2.0)]
    summaries = [summary(run, EXPECTED, TRACE, GRACE, 1.0) for run in runs]
    assert advantage(summaries, "poisson") == 2.0
    assert advantage(summaries[:1], "poisson") is None and advantage(summaries[1:], "poisson") is None
    assert advantage(summaries, "bursty") is None
    assert table(summaries).row_count == 3


@pytest.mark.parametrize("profiled", [True, False])
def test_what_was_written_is_read_again_as_the_simulators_inputs(tmp_path: Path, profiled: bool) -> None:
    stage = Stage(2, True, True)
    samples = (Sample(stage, 1, Work(16, 136, 0, 1), 0.5), Sample(stage, 1, Work(1, 100, 99, 1), 0.1))
    profile = MeasuredProfile("m", "h", samples, 1e-4, 1e9, 64) if profiled else None
    workload = Workload.drawn("poisson", [0.5, 1.5], questions(3, (3, 9), (2, 5), 100, 0), 0)
    runs = [run_of()]
    summaries = [summary(run, EXPECTED, TRACE, GRACE, 1.0) for run in runs]
    config, demand = random_config(128, 5), Demand(batch=4, kv_pages=32)
    written = document(
        {"seed": 0}, 0.25, config, 10**8, demand, "2x3x1", TRACE, GRACE, [workload], runs, summaries, [{"batch": 1}],
        profile,
    )  # fmt: skip
    (tmp_path / "race.json").write_text(json.dumps(written))
    inputs = read_race(tmp_path / "race.json")
    assert inputs.requests["poisson"].prompt.tolist() == workload.request_trace().prompt.tolist()
    assert inputs.spot == spot_trace(TRACE, GRACE, 10.0)
    assert inputs.profile == profile
    assert (inputs.start_seconds, inputs.load_bandwidth, inputs.shape) == (1.5, 200.0 / 6, "2x3x1")
    assert (inputs.spec.config, inputs.spec.dtype_bytes, inputs.kind.memory_bytes) == (config, 4, 10**8)
    assert inputs.demand == demand
    if not profiled:
        with pytest.raises(ConfigError, match="a profile is needed"):
            scenario(inputs, "poisson")
        return
    one = scenario(inputs, "poisson")
    assert (one.requests.name, one.spot, one.latency) == ("poisson", inputs.spot, profile)
    assert (one.assumptions.start_seconds, one.assumptions.checkpoint_bandwidth) == (1.5, 200.0 / 6)
    assert one.assumptions.scale == 4.0, "of what takes one core a second"
    with pytest.raises(ConfigError, match="bursty"):
        scenario(inputs, "bursty")


@pytest.mark.parametrize("text", ["", "{}", '{"format": 99}', '{"format": 1}', "[1]"])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "race.json").write_text(text)
    with pytest.raises(ConfigError, match=r"race\.json"):
        read_race(tmp_path / "race.json")


# --- instances --------------------------------------------------------------------------------------------------------


def test_a_random_model_is_written_and_read(tmp_path: Path) -> None:
    config = random_config(128, 5)
    write_random_model(tmp_path / "model", config, seed=1)
    opened = open_model(str(tmp_path / "model"))
    assert opened.checkpoint.spec.config == config
    assert opened.tokenizer.end_tokens
    memory = instance_memory(tmp_path / "model", 4, 128, 2)
    assert ModelSpec(config).parameter_bytes / 2 < memory
    with pytest.raises(ConfigError, match="--stages 4: 3 instances"):
        instance_memory(tmp_path / "model", 4, 128, 4)


def test_a_group_gets_its_share_of_a_core_in_both_versions(tmp_path: Path) -> None:
    second = CpuLimits(tmp_path / "v2", 0.25)
    (tmp_path / "v2").mkdir()
    second.admit("a", 17)
    assert (tmp_path / "v2" / "a" / "cpu.max").read_text() == "5000 20000"
    assert (tmp_path / "v2" / "a" / "cgroup.procs").read_text() == "17"
    (tmp_path / "v1").mkdir()
    (tmp_path / "v1" / "cpu.cfs_quota_us").touch()
    CpuLimits(tmp_path / "v1", 0.5).admit("a", 17)
    assert (tmp_path / "v1" / "a" / "cpu.cfs_quota_us").read_text() == "10000"
    assert (tmp_path / "v1" / "a" / "cpu.cfs_period_us").read_text() == "20000"


def test_without_cores_there_are_no_limits() -> None:
    with cpu_limits(0) as limits:
        assert limits is None
