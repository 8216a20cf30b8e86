import json
from dataclasses import fields
from pathlib import Path

import pytest

from spotjax import cli
from spotjax.commands.simulate import flag_of
from spotjax.sim.assumptions import Assumptions
from spotjax.sim.records import decode
from spotjax.sim.systems.registry import SYSTEMS

TINY = ("--model", "opt-6.7b", "--spot", "constant:instances=2,duration=60")
REQUESTS = ("--requests", "poisson:rate=0.5")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(["simulate", *arguments])
    return code, *capsys.readouterr()


def recorded(capsys: pytest.CaptureFixture[str], path: Path, *arguments: str):
    code, _, problem = run(capsys, *arguments, "--json", str(path))
    assert code == 0, problem
    return decode(path.read_bytes())


def test_systems_are_compared_over_seeds(capsys, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    code, out, _ = run(capsys, *TINY, *REQUESTS, "--systems", "spotjax,on-demand:1", "--seeds", "2")
    assert code == 0
    for shown in (
        "opt-6.7b, constant:instances=2,duration=60, poisson:rate=0.5",
        "2 seeds",
        "±",
        "P99",
        "USD",
        "stall",
    ):
        assert shown in out
    assert "on-demand:1 over spotjax: P99 latency" in out and "USD per token" in out


def test_the_file_holds_every_run_and_what_was_assumed(capsys, tmp_path) -> None:
    file = recorded(
        capsys, tmp_path / "a.json", *TINY, *REQUESTS, "--systems", "spotjax,on-demand:1", "--seeds", "2",
        "--first-seed", "5", "--notice", "7", "--scale", "2",
    )  # fmt: skip
    assert [(r.summary.system, r.summary.seed) for r in file.runs] == [
        ("spotjax", 5), ("spotjax", 6), ("on-demand:1", 5), ("on-demand:1", 6)
    ]  # fmt: skip
    assert file.assumptions["notice_seconds"] == 7 and file.assumptions["scale"] == 2
    assert set(file.assumptions) == {field.name for field in fields(Assumptions)}
    one, _, rented, _ = (record.summary for record in file.runs)
    assert one.requests == rented.requests > 10 and one.requests == one.finished + one.censored
    assert (one.spot_hours, one.on_demand_hours) == (pytest.approx(2 / 60), 0)
    assert (rented.spot_hours, rented.on_demand_hours) == (0, pytest.approx(1 / 60))
    assert all(record.columns == {} for record in file.runs)


def test_the_same_seed_gives_the_same_numbers_and_another_one_others(capsys, tmp_path) -> None:
    first, again, other = (
        recorded(capsys, tmp_path / "a.json", *TINY, *REQUESTS, "--systems", "spotjax", "--first-seed", seed)
        for seed in ("0", "0", "1")
    )
    assert first == again and first.runs[0].summary.latency != other.runs[0].summary.latency


def test_requests_are_written_on_request_and_traces_are_cut_stretched_and_clipped(capsys, tmp_path) -> None:
    trace, path = tmp_path / "requests.csv", tmp_path / "a.json"
    trace.write_text("seconds,prompt,output\n0,700,9\n10,20,300\n20,20,9\n90,20,9\n")
    system = ("--systems", "spotjax", "--requests", str(trace))
    columns = recorded(capsys, path, *TINY, *system, "--json-requests").runs[0].columns
    assert columns["arrival"] == [0, 10, 20] and columns["prompt"] == [700, 20, 20] and columns["output"] == [9, 300, 9]
    assert columns["finish"][0] is not None and 0 < columns["first_token"][0] < columns["finish"][0]
    cut = ("--request-window", "5:50", "--max-prompt", "10", "--max-output", "8", "--rate", "1", "--json-requests")
    columns = recorded(capsys, path, *TINY, *system, *cut).runs[0].columns
    assert columns["arrival"][1] - columns["arrival"][0] == pytest.approx(1)
    assert columns["prompt"] == [10, 10] and columns["output"] == [8, 8]
    shorter = recorded(capsys, path, *TINY, *system, "--spot-window", "0:15", "--spot-limit", "1").runs[0]
    assert shorter.summary.duration == 15 and shorter.summary.requests == 2 and shorter.instances == ((0.0, 1),)


def test_segments_of_the_paper_set_their_start_up_time_unless_it_is_given(capsys, tmp_path) -> None:
    tiny = ("--model", "gpt-20b", "--spot", "A_S", "--requests", "artifact:rate=0.01", "--systems", "spotjax")
    assert recorded(capsys, tmp_path / "a.json", *tiny).assumptions["start_seconds"] == 120
    assert recorded(capsys, tmp_path / "a.json", *tiny, "--start", "60").assumptions["start_seconds"] == 60


@pytest.mark.parametrize("requests", ["gamma:rate=0.3,cv=2,prompt_cv=1,output_cv=1", "fluctuating", "fluctuating:cv=2"])
def test_every_generator_of_requests_is_at_hand(capsys, tmp_path, requests) -> None:
    spot = ("--model", "opt-6.7b", "--spot", "market:instances=3,duration=200", "--systems", "spotjax")
    summary = recorded(capsys, tmp_path / "a.json", *spot, "--requests", requests).runs[0].summary
    assert summary.requests > 5 and summary.duration == 200 and summary.scenario.endswith(requests)


def test_cost_is_split_by_tokens_or_by_time(capsys, tmp_path) -> None:
    tiny = (*TINY, *REQUESTS, "--systems", "spotjax")
    tokens = recorded(capsys, tmp_path / "a.json", *tiny).runs[0].summary
    time = recorded(capsys, tmp_path / "a.json", *tiny, "--split-cost", "time").runs[0].summary
    assert tokens.prefill_share is None and 0 < time.prefill_share < 1
    assert tokens.usd_per_million_prompt_tokens == pytest.approx(tokens.usd_per_million_output_tokens)
    assert time.usd_per_million_prompt_tokens < time.usd_per_million_output_tokens
    assert tokens.usd_per_million_tokens == time.usd_per_million_tokens


def test_models_without_published_tables_run_on_the_roofline(capsys, tmp_path) -> None:
    case = ("--model", "llama-3-8b", "--instance-type", "g5.12xlarge", "--spot", "constant:instances=1,duration=30")
    summary = recorded(capsys, tmp_path / "a.json", *case, *REQUESTS, "--systems", "spotjax").runs[0].summary
    assert summary.finished > 0
    code, _, problem = run(capsys, *case, *REQUESTS, "--systems", "spotserve")
    assert code == 2 and "tables of opt-6.7b" in problem


def test_pictures_are_drawn(capsys, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    one, other = tmp_path / "timeline.png", tmp_path / "comparison.png"
    drawn = ("--systems", "spotjax", "--plot", str(one), "--plot-comparison", str(other))
    assert run(capsys, *TINY, *REQUESTS, *drawn)[0] == 0
    assert one.read_bytes().startswith(b"\x89PNG") and other.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--model", "banana"), "'banana'"),
        (("--instance-type", "banana"), "'banana'"),
        (("--spot", "banana"), "--spot: there is no file 'banana', and it is none of A_S"),
        (("--requests", "banana"), "--requests: there is no file 'banana', and it is none of gamma"),
        (("--requests", "gamma:rate=1"), "gamma needs cv"),
        (("--requests", "gamma:rate=1,cv=0"), "cv must be more than 0"),
        (("--requests", "poisson:rate=fast"), "rate of poisson must be a number, got 'fast'"),
        (("--requests", "poisson:rate=inf"), "must be finite"),
        (("--requests", "poisson:speed=1"), "poisson has no parameter 'speed'"),
        (("--requests", "poisson:rate=1,prompt=0"), "mean 0"),
        (("--spot", "market:instances=0"), "instances must be a whole number"),
        (("--spot", "constant:instances=1.5,duration=9"), "instances must be a whole number"),
        (("--spot", "constant:instances=1,duration=0"), "covers no time"),
        (("--spot-window", "9"), "--spot-window is START:STOP"),
        (("--spot-window", "50:70"), "a window from 50.0 s to 70.0 s"),
        (("--request-window", "a:b"), "--request-window is START:STOP"),
        (("--spot-limit", "0"), "--spot-limit must be at least 1"),
        (("--tensor-instances", "0"), "--tensor-instances must be at least 1"),
        (("--max-prompt", "0"), "at least one prompt"),
        (("--rate", "-1"), "cannot scale"),
        (("--systems", "banana"), "no system is known as 'banana'"),
        (("--systems", "spotjax,spotjax"), "--systems: different names"),
        (("--systems", " , "), "--systems: different names"),
        (("--systems", "on-demand"), "on-demand:N"),
        (("--systems", "spotjax:none"), "a number of on-demand instances follows the colon"),
        (("--systems", "spotjax:0"), "a number of on-demand instances follows the colon"),
        (("--seeds", "0"), "--seeds must be at least 1"),
        (("--first-seed", "-1"), "--first-seed not negative"),
        (("--required-rate", "0"), "--required-rate must be more than 0"),
        (("--notice", "-1"), "notice_seconds must not be negative"),
        (("--json-requests",), "--json-requests needs --json"),
        (("--json", "/nonexistent/a.json"), "--json: there is no directory /nonexistent"),
        (("--plot-comparison", "/nonexistent/a.png"), "--plot-comparison: there is no directory"),
        (("--profile", "/nonexistent"), "the profile cannot be read"),
    ],
)
def test_wrong_arguments_are_refused_by_name(capsys, arguments, problem) -> None:
    code, _, said = run(capsys, *TINY, *REQUESTS, "--systems", "spotjax", *arguments)
    assert code == 2 and problem in said


def test_a_bad_line_is_named_with_its_file(capsys, tmp_path) -> None:
    trace = tmp_path / "requests.csv"
    trace.write_text("seconds,prompt,output\n0,7,9\nsoon,20,300\n")
    code, _, said = run(capsys, *TINY, "--requests", str(trace), "--systems", "spotjax")
    assert code == 2 and f"{trace}, line 3" in said


def test_seeds_make_no_sense_where_nothing_is_drawn(capsys, tmp_path) -> None:
    trace = tmp_path / "requests.csv"
    trace.write_text("seconds,prompt,output\n0,7,9\n")
    code, _, said = run(capsys, *TINY, "--requests", str(trace), "--systems", "spotjax", "--seeds", "2")
    assert code == 2 and "neither --spot nor --requests is drawn" in said


def test_a_file_that_cannot_be_written_is_said(capsys, tmp_path) -> None:
    code, _, said = run(capsys, *TINY, *REQUESTS, "--systems", "spotjax", "--json", str(tmp_path))
    assert code == 2 and "cannot be written" in said


def test_help_names_every_system_assumption_and_its_default(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit):
        cli.main(["simulate", "--help"])
    out = capsys.readouterr().out
    for field in fields(Assumptions):
        assert flag_of(field.name) in out and f"(default: {field.default:g} {field.metadata['unit']})" in out
    plain = {name.removeprefix("spotjax-no-") for name in SYSTEMS}
    assert all(name in out for name in plain) and "spotjax-no-X" in out


def test_the_json_is_json_with_the_documented_names(capsys, tmp_path) -> None:
    recorded(capsys, tmp_path / "a.json", *TINY, *REQUESTS, "--systems", "spotjax")
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["version"] == 1 and set(content["runs"][0]) == {"summary", "instances", "changes", "columns"}
    assert content["runs"][0]["summary"]["latency"]["p99"] > 0
    assert content["runs"][0]["changes"][0]["shape"].keys() == {"data", "stage", "tensor"}
