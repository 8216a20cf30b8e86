import json
from random import Random

import pytest

from spotjax.errors import ConfigError
from spotjax.planner.latency import Stage, Work
from spotjax.planner.profile import MeasuredProfile, Sample


def true_seconds(stage: Stage, work: Work) -> float:
    """A machine that the model describes exactly."""
    per_layer = 2e-4 + 1e-5 * work.tokens + 1e-8 * work.pairs
    return 1e-3 + stage.layers * per_layer + stage.last * (5e-4 + 1e-4 * work.sequences)


WORKS = [Work.decode(b, c) for b in (1, 4, 8) for c in (64, 512)] + [Work.prefill(t) for t in (16, 64, 256)]
STAGES = [Stage(n, True, last) for n in (1, 2, 4) for last in (False, True)]


def profile_of(noise: float = 0.0, tensor: int = 1) -> MeasuredProfile:
    chance = Random(5)
    samples = tuple(
        Sample(stage, tensor, work, true_seconds(stage, work) * (1 + chance.uniform(-noise, noise)))
        for stage in STAGES
        for work in WORKS
    )
    return MeasuredProfile("model", "machine", samples, 1e-4, 1e9, 1024)


def test_an_exact_machine_is_predicted_exactly_beyond_what_was_measured() -> None:
    profile = profile_of()
    for stage, work in [(Stage(40, True, True), Work.decode(6, 300)), (Stage(11, False, False), Work.prefill(128))]:
        assert profile.stage_seconds(stage, 1, work) == pytest.approx(true_seconds(stage, work), rel=1e-3)
    assert profile.held_out_error() < 1e-3


def test_noise_is_averaged_out() -> None:
    noisy = profile_of(noise=0.1)
    stage, work = Stage(20, True, True), Work.decode(8, 512)
    assert noisy.stage_seconds(stage, 1, work) == pytest.approx(true_seconds(stage, work), rel=0.1)
    assert 0.01 < noisy.held_out_error() < 0.12


def test_tensor_degrees_that_were_not_measured_are_not_offered() -> None:
    assert profile_of(tensor=2).stage_seconds(STAGES[0], 1, WORKS[0]) == float("inf")
    assert profile_of().hop_seconds(1000) == pytest.approx(1e-4 + 1024e-6)


def test_what_is_written_is_read() -> None:
    profile = profile_of()
    assert MeasuredProfile.from_json(profile.to_json()) == profile


def test_other_files_and_other_versions_are_refused() -> None:
    with pytest.raises(ConfigError, match="not a recorded profile"):
        MeasuredProfile.from_json("[1, 2]")
    content = json.loads(profile_of().to_json())
    with pytest.raises(ConfigError, match="has format 9, this version reads 1"):
        MeasuredProfile.from_json(json.dumps(content | {"format": 9}))
