from math import isnan

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from results_cases import G4DN, FixedTime, outcome, scenario

from spotjax.errors import ConfigError
from spotjax.meshes.layout import split_layers
from spotjax.models.presets import preset
from spotjax.planner.cost import Roofline
from spotjax.sim.distribution import Distribution, published_percentile
from spotjax.sim.records import Record, decode, encode
from spotjax.sim.results import estimate_prefill_share
from spotjax.sim.workload import RequestTrace, SpotEvent, SpotTrace, by_counts

numbers = st.lists(st.floats(0, 1e6), min_size=1, max_size=60)


@given(numbers)
def test_percentiles_are_interpolated_between_the_two_nearest_values(values: list[float]) -> None:
    spread, ordered = Distribution.of(np.array(values)), sorted(values)
    assert spread is not None
    for share, got in ((0.5, spread.p50), (0.9, spread.p90), (0.95, spread.p95), (0.99, spread.p99)):
        place = share * (len(values) - 1)
        low, rest = int(place), place - int(place)
        high = ordered[min(low + 1, len(values) - 1)]
        assert got == pytest.approx(ordered[low] + rest * (high - ordered[low]), abs=1e-6)
    assert spread.mean == pytest.approx(sum(values) / len(values)) and spread.largest == max(values)


@given(numbers, st.floats(0, 0.999))
def test_the_published_percentile_is_the_artifacts_index_into_the_sorted_list(values: list[float], p: float) -> None:
    assert published_percentile(np.array(values), p) == sorted(values)[int(p * len(values))]


def test_nothing_has_no_distribution_and_no_percentile() -> None:
    assert Distribution.of(np.array([])) is None and Distribution.as_published(np.array([])) is None
    for values, share in (([], 0.5), ([1.0], 1.0), ([1.0], -0.1)):
        with pytest.raises(ValueError, match="at least one value"):
            published_percentile(np.array(values), share)


def test_a_queue_in_front_of_one_server_has_the_latencies_of_the_closed_form() -> None:
    """Ten requests at once, 4 s each: the n-th is finished after 4n s, and has its first token 1 s into its turn."""
    summary = outcome(FixedTime(4.0), scenario(RequestTrace.of("burst", np.full(10, 20.0), 6, 4))).summary()
    latencies = [4.0 * n for n in range(1, 11)]
    assert (summary.requests, summary.finished, summary.censored, summary.lost) == (10, 10, 0, 0)
    assert summary.latency == summary.latency_finished
    assert summary.number("latency.mean") == np.mean(latencies) == 22
    assert summary.number("latency.p99") == pytest.approx(np.percentile(latencies, 99))
    assert summary.number("latency_published.p99") == summary.number("latency.largest") == 40
    assert summary.number("latency_published.p50") == 24  # the artifact's index 5 of 10
    assert summary.number("time_to_first_token.mean") == 22 - 3
    assert summary.number("largest_gap.largest") == 1
    assert summary.number("latency_per_token.mean") == 22 / 4
    assert summary.request_throughput == 10 / 100 and summary.output_throughput == 40 / 100
    assert (summary.prompt_tokens, summary.output_tokens) == (60, 40)


def test_unfinished_requests_count_with_their_age_so_that_falling_behind_is_never_flattering() -> None:
    """3 of 10 requests of 25 s fit between 20 s and 100 s; the others are 80 s old at the end."""
    summary = outcome(FixedTime(25.0), scenario(RequestTrace.of("burst", np.full(10, 20.0), 6, 5))).summary()
    assert (summary.finished, summary.censored) == (3, 7)
    assert summary.number("latency.mean") == (25 + 50 + 75 + 7 * 80) / 10
    assert summary.number("latency_finished.mean") == summary.number("latency_published.mean") == 50
    # The fourth has its first token at 100 s exactly, which is in time; six have none.
    assert summary.number("time_to_first_token.mean") == (5 + 30 + 55 + 80 + 6 * 80) / 10
    assert summary.number("latency_per_token.largest") == 80 / 5
    assert summary.number("largest_gap.mean") == 15 / 4, "the fourth client had no time to wait"
    assert summary.output_tokens == 15 and summary.output_throughput == 0.15


@given(
    st.lists(st.tuples(st.floats(0, 90), st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=20),
    st.floats(0.1, 20),
    st.floats(0.1, 20),
)
def test_a_slower_server_never_looks_better(rows: list[tuple[float, int, int]], one: float, other: float) -> None:
    case = scenario(RequestTrace.of("any", *zip(*sorted(rows), strict=True)))
    fast, slow = (outcome(FixedTime(seconds), case).summary() for seconds in sorted((one, other)))
    for name in ("latency.mean", "latency.p50", "latency.p99", "latency_per_token.mean"):
        assert fast.number(name) <= slow.number(name) + 1e-9
    assert fast.finished >= slow.finished


def test_what_a_system_foresaw_for_later_than_the_end_has_not_happened_and_later_requests_never_came() -> None:
    case = scenario(RequestTrace.of("late", [10.0, 99.0, 100.0, 101.0], 6, 5))
    result = outcome(FixedTime(20.0), case)
    assert len(result) == 3
    assert result.first_token.tolist()[0] == 14 and np.isnan(result.first_token[1:]).all()
    assert result.latency().tolist() == [20, 1, 0]


def test_requests_that_a_system_gives_up_are_lost_and_count_with_their_age() -> None:
    summary = outcome(FixedTime(1.0, drops=(1,)), scenario(RequestTrace.of("two", [0.0, 40.0], 6, 4))).summary()
    assert (summary.finished, summary.censored, summary.lost) == (1, 1, 1)
    assert summary.number("latency.largest") == 60


def test_restarts_recomputed_positions_changes_and_stalls_are_added_up() -> None:
    spot = by_counts("shrinking", [(0, 3), (5, 2), (17, 1)], 100.0)
    summary = outcome(FixedTime(10.0), scenario(RequestTrace.of("two", [0.0, 0.0], 6, 4), spot)).summary()
    assert (summary.restarts, summary.restarted, summary.recomputed) == (2, 2, 6)
    # The first runs until 5 s in vain and then until 15 s, the second until 17 s in vain and then until 27 s.
    assert summary.number("latency.mean") == (15 + 27) / 2
    assert (summary.changes, summary.stall, summary.longest_stall) == (3, 5.0, 2.5)
    assert (summary.bytes_moved, summary.bytes_loaded) == (22, 7)


def test_cost_is_what_instances_were_there_for_and_is_shared_by_finished_tokens() -> None:
    events = (SpotEvent(0, ("a", "b")), SpotEvent(0, ("c",), on_demand=True), SpotEvent(1800, removed=("b",)))
    spot = SpotTrace("mixed", events, 3600.0)
    result = outcome(FixedTime(1.0), scenario(RequestTrace.of("few", [0.0, 10.0, 3599.5], 300, 100), spot))
    summary = result.summary()
    usd = 1.5 * G4DN.spot_price + G4DN.on_demand_price
    assert (summary.spot_hours, summary.on_demand_hours) == (1.5, 1.0) and summary.usd == pytest.approx(usd)
    assert summary.finished == 2 and summary.usd_per_million_tokens == pytest.approx(1e6 * usd / 800)
    assert summary.usd_published == pytest.approx(1e5 * usd / 800)
    assert summary.usd_per_million_prompt_tokens == pytest.approx(summary.usd_per_million_output_tokens)
    split = result.summary(prefill_share=0.25)
    assert split.usd_per_million_prompt_tokens == pytest.approx(1e6 * usd * 0.25 / 600)
    assert split.usd_per_million_output_tokens == pytest.approx(1e6 * usd * 0.75 / 200)
    assert split.usd_per_million_tokens == summary.usd_per_million_tokens


def test_the_published_formula_comes_out_for_requests_of_640_tokens() -> None:
    summary = outcome(FixedTime(1.0), scenario(RequestTrace.of("paper", [0.0, 1.0, 2.0], 512, 128))).summary()
    assert summary.usd_published == pytest.approx(1e5 * summary.usd / (3 * 640))


def test_without_a_finished_request_there_is_no_cost_per_token_and_without_any_no_latency() -> None:
    none = outcome(FixedTime(1.0), scenario(RequestTrace.of("none", [], 1, 1))).summary()
    assert none.requests == 0 and none.latency is None and isnan(none.number("latency.p99"))
    late = outcome(FixedTime(90.0), scenario(RequestTrace.of("late", [50.0], 1, 1))).summary()
    assert late.usd > 0 and late.usd_per_million_tokens is None and late.usd_published is None
    assert late.latency_finished is None and late.largest_gap is None and late.number("latency.mean") == 50


def test_requests_that_wait_and_that_are_open_are_counted_at_any_time() -> None:
    result = outcome(FixedTime(25.0), scenario(RequestTrace.of("three", [10.0, 20.0, 90.0], 6, 5)))
    times = np.array([0, 10, 14.9, 15, 20, 35, 39.9, 40, 60, 90, 100])
    waiting = [
        sum(a <= t and not f <= t for a, f in zip(result.arrival, result.first_token, strict=True)) for t in times
    ]
    unfinished = [sum(a <= t and not f <= t for a, f in zip(result.arrival, result.finish, strict=True)) for t in times]
    assert result.waiting(times).tolist() == waiting == [0, 1, 1, 0, 1, 1, 1, 0, 0, 1, 0]
    assert result.unfinished(times).tolist() == unfinished == [0, 1, 1, 1, 2, 1, 1, 1, 0, 1, 1]


def test_numbers_are_found_by_name_and_other_names_are_refused() -> None:
    summary = outcome(FixedTime(1.0), scenario(RequestTrace.of("one", [0.0], 6, 4))).summary()
    assert summary.number("usd") == summary.usd
    for name in ("latency", "latency.p98", "banana", "banana.p99", "usd.p99", "scenario"):
        with pytest.raises(ConfigError, match="no number"):
            summary.number(name)


def test_the_share_of_prompts_is_their_share_of_the_slowest_stage() -> None:
    spec = preset("opt-6.7b")
    model, layers = Roofline(spec, G4DN), split_layers(spec.config.layers, 2)
    share = [estimate_prefill_share(model, 4, layers, 8, 512, output) for output in (1, 128, 4096)]
    assert 1 > share[0] > share[1] > share[2] > 0


def test_records_are_read_back_as_they_were_written() -> None:
    result = outcome(FixedTime(25.0), scenario(RequestTrace.of("some", [0.0, 1.5, 80.0, 90.0], 6, 5)), seed=3)
    whole, split = result.summary(), result.summary(prefill_share=0.3)
    runs = [Record.of(result, whole, columns=True), Record.of(result, whole), Record.of(result, split)]
    file = decode(encode(runs, {"notice_seconds": 30.0}))
    assert file.runs == tuple(runs) and file.assumptions == {"notice_seconds": 30.0}
    assert file.runs[0].summary == result.summary() and file.runs[0].changes == result.changes
    assert file.runs[0].columns["finish"] == [25.0, 50.0, None, None] and file.runs[1].columns == {}
    assert file.runs[0].columns["prompt"] == [6, 6, 6, 6]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "not results"),
        (b"[1]", "not results"),
        (b'{"runs": [{"summary": 1}], "assumptions": {}}', r"runs\[0\]"),
        (b'{"runs": [], "assumptions": {}, "version": 99}', "format 99"),
    ],
)
def test_files_that_are_no_results_are_refused(content: bytes, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        decode(content)


def test_missing_times_are_null_in_json() -> None:
    result = outcome(FixedTime(200.0), scenario(RequestTrace.of("one", [0.0], 6, 4)))
    assert np.isnan(result.finish).all()
    content = encode([Record.of(result, result.summary(), columns=True)], {})
    assert b"NaN" not in content and decode(content).runs[0].columns["finish"] == [None]
