import json

import pytest

from spotjax import cli


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(["plan", *arguments])
    return code, *capsys.readouterr()


GPT = ("--model", "gpt-20b", "--rate", "0.35")


def test_the_chosen_mesh_the_runner_ups_and_why_they_lost_are_shown(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    code, out, _ = run(capsys, *GPT, "--instances", "7xg4dn.12xlarge")
    assert code == 0
    assert "SpotServe's published T4 tables" in out and "3x2x4 is chosen: least latency" in out
    assert "2x3x4: higher latency" in out and "not needed: i-6" in out
    assert "230 GiB come from the checkpoint" in out and "timeline" in out


def test_the_state_of_one_plan_is_where_the_next_one_starts(capsys, tmp_path) -> None:
    _, out, _ = run(capsys, *GPT, "--instances", "6xg4dn.12xlarge", "--json")
    state = tmp_path / "state.json"
    state.write_text(out)
    same = json.loads(run(capsys, *GPT, "--instances", "6xg4dn.12xlarge", "--from", str(state), "--json")[1])
    assert same["placement"]["devices"] == json.loads(out)["placement"]["devices"]
    assert same["migration"]["bytes_moved"] == same["migration"]["bytes_loaded"] == 0
    fewer = json.loads(run(capsys, *GPT, "--instances", "5xg4dn.12xlarge", "--from", str(state), "--json")[1])
    assert {device["instance"] for device in fewer["placement"]["devices"]} <= {f"i-{n}" for n in range(5)}
    assert fewer["migration"]["bytes_moved"] > 0 == fewer["migration"]["bytes_loaded"]
    assert fewer["migration"]["sequences_kept"] == 12
    shown = run(capsys, *GPT, "--instances", "5xg4dn.12xlarge", "--from", str(state))[1]
    assert "from" in shown and "ready after the stop: stage 0" in shown


def test_targets_ceilings_and_meshes_are_taken_into_account(capsys) -> None:
    instances = ("--instances", "9xg4dn.12xlarge", "--json")
    cheap = json.loads(run(capsys, *GPT, *instances, "--latency-target", "60")[1])["chosen"]
    fast = json.loads(run(capsys, *GPT, *instances)[1])["chosen"]
    assert cheap["cost_per_hour"] < fast["cost_per_hour"] and cheap["percentile_seconds"] <= 60
    assert json.loads(run(capsys, *GPT, *instances, "--mesh", "1x3x4")[1])["chosen"]["shape"] == "1x3x4"
    code, _, problem = run(capsys, *GPT, *instances, "--cost-ceiling", "1")
    assert code == 1 and "the ceiling is 1.00" in problem


def test_with_a_load_the_instances_to_request_or_to_release_are_told(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    few = ("--model", "gpt-20b", "--rate", "1.5", "--instances", "4xg4dn.12xlarge")
    capacity = json.loads(run(capsys, *few, "--json")[1])["capacity"]
    missing = capacity["target"]["instances"] - 4
    assert capacity["request_spot"] == capacity["request_on_demand"] == missing > 0
    assert capacity["release"] == [] and capacity["target"]["rate"] > 1.5
    assert f"request {missing} x g4dn.12xlarge as spot and {missing} on demand at once" in run(capsys, *few)[1]

    many = ("--model", "gpt-20b", "--rate", "0.35", "--instances", "14xg4dn.12xlarge", "--cost-ceiling", "12")
    capacity = json.loads(run(capsys, *many, "--json")[1])["capacity"]
    assert capacity["target"]["instances"] == 6 and capacity["spares"] == 2 and capacity["request_spot"] == 0
    assert capacity["release"] == [f"i-{n}" for n in range(13, 7, -1)]
    assert "release i-13, i-12, i-11, i-10, i-9, i-8; keep 2 as spares" in run(capsys, *many)[1]


def test_what_can_be_had_bounds_the_request_and_nothing_is_requested_without_a_load(capsys) -> None:
    load = ("--model", "gpt-20b", "--rate", "1.5", "--instances", "4xg4dn.12xlarge", "--json")
    assert json.loads(run(capsys, *load, "--available", "2")[1])["capacity"]["request_spot"] == 2
    unloaded = ("--model", "gpt-20b", "--instances", "4xg4dn.12xlarge", "--json")
    assert json.loads(run(capsys, *unloaded)[1])["capacity"] is None
    assert json.loads(run(capsys, *load, "--mesh", "1x3x4")[1])["capacity"] is None


def test_tensor_groups_span_instances_if_asked_to(capsys) -> None:
    plan = ("--model", "gpt-20b", "--instances", "4xg4dn.12xlarge", "--json", "--mesh", "1x2x8")
    chosen = json.loads(run(capsys, *plan, "--tensor-instances", "2")[1])
    assert chosen["chosen"]["shape"] == "1x2x8" and chosen["chosen"]["instances"] == 4
    by_instance = [device["instance"] for device in chosen["placement"]["devices"]]
    assert by_instance == [f"i-{n}" for n in range(4) for _ in range(4)]
    assert json.loads(run(capsys, *plan)[1])["chosen"]["shape"] != "1x2x8"


def test_models_without_published_tables_use_the_roofline_or_a_recorded_profile(capsys, tmp_path) -> None:
    instances = ("--model", "llama-3-70b", "--instances", "4xp5.48xlarge", "--json")
    assert json.loads(run(capsys, *instances)[1])["latencies"] == "analytic roofline"
    code, _, problem = run(capsys, *instances, "--profile", "published")
    assert code == 2 and "tables are published for" in problem
    wrong = tmp_path / "wrong.json"
    wrong.write_text("{}")
    code, _, problem = run(capsys, *instances, "--profile", str(wrong))
    assert code == 2 and "record one with spotjax profile" in problem
    code, _, problem = run(capsys, *instances, "--profile", str(tmp_path / "none.json"))
    assert code == 2 and "cannot be read" in problem


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--instances", "seven"), "COUNTxTYPE"),
        (("--instances", "2xbanana"), "no instance type is known as 'banana'"),
        (("--instances", "2xg4dn.12xlarge", "--mesh", "1x1"), "a mesh shape is"),
        (("--instances", "4xg4dn.12xlarge", "--batch", "0"), "batch must be at least 1"),
        (("--instances", "4xg4dn.12xlarge", "--tensor-instances", "0"), "--tensor-instances must be at least 1"),
        (("--instances", "4xg4dn.12xlarge", "--available", "-1"), "--available must not be negative"),
        (("--instances", "4xg4dn.12xlarge", "--rate", "-1"), "rate must not be negative"),
        (("--instances", "4xg4dn.12xlarge", "--from", "/nonexistent/state.json"), "holds no placement"),
    ],
)
def test_wrong_arguments_are_refused_by_name(capsys, arguments, problem) -> None:
    code, _, said = run(capsys, "--model", "gpt-20b", *arguments)
    assert code == 2 and problem in said


def test_the_timeline_is_drawn(capsys, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "plan.png"
    assert run(capsys, *GPT, "--instances", "4xg4dn.12xlarge", "--plot", str(picture))[0] == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
