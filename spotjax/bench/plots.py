"""Pictures of runs: distributions of times, what came when, how a sweep went. matplotlib is the extra ``plot``."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from spotjax.bench.statistics import answer_times, seconds_of_the_run
from spotjax.bench.sweep import Result
from spotjax.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

QUANTILES = np.linspace(0, 1, 501)


def plot(results: Sequence[Result], title: str, path: Path) -> None:
    """Four fields: TTFT, ITL and E2EL of each run as curves, and throughput over time or over the sweep.

    Raises:
      ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    grid = figure.subplots(2, 2)
    for result in results:
        complete = [exchange for exchange in result.run.exchanges if exchange.failure is None]
        times = [answer_times(exchange) for exchange in complete]
        gaps = [later - earlier for exchange in complete for earlier, later in pairwise(exchange.times)]
        _curve(grid[0, 0], [answer.ttft for answer in times], result.point.name)
        _curve(grid[0, 1], gaps, result.point.name)
        _curve(grid[1, 0], [answer.e2el for answer in times], result.point.name)
    names = ("time to first token [ms]", "inter-token latency [ms]", "end-to-end latency [ms]")
    for axes, name in zip((grid[0, 0], grid[0, 1], grid[1, 0]), names, strict=True):
        axes.set_xlabel(name)
        axes.set_ylabel("share of requests" if "inter" not in name else "share of pieces")
        axes.set_ylim(0, 1)
        axes.grid(alpha=0.3)
    if grid[0, 0].lines:
        grid[0, 0].legend(fontsize="small")
    if len(results) > 1:
        _sweep(grid[1, 1], results)
    else:
        _timeline(grid[1, 1], results[0])
    figure.suptitle(title)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as problem:
        raise ConfigError(f"--plot: {path} cannot be written: {problem}") from problem


def require_matplotlib() -> None:
    """Raises ConfigError when matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError("pictures need matplotlib: pip install 'spotjax[plot]'") from error


def _curve(axes: Axes, seconds: Sequence[float], label: str) -> None:
    if seconds:
        axes.plot(1000 * np.quantile(seconds, QUANTILES), QUANTILES, label=label)


def _sweep(axes: Axes, results: Sequence[Result]) -> None:
    """Throughput against the time of a token: further right and lower is better."""
    shown = [(r.summary.output_throughput, r.summary.tpot, r.point) for r in results]
    points = [(throughput, 1000 * tpot.median, point) for throughput, tpot, point in shown if tpot is not None]
    axes.plot([x for x, _, _ in points], [y for _, y, _ in points], marker="o")
    for x, y, point in points:
        label = point.concurrency if point.workload.arrivals.rate is None else f"{point.workload.arrivals.rate:g}/s"
        axes.annotate(str(label), (x, y), textcoords="offset points", xytext=(4, 4), fontsize="small")
    axes.set_xlabel("output tokens per second")
    axes.set_ylabel("median time per output token [ms]")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)


def _timeline(axes: Axes, result: Result) -> None:
    tokens, running = seconds_of_the_run([e for e in result.run.exchanges if e.failure is None])
    axes.stairs(tokens, label="output tokens per second")
    axes.stairs(running, label="requests running")
    axes.set_xlabel("seconds since the first request")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
