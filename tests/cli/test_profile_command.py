"""``spotjax profile`` measures on this machine's devices, and ``spotjax plan --profile`` reads what it wrote."""

import json

import pytest

from spotjax import cli
from spotjax.models.catalog import open_model
from spotjax.planner.profile import MeasuredProfile
from spotjax.tools import record_profile


@pytest.fixture
def few_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_profile, "BATCHES", (1, 2))
    monkeypatch.setattr(record_profile, "CONTEXTS", (32,))
    monkeypatch.setattr(record_profile, "PROMPTS", (16,))


@pytest.mark.usefixtures("few_sizes")
def test_a_recorded_profile_holds_what_was_measured_and_is_what_a_plan_goes_by(capsys, tmp_path) -> None:
    file = tmp_path / "tiny.json"
    arguments = ("--model", "tiny", "--layers", "1", "--repeats", "1", "--tensor", "1", "2")
    assert cli.main(["profile", *arguments, "--out", str(file)]) == 0
    assert "12 samples, median error of left-out ones" in capsys.readouterr().out

    profile = MeasuredProfile.from_json(file.read_text())
    # Two degrees, a stage with logits and one without, decode steps of two sizes and one prompt.
    assert len(profile.samples) == 12 and {sample.tensor for sample in profile.samples} == {1, 2}
    assert {(sample.work.sequences, sample.work.tokens) for sample in profile.samples} == {(1, 1), (2, 2), (1, 16)}
    assert all(0 < sample.seconds < 60 for sample in profile.samples)
    assert profile.hop_latency > 0 and profile.hop_bandwidth > 0
    assert profile.token_bytes == 4 * open_model("tiny").checkpoint.spec.config.width

    plan = ["plan", "--model", "tiny", "--instances", "1xg4dn.12xlarge", "--profile", str(file), "--json"]
    assert cli.main(plan) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["latencies"].startswith("measured: tiny on ")
    shapes = [candidate["shape"] for candidate in (planned["chosen"], *planned["runner_ups"])]
    assert {shape.split("x")[2] for shape in shapes} == {"1", "2"}, "only measured tensor degrees are offered"


def test_tensor_degrees_beyond_the_devices_are_refused(capsys, tmp_path) -> None:
    code = cli.main(["profile", "--model", "tiny", "--tensor", "6000", "--out", str(tmp_path / "none.json")])
    assert code == 2 and "tensor degree 6000 needs as many devices" in capsys.readouterr().err
    assert not (tmp_path / "none.json").exists()
