"""A race is simulated with what was measured in it, in every recovery policy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spotjax.errors import ConfigError
from spotjax.planner.demand import Demand
from spotjax.planner.latency import Stage, Work
from spotjax.planner.profile import MeasuredProfile, Sample
from spotjax.tools.live_race import Answer, Run
from spotjax.tools.live_trace import Workload, parse_trace, questions
from spotjax.tools.race_prediction import predict, table
from spotjax.tools.race_results import document, read_race, summary
from spotjax.tools.random_model import random_config

TRACE = parse_trace("0 join a\n0 join b\n0 join c\n0 join d\n10 kill a\n14 join e\n30 leave b\n")
EXPECTED = {f"q{number}": (1,) * 8 for number in range(3)}


def write_race(path: Path, profiled: bool = True) -> Path:
    """A race of a minute that never ran, of a model two instances of which hold a replica."""
    stages = [Stage(layers, True, True) for layers in (2, 4)]
    samples = [Sample(stage, 1, Work.prefill(64), 0.05 * stage.layers) for stage in stages]
    samples += [Sample(stage, 1, Work.decode(batch, 100), 0.005 * stage.layers) for stage in stages for batch in (1, 4)]
    profile = MeasuredProfile("m", "h", tuple(samples), 1e-4, 1e9, 64) if profiled else None
    times = [float(second) for second in range(1, 41, 2)]
    workload = Workload.drawn("poisson", times, questions(3, (30, 60), (8, 8), 100, 0), 0)
    answers = [
        Answer(asked.name, at, [1] * 8, [at + 1 + n * 0.1 for n in range(8)], 0, at + 1.7)
        for asked, at in zip(workload.asked, times, strict=True)
    ]
    runs = [Run(recovery, "poisson", answers, 60.0) for recovery in ("spotjax", "reparallelization", "rerouting")]
    summaries = [summary(run, EXPECTED, TRACE, 6.0, 1.0) for run in runs]
    written = document(
        {"seed": 0}, None, random_config(128, 4), 10**8, Demand(batch=4, prompt=45, output=8, kv_pages=64), "2x2x1",
        TRACE, 6.0, [workload], runs, summaries, [{"batch": 1}], profile,
    )  # fmt: skip
    path.write_text(json.dumps(written))
    return path


def test_every_policy_is_simulated_on_the_same_requests_and_losses(tmp_path: Path) -> None:
    found = {one.recovery: one.summary for one in predict(read_race(write_race(tmp_path / "race.json")))}
    assert found.keys() == {"spotjax", "reparallelization", "rerouting"}
    for one in found.values():
        assert (one.requests, one.finished, one.lost) == (20, 20, 0)
    assert found["spotjax"].bytes_loaded <= min(found[name].bytes_loaded for name in ("reparallelization", "rerouting"))
    assert found["spotjax"].number("latency.mean") <= found["reparallelization"].number("latency.mean")
    assert table(tmp_path / "race.json").row_count == 3


def test_a_race_without_a_profile_cannot_be_simulated(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a profile is needed"):
        predict(read_race(write_race(tmp_path / "race.json", profiled=False)))
