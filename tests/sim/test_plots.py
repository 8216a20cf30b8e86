import builtins
from pathlib import Path

import numpy as np
import pytest
from results_cases import FixedTime, outcome, scenario

from spotjax.errors import ConfigError
from spotjax.sim import plots
from spotjax.sim.workload import RequestTrace, by_counts

pytest.importorskip("matplotlib")

SPOT = by_counts("some", [(0, 3), (30, 2), (60, 4)], 100.0)
BUSY = scenario(RequestTrace.of("busy", np.linspace(0, 95, 40), 6, 5), SPOT)


def is_picture(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


def test_timelines_and_comparisons_are_drawn(tmp_path: Path) -> None:
    runs = {name: [outcome(FixedTime(s), BUSY, seed) for seed in (0, 1)] for name, s in (("fast", 1.0), ("slow", 9.0))}
    plots.plot_timeline([runs["fast"][0], runs["slow"][0]], tmp_path / "timeline.png")
    plots.plot_comparison(runs, tmp_path / "comparison.png")
    assert is_picture(tmp_path / "timeline.png") and is_picture(tmp_path / "comparison.png")


def test_every_column_of_a_timeline_fits_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    fast, slow = outcome(FixedTime(1.0), BUSY), outcome(FixedTime(9.0), BUSY)
    plots.plot_timeline([fast, slow], Path("unused"))
    instances, mesh, queue, latency = (row[0].get_ylim() for row in np.array(figures[0].axes).reshape(4, 2))
    assert instances[0] == mesh[0] == queue[0] == latency[0] == 0
    assert instances[1] >= 4 and mesh[1] >= 4
    assert queue[1] >= slow.unfinished(np.linspace(0, 100, 1000)).max() and latency[1] >= slow.latency().max()


def test_runs_without_requests_are_drawn(tmp_path: Path) -> None:
    empty = outcome(FixedTime(1.0), scenario(RequestTrace.of("none", [], 1, 1)))
    plots.plot_timeline([empty], tmp_path / "timeline.png")
    assert is_picture(tmp_path / "timeline.png")


def test_many_requests_are_drawn_as_percentiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "POINTS", 10)
    plots.plot_timeline([outcome(FixedTime(1.0), BUSY)], tmp_path / "many.png")
    assert is_picture(tmp_path / "many.png")


def test_percentiles_by_arrival_are_those_of_the_slices_that_have_requests() -> None:
    arrival = np.array([0.0, 1.0, 2.0, 100.0, 199.0, 200.0])
    latency = np.array([5.0, 7.0, 1.0, 9.0, 2.0, 4.0])
    middles, values = plots._percentile_by_arrival(arrival, latency, 50)  # slices of one second
    assert middles.tolist() == [0.5, 1.5, 2.5, 100.5, 199.5] and values.tolist() == [5, 7, 1, 9, 3]


def test_steps_go_from_the_start_to_the_end() -> None:
    assert plots._steps([(10, 2), (20, 5)], 60.0) == ([0, 10, 20, 60], [0, 2, 5, 5])
    assert plots._steps([], 60.0) == ([0, 60], [0, 0])


def test_what_cannot_be_written_or_drawn_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = outcome(FixedTime(1.0), BUSY)
    for wrong in (tmp_path / "nowhere" / "a.png", tmp_path / "a.banana"):
        with pytest.raises(ConfigError, match="cannot be written"):
            plots.plot_timeline([run], wrong)

    def without(name, *arguments, real=builtins.__import__):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"spotjax\[plot\]"):
        plots.plot_comparison({"one": [run]}, tmp_path / "a.png")
