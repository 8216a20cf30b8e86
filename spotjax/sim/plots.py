"""Pictures of simulated runs: what happened over time, and how systems compare. matplotlib is the extra ``plot``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from spotjax.errors import ConfigError
from spotjax.sim.distribution import Seconds
from spotjax.sim.results import Outcome
from spotjax.sim.statistics import mean_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POINTS = 20_000
"""Requests up to which each is a point of its own; more are summed up in percentiles."""
STEPS = 1000
"""Times at which queues are looked at, and quantiles of a curve."""
SLICES = 200
"""Slices of time for percentiles of many requests."""
LABEL_GAP = 0.12
"""Share of the width that the name of a shape needs."""


def plot_timeline(outcomes: Sequence[Outcome], path: Path) -> None:
    """One column for each run; downwards: instances, devices of the mesh and its shape, queue, latency by arrival.

    Raises:
      ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    figure = _figure(max(6.0, 4.5 * len(outcomes)), 9.0)
    grid = figure.subplots(4, len(outcomes), sharex=True, sharey="row", squeeze=False)
    for number, outcome in enumerate(outcomes):
        column: list[Axes] = list(grid[:, number])
        column[0].set_title(f"{outcome.system}, seed {outcome.seed}")
        _instances(column[0], outcome)
        _mesh(column[1], outcome)
        _queue(column[2], outcome)
        _latencies(column[3], outcome)
        column[3].set_xlim(0, outcome.duration)
        column[3].set_xlabel("seconds")
    for axes, name in zip(grid[:, 0], ("instances", "devices of the mesh", "requests", "latency [s]"), strict=True):
        axes.set_ylabel(name)
        axes.set_ylim(bottom=0)  # not before all columns are drawn: it ends the scaling of the row
    figure.suptitle(outcomes[0].scenario)
    _save(figure, path)


def plot_comparison(systems: Mapping[str, Sequence[Outcome]], path: Path) -> None:
    """Latencies of all seeds together as curves, and P99 as bars with its confidence interval over seeds.

    Args:
      systems: runs by the name to show, one run for each seed.

    Raises:
      ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    figure = _figure(11.0, 4.5)
    curves, bars = figure.subplots(1, 2)
    for number, (name, outcomes) in enumerate(systems.items()):
        latency = np.concatenate([outcome.latency() for outcome in outcomes])
        if len(latency):
            shares = np.linspace(0, 1, STEPS)
            curves.plot(np.quantile(latency, shares), shares, color=f"C{number}", label=name)
        tails = [float(np.percentile(outcome.latency(), 99)) for outcome in outcomes if len(outcome)]
        if tails:
            known = mean_interval(tails)
            error = 0.0 if known.high is None else known.high - known.mean
            bars.bar(name, known.mean, yerr=error, color=f"C{number}", capsize=4)
    curves.set_xscale("log")
    curves.set_xlabel("latency [s], with the age of unfinished requests")
    curves.set_ylabel("share of requests")
    curves.legend(loc="lower right")
    curves.grid(alpha=0.3)
    bars.set_ylabel("P99 latency [s]")
    bars.set_ylim(bottom=0)
    bars.tick_params(axis="x", rotation=20)
    _save(figure, path)


def _instances(axes: Axes, outcome: Outcome) -> None:
    times, counts = _steps(outcome.instances, outcome.duration)
    axes.fill_between(times, counts, step="post", color="tab:green", alpha=0.3)
    axes.step(times, counts, where="post", color="tab:green")


def _mesh(axes: Axes, outcome: Outcome) -> None:
    """Devices as steps, shapes as text where there is room for it, stops as grey bands."""
    sizes = [(change.seconds, 0 if change.shape is None else change.shape.devices) for change in outcome.changes]
    times, devices = _steps(sizes, outcome.duration)
    axes.step(times, devices, where="post", color="tab:blue")
    for change in outcome.changes:
        if change.stall:
            axes.axvspan(change.seconds - change.stall, change.seconds, color="0.8")
    labelled = -outcome.duration
    for change in outcome.changes:
        if change.seconds - labelled >= LABEL_GAP * outcome.duration:
            shape, height = ("none", 0) if change.shape is None else (str(change.shape), change.shape.devices)
            axes.annotate(shape, (change.seconds, height), xytext=(2, 3), textcoords="offset points", fontsize=8)
            labelled = change.seconds
    axes.margins(y=0.15)


def _queue(axes: Axes, outcome: Outcome) -> None:
    times = np.linspace(0, outcome.duration, STEPS)
    axes.plot(times, outcome.unfinished(times), color="tab:blue", label="unfinished")
    axes.plot(times, outcome.waiting(times), color="tab:orange", label="without a token")
    axes.legend(loc="upper left", fontsize=8)


def _latencies(axes: Axes, outcome: Outcome) -> None:
    latency, finished = outcome.latency(), outcome.finished
    if len(outcome) <= POINTS:
        axes.scatter(outcome.arrival[finished], latency[finished], s=6, color="tab:blue", label="finished")
        if not finished.all():
            axes.scatter(outcome.arrival[~finished], latency[~finished], s=6, color="tab:red", label="age, unfinished")
    else:
        for name, share, colour in (("P99", 99, "tab:red"), ("P50", 50, "tab:blue")):
            axes.plot(*_percentile_by_arrival(outcome.arrival, latency, share), color=colour, label=name)
    axes.legend(loc="upper left", fontsize=8)


def _percentile_by_arrival(arrival: Seconds, latency: Seconds, share: int) -> tuple[Seconds, Seconds]:
    """(Middle, percentile) of slices of time that have requests."""
    edges = np.linspace(arrival[0], arrival[-1], SLICES + 1)
    parts = np.split(latency, np.searchsorted(arrival, edges[1:-1]))
    some = np.array([len(part) > 0 for part in parts])
    middles = (edges[:-1] + edges[1:])[some] / 2
    return middles, np.array([np.percentile(part, share) for part in parts if len(part)])


def _steps(changes: Sequence[tuple[float, int]], end: float) -> tuple[list[float], list[int]]:
    """Times and values of a step function from 0 s to the end, 0 before its first change."""
    whole = [(0.0, 0), *changes, (end, changes[-1][1] if changes else 0)]
    return [seconds for seconds, _ in whole], [value for _, value in whole]


def require_matplotlib() -> None:
    """Verifies that pictures can be drawn.

    Raises:
      ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as problem:
        raise ConfigError("plots need matplotlib: pip install 'spotjax[plot]'") from problem


def _figure(width: float, height: float) -> Figure:
    """One that draws into files only, whatever screen there is (Agg)."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> None:
    try:
        figure.savefig(path)
    except (OSError, ValueError) as problem:
        raise ConfigError(f"the plot cannot be written: {problem}") from problem
