"""What a simulation looks like to people: latencies, costs, changes of each system, and how the others compare."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import isfinite

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from spotjax.commands.output import shown_bytes
from spotjax.commands.simulate import Experiment
from spotjax.sim.results import Summary
from spotjax.sim.statistics import mean_interval, paired_ratio

Shown = Callable[[float], str]


def experiment_view(experiment: Experiment) -> RenderableType:
    """Everything; numbers are means over seeds, with the half width of their 95 % interval."""
    first = next(iter(experiment.summaries.values()))
    headline = f"[bold]{escape(first[0].scenario)}[/bold]  {first[0].duration:g} s"
    seeds = f", {len(first)} seeds: mean ± half of the 95 % interval" if len(first) > 1 else ""
    return Group(
        headline + seeds,
        _table("latency in seconds, unfinished requests with their age", experiment, LATENCY),
        _table("throughput and cost", experiment, COST),
        _table("changes of the mesh and what they did", experiment, CHANGES),
        *comparisons(experiment),
    )


def comparisons(experiment: Experiment) -> Iterator[str]:
    """How many times lower the first system's P99 latency is than that of each other one, and what it costs."""
    (name, ours), *others = experiment.summaries.items()
    for other, theirs in others:
        parts = []
        for title, number in (("P99 latency", "latency.p99"), ("USD per token", "usd_per_million_tokens")):
            own, their = ([summary.number(number) for summary in runs] for runs in (ours, theirs))
            if all(isfinite(value) and value > 0 for value in (*own, *their)):
                ratio = paired_ratio(own, their)
                between = "" if ratio.low is None else f" ({ratio.low:.2f} to {ratio.high:.2f})"
                parts.append(f"{title} {ratio.mean:.2f}x{between}")
        if parts:
            yield f"{escape(other)} over {escape(name)}: {', '.join(parts)}"


def _table(title: str, experiment: Experiment, columns: Sequence[tuple[str, str, Shown]]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("system", no_wrap=True)
    for heading, _, _ in columns:
        table.add_column(heading, justify="right")
    for name, summaries in experiment.summaries.items():
        table.add_row(escape(name), *(_cell(summaries, number, shown) for _, number, shown in columns))
    return table


def _cell(summaries: Sequence[Summary], number: str, shown: Shown) -> str:
    """The mean over seeds that have the number, and how well it is known."""
    values = [value for value in (summary.number(number) for summary in summaries) if isfinite(value)]
    if not values:
        return "-"
    mean = mean_interval(values)
    half = 0.0 if mean.high is None else mean.high - mean.mean
    uncertain = f"\n±{shown(half)}" if half > 1e-6 * abs(mean.mean) else ""  # less is rounding
    return shown(mean.mean) + uncertain


def _digits(value: float) -> str:
    """Three digits, and all of those before the point."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


LATENCY: Sequence[tuple[str, str, Shown]] = (
    ("came", "requests", _digits),
    ("un-\nfinished", "censored", _digits),
    ("mean", "latency.mean", _digits),
    ("P50", "latency.p50", _digits),
    ("P90", "latency.p90", _digits),
    ("P95", "latency.p95", _digits),
    ("P99", "latency.p99", _digits),
    ("P99 pub-\nlished", "latency_published.p99", _digits),
    ("first\ntoken P99", "time_to_first_token.p99", _digits),
    ("gap P99", "largest_gap.p99", _digits),
)
"""Heading, number of a ``Summary``, and how it is shown."""

COST: Sequence[tuple[str, str, Shown]] = (
    ("requests\n/s", "request_throughput", _digits),
    ("output\ntokens\n/s", "output_throughput", _digits),
    ("spot\nhours", "spot_hours", _digits),
    ("on-dem.\nhours", "on_demand_hours", _digits),
    ("USD", "usd", _digits),
    ("USD/M\ntokens", "usd_per_million_tokens", _digits),
    ("USD/M\nprompt", "usd_per_million_prompt_tokens", _digits),
    ("USD/M\noutput", "usd_per_million_output_tokens", _digits),
    ("1e-5 USD\nper token", "usd_published", _digits),
)

CHANGES: Sequence[tuple[str, str, Shown]] = (
    ("changes", "changes", _digits),
    ("requests\nrestarted", "restarted", _digits),
    ("requests\nlost", "lost", _digits),
    ("positions\nrecomp.", "recomputed", _digits),
    ("stalled\nseconds", "stall", _digits),
    ("longest\nstall", "longest_stall", _digits),
    ("moved", "bytes_moved", shown_bytes),
    ("loaded", "bytes_loaded", shown_bytes),
)
