"""Longer and larger: Spotjax less one feature each, a day of twelve instances, a day of two hundred."""

from __future__ import annotations

from collections.abc import Mapping
from time import process_time

from spotjax.sim.results import Summary
from spotjax.tools.results_runs import FIRST_SEED, Run, mean_of, run, seeds_from

FEATURES = ("optimizer", "matcher", "migration", "arranger", "backup", "precopy")
ABLATED = (("gpt-20b", 0.35), ("llama-30b", 0.2))
ABLATION_SECONDS = 6 * 3600.0
NOTICES = (30.0, 0.0)
DAY = 86400.0
DAY_SYSTEMS = (
    "spotjax",
    "spotjax-fallback",
    "skyserve",
    "spotserve",
    "spotserve-new-batching",
    "reparallelization",
    "rerouting",
)
DAY_RATES = (("opt-6.7b", 1.5), ("gpt-20b", 0.35), ("llama-30b", 0.2))
LARGE = Run("spotjax", "opt-6.7b", "day x200", 1.0, FIRST_SEED, 50.0, DAY)


def ablation_runs(seeds: int) -> list[Run]:
    """Six hours of the market of twelve instances."""
    return [
        _ablated(feature, model, rate, notice, seed)
        for feature in ("", *FEATURES)
        for model, rate in ABLATED
        for notice in NOTICES
        for seed in seeds_from(seeds)
    ]


def ablation_table(done: Mapping[Run, Summary], seeds: int) -> str:
    """One block for each model and notice."""
    lines = [
        "| model | notice | Spotjax | P99 latency | changes | stalled, all changes | largest gap | moved "
        "| positions computed again |",
        "|---|--:|---|" + "--:|" * 6,
    ]
    for model, rate in ABLATED:
        for notice in NOTICES:
            for feature in ("", *FEATURES):
                found = [done[_ablated(feature, model, rate, notice, seed)] for seed in seeds_from(seeds)]
                tail, changes, stall, gap, moved, again = (
                    mean_of(found, name)
                    for name in ("latency.p99", "changes", "stall", "largest_gap.largest", "bytes_moved", "recomputed")
                )
                label = f"without {feature}" if feature else "complete"
                lines.append(
                    f"| {model} | {notice:g} s | {label} | {tail:.1f} s | {changes:.0f} | {stall:.1f} s "
                    f"| {gap:.1f} s | {moved / 1e12:.2f} TB | {again:,.0f} |"
                )
    return "\n".join(lines)


def day_runs() -> list[Run]:
    """A day of twelve instances on average, for every system."""
    return [
        Run(system, model, "day x12", 1.0, FIRST_SEED, rate, DAY) for model, rate in DAY_RATES for system in DAY_SYSTEMS
    ]


def day_table(done: Mapping[Run, Summary]) -> str:
    """What the day was like for clients."""
    lines = [
        "| model | system | requests | unfinished | average | P50 | P99 | restarted | changes | USD per M tokens |",
        "|---|---|" + "--:|" * 8,
    ]
    for one in day_runs():
        summary = done[one]
        mean, middle, tail, usd = map(
            summary.number, ("latency.mean", "latency.p50", "latency.p99", "usd_per_million_tokens")
        )
        lines.append(
            f"| {one.model} | {one.system} | {summary.requests:,} | {summary.censored} | {mean:.1f} s | {middle:.1f} s "
            f"| {tail:.1f} s | {summary.restarted} | {summary.changes} | {usd:.2f} |"
        )
    return "\n".join(lines)


def large_fleet() -> str:
    """A day of two hundred instances on one core, timed. Markdown."""
    started = process_time()
    summary = run(LARGE)
    seconds = process_time() - started
    names = ("latency.mean", "latency.p50", "latency.p99", "largest_gap.largest", "usd_per_million_tokens")
    mean, middle, tail, gap, usd = map(summary.number, names)
    return (
        f"A day of 200 instances on average, {LARGE.model} at {LARGE.rate:g} requests per second (Poisson):\n"
        f"{summary.requests:,} requests, {summary.changes:,} changes of the mesh, {summary.restarted} restarted,\n"
        f"{summary.lost} lost, {summary.censored} still running at the end; latency {mean:.2f} s on average, "
        f"P50 {middle:.2f} s,\nP99 {tail:.2f} s, largest gap {gap:.1f} s; {usd:.2f} USD per million tokens. Simulated "
        f"in {seconds:.0f} s\nof one core, {seconds / summary.requests * 1e6:.0f} us a request."
    )


def _ablated(feature: str, model: str, rate: float, notice: float, seed: int) -> Run:
    system = f"spotjax-no-{feature}" if feature else "spotjax"
    return Run(system, model, "day x12", 1.0, seed, rate, ABLATION_SECONDS, assumed=(("notice_seconds", notice),))
