"""Figures are those of ``vllm bench serve``: its formulas, written out, and closed forms."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai_server import planned

from spotjax.bench.exchange import INTERRUPTED, Exchange, Failure
from spotjax.bench.goodput import Objectives
from spotjax.bench.results import figures
from spotjax.bench.statistics import PERCENTILES, Distribution, most_in_flight, seconds_of_the_run, summarise
from spotjax.errors import ConfigError


def exchange(
    sent: float, times: Sequence[float], output: int | None = None, failure: Failure | None = None
) -> Exchange:
    """An answer whose pieces came at these seconds."""
    made = Exchange(planned(sent), sent=sent, prompt_tokens=7, output_tokens=output, failure=failure)
    for at in times:
        made.piece(at, "x")
    return made


@st.composite
def exchanges(draw: st.DrawFn) -> list[Exchange]:
    made = []
    for _ in range(draw(st.integers(1, 12))):
        sent = draw(st.floats(0, 30))
        gaps = draw(st.lists(st.floats(0, 3), min_size=1, max_size=8))
        failure = draw(st.sampled_from([None, None, None, Failure("http 500", ""), INTERRUPTED]))
        output = draw(st.none() | st.integers(1, 40))
        made.append(exchange(sent, np.cumsum([sent, *gaps])[1:].tolist(), output, failure))
    return made


def written_out(made: Sequence[Exchange], duration: float, slo: dict[str, float]) -> dict[str, Any]:
    """``calculate_metrics`` of vllm/benchmarks/serve.py (0.32.0), step by step, on what it has of an answer."""
    ttfts, tpots, all_tpots, itls, e2els, lengths, total_input = [], [], [], [], [], [], 0
    for each in made:
        if each.failure is not None:
            continue
        latency, ttft = each.times[-1] - each.sent, each.times[0] - each.sent
        length = each.output_tokens or len(each.times)  # vLLM: tokens of the text; one token a piece here
        lengths.append(length)
        total_input += 7
        tpot = 0.0
        if length > 1:
            tpot = (latency - ttft) / (length - 1)
            tpots.append(tpot)
        all_tpots.append(tpot)
        itls += [b - a for a, b in zip(each.times[:-1], each.times[1:], strict=True)]
        ttfts.append(ttft)
        e2els.append(latency)
    good = sum(
        all(value <= limit / 1000 for limit, value in zip(slo.values(), values, strict=True))
        for values in zip(ttfts, all_tpots, e2els, strict=True)
    )
    out: dict[str, Any] = {
        "completed": len(ttfts),
        "failed": sum(each.failure is not None and each.failure != INTERRUPTED for each in made),
        "total_input_tokens": total_input,
        "total_output_tokens": sum(lengths),
        "request_throughput": len(ttfts) / duration,
        "request_goodput": good / duration,
        "output_throughput": sum(lengths) / duration,
        "total_token_throughput": (total_input + sum(lengths)) / duration,
    }
    for name, values in (("ttft", ttfts), ("tpot", tpots), ("itl", itls), ("e2el", e2els)):
        if values:  # where there are none, vLLM says 0 and we say nothing
            out[f"mean_{name}_ms"] = 1000 * statistics.fmean(values)
            out[f"median_{name}_ms"] = 1000 * statistics.median(values)
            out[f"std_{name}_ms"] = 1000 * statistics.pstdev(values)
            for percent in PERCENTILES:
                out[f"p{percent:g}_{name}_ms"] = 1000 * interpolated(values, percent)
    return out


def interpolated(values: Sequence[float], percent: float) -> float:
    """A percentile, from the definition."""
    rank = (len(values) - 1) * percent / 100
    below, above = sorted(values)[math.floor(rank)], sorted(values)[math.ceil(rank)]
    return below + (above - below) * (rank - math.floor(rank))


@given(exchanges(), st.floats(0.1, 100))
def test_figures_are_those_of_vllm(made: list[Exchange], duration: float) -> None:
    slo = {"ttft": 1500.0, "tpot": 700.0, "e2el": 6000.0}
    found = figures(summarise(made, duration, Objectives(**slo)))
    expected = written_out(made, duration, slo)
    assert all(value is None for name, value in found.items() if name == "mean_itl_ms" and name not in expected)
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-9, abs=1e-9, nan_ok=False)


def test_what_vllm_measured_gives_the_figures_that_vllm_computed_of_it() -> None:
    vllm = json.loads(Path(__file__).with_name("vllm_bench_serve.json").read_text())
    made = []
    for number, failed in enumerate(vllm["errors"]):
        sent, ttft, gaps = vllm["start_times"][number], vllm["ttfts"][number], vllm["itls"][number]
        times = [] if failed else np.cumsum([sent + ttft, *gaps]).tolist()
        made.append(exchange(sent, times, vllm["output_lens"][number], Failure("http 429", "") if failed else None))
        made[-1].prompt_tokens = vllm["input_lens"][number]
    objectives = Objectives.parse(["ttft:300", "tpot:50", "e2el:600"])
    found = figures(summarise(made, vllm["duration"], objectives, (50, 90, 99)))
    same = {name: value for name, value in vllm.items() if name in found}
    assert len(same) > 30
    assert {name: found[name] for name in same} == pytest.approx(same, rel=1e-7)


@given(exchanges())
def test_seconds_of_a_run_have_every_piece_once_and_no_more_requests_than_there_were(made: list[Exchange]) -> None:
    complete = [each for each in made if each.failure is None]
    tokens, running = seconds_of_the_run(complete)
    assert sum(tokens) == sum(len(each.times) for each in complete)
    assert most_in_flight(complete) <= max(running, default=0) <= len(complete)


@given(exchanges(), st.floats(1, 4000), st.floats(1, 2000))
def test_a_higher_limit_never_makes_goodput_worse_and_it_never_exceeds_the_throughput(
    made: list[Exchange], limit: float, more: float
) -> None:
    strict, loose = (summarise(made, 1.0, Objectives(ttft=ms, e2el=3 * ms)) for ms in (limit, limit + more))
    assert strict.request_goodput is not None and loose.request_goodput is not None
    assert strict.request_goodput <= loose.request_goodput <= loose.request_throughput


@given(st.lists(st.floats(0, 1e4), min_size=1, max_size=50), st.lists(st.floats(0, 100), min_size=1, max_size=5))
def test_percentiles_lie_between_the_extremes_in_order_and_do_not_depend_on_the_order_of_values(
    values: list[float], percents: list[float]
) -> None:
    found, again = (Distribution.of(given, sorted(percents)) for given in (values, sorted(values, reverse=True)))
    assert found is not None and again is not None and found.percentiles == again.percentiles
    line = [found.least, *(value for _, value in found.percentiles), found.most]
    assert all(a <= b or a == pytest.approx(b) for a, b in pairwise(line))


def test_percentiles_of_a_uniform_distribution_are_where_the_closed_form_says() -> None:
    found = Distribution.of(np.arange(101).tolist(), (25, 50, 99))
    assert found is not None and found.percentiles == ((25, 25), (50, 50), (99, 99))
    assert found.std == pytest.approx(math.sqrt((101**2 - 1) / 12))


def test_a_piece_of_several_tokens_is_one_gap_but_all_of_its_tokens_count() -> None:
    summary = summarise([exchange(0, [1, 2, 3], output=9)], 3.0, Objectives())
    assert summary.tpot is not None and summary.itl is not None
    assert summary.tpot.mean == pytest.approx(2 / 8) and summary.itl.mean == pytest.approx(1)
    assert summary.total_output_tokens == 9 and summary.pieces == 3


def test_without_the_servers_count_tokens_are_counted_here_and_it_is_said() -> None:
    made = exchange(0, [1, 2, 3])
    assert summarise([made], 3.0, Objectives()).total_output_tokens == 3
    counted = summarise([made], 3.0, Objectives(), count_tokens=lambda text: 2 * len(text))
    assert counted.total_output_tokens == 6 and counted.uncounted_outputs == 1


def test_peaks_are_of_seconds_since_the_first_request_and_of_moments() -> None:
    summary = summarise([exchange(5, [5.5, 5.6]), exchange(5.7, [6.8]), exchange(6.9, [7.4])], 3.0, Objectives())
    assert summary.max_output_tokens_per_s == 2  # 5.5 and 5.6
    assert summary.max_concurrent_requests == 2  # both of the first second; each of the next ran with one other
    assert summary.most_in_flight == 1


def test_a_run_without_answers_has_figures_of_nothing() -> None:
    summary = summarise([exchange(0, [], failure=Failure("connection refused", "no"))], 1.0, Objectives(ttft=1))
    assert summary.ttft is None and summary.request_goodput == 0 and summary.failures == {"connection refused": 1}
    assert figures(summary)["mean_ttft_ms"] is None


def test_a_request_of_one_token_meets_any_limit_of_tpot_and_is_in_no_figure_of_it() -> None:
    summary = summarise([exchange(0, [1], output=1)], 1.0, Objectives.parse(["tpot:0.001"]))
    assert summary.request_goodput == 1 and summary.tpot is None


@pytest.mark.parametrize("texts", [["itl:5"], ["ttft"], ["ttft:x"], ["ttft:0"], ["ttft:5", "ttft:6"], ["ttft:nan"]])
def test_objectives_of_no_meaning_are_refused(texts: list[str]) -> None:
    with pytest.raises(ConfigError, match="--goodput"):
        Objectives.parse(texts)
