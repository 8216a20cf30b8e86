"""Spotjax against the published systems at the paper's scale: same instances, same requests, seed by seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

from spotjax.sim.results import Summary
from spotjax.sim.statistics import mean_interval, paired_ratio
from spotjax.tools.results_runs import PAPER_NAMES, Run

SEGMENTS = ("A_S", "B_S", "A_S+O", "B_S+O")
FLUCTUATING = ("A'_S+O", "B'_S+O")
BASELINES = ("reparallelization", "rerouting")
SPOTSERVE = ("spotserve", "spotserve-new-batching")
SYSTEMS = ("spotjax", *SPOTSERVE, *BASELINES)
TRUE_CV = 6.0
NOTICES = (0.0, 30.0, 120.0)
FEATURES = ("optimizer", "matcher", "migration", "arranger", "backup", "precopy")
ON_DEMAND = range(1, 13)


def cells() -> list[tuple[str, str, float | None]]:
    """(Model, segment, CV of arrivals) of every comparison; the fluctuating load is published for GPT-20B."""
    steady = [(model, spot, cv) for model in PAPER_NAMES for spot in SEGMENTS for cv in (None, TRUE_CV)]
    return steady + [("gpt-20b", spot, cv) for spot in FLUCTUATING for cv in (None, TRUE_CV)]


def runs(seeds: int) -> list[Run]:
    """All that the head to head needs."""
    return [_run(system, *cell, seed) for cell in cells() for system in SYSTEMS for seed in range(seeds)]


def table(done: Mapping[Run, Summary], seeds: int) -> str:
    """P99 of every cell, and by how much Spotjax's is lower, with 95 % intervals over seeds."""
    lines = [
        "| model | trace | arrivals | Spotjax P99 | SpotServe | new batching | Repar. | Rerouting "
        "| SpotServe / Spotjax | its better batching / Spotjax | best baseline / Spotjax |",
        "|---|---|---|" + "--:|" * 8,
    ]
    gains: list[float] = []
    worse = 0
    for model, spot, cv in cells():
        tails = {system: _tails(done, seeds, system, model, spot, cv) for system in SYSTEMS}
        ours = tails["spotjax"]
        spotserve = paired_ratio(ours, tails["spotserve"])
        better = paired_ratio(ours, _least(tails, SPOTSERVE))
        baseline = paired_ratio(ours, _least(tails, BASELINES))
        gains.append(spotserve.mean)
        worse += better.mean < 1 or baseline.mean < 1
        means = " | ".join(f"{mean_interval(tails[system]).mean:.1f}" for system in SYSTEMS)
        ratios = " | ".join(
            f"{one.mean:.2f} ({one.low:.2f}-{one.high:.2f})" if one.low is not None else f"{one.mean:.2f}"
            for one in (spotserve, better, baseline)
        )
        lines.append(f"| {model} | {spot} | {_arrivals(cv)} | {means} | {ratios} |")
    lines += [
        "",
        f"Over {len(gains)} cells, P99 of SpotServe over that of Spotjax: median {median(gains):.2f}, least "
        f"{min(gains):.2f}, most {max(gains):.2f}. Spotjax is worse than any of the others in {worse}.",
    ]
    return "\n".join(lines)


def grace_runs(seeds: int) -> list[Run]:
    """The same with other notices."""
    return [_graced(system, notice, seed) for system in SYSTEMS for notice in NOTICES for seed in range(seeds)]


def grace_table(done: Mapping[Run, Summary], seeds: int) -> str:
    """P99, the longest gap between two tokens, and restarted requests by notice: GPT-20B, B_S, Poisson arrivals."""
    lines = [
        "| system | " + " | ".join(f"{notice:g} s notice" for notice in NOTICES) + " |",
        "|---|" + "--:|" * len(NOTICES),
    ]
    for system in SYSTEMS:
        figures = []
        for notice in NOTICES:
            found = [done[_graced(system, notice, seed)] for seed in range(seeds)]
            tail, gap = (mean_interval([s.number(name) for s in found]).mean for name in ("latency.p99", "largest_gap.p99"))
            figures.append(f"{tail:.1f} s, gap {gap:.2f} s, {sum(s.restarts for s in found) / seeds:.1f} restarted")
        lines.append(f"| {system} | " + " | ".join(figures) + " |")
    return "\n".join(lines)


def ablation_runs(seeds: int) -> list[Run]:
    """Spotjax less one feature each."""
    return [
        _ablated(system, spot, notice, seed)
        for system in _ablations()
        for spot, notice in ABLATED
        for seed in range(seeds)
    ]


ABLATED = (("A_S", 30.0), ("B_S", 30.0), ("B_S", 0.0))


def ablation_table(done: Mapping[Run, Summary], seeds: int) -> str:
    """P99 latency, P99 of the largest gap, and bytes moved, for each feature left out: GPT-20B, Poisson arrivals."""
    heads = [f"{spot}, {notice:g} s: P99 / gap / moved" for spot, notice in ABLATED]
    lines = ["| Spotjax | " + " | ".join(heads) + " |", "|---|" + "--:|" * len(heads)]
    for system in _ablations():
        figures = []
        for spot, notice in ABLATED:
            found = [done[_ablated(system, spot, notice, seed)] for seed in range(seeds)]
            tail, gap, moved = (
                mean_interval([s.number(name) for s in found]).mean
                for name in ("latency.p99", "largest_gap.p99", "bytes_moved")
            )
            figures.append(f"{tail:.2f} s / {gap:.2f} s / {moved / 1e9:.0f} GB")
        label = "complete" if system == "spotjax" else "without " + system.removeprefix("spotjax-no-")
        lines.append(f"| {label} | " + " | ".join(figures) + " |")
    return "\n".join(lines)


def cost_runs(seeds: int) -> list[Run]:
    """On-demand fleets of every size, with our engine and with the published one."""
    return [
        Run(f"{system}:{count}", model, spot, 1.0, seed)
        for model in PAPER_NAMES
        for spot in SEGMENTS
        for system in ("spotjax", "spotserve")
        for count in ON_DEMAND
        for seed in range(seeds)
        if _fits(system, model, count)
    ] + [Run("spotjax", model, spot, 1.0, seed) for model in PAPER_NAMES for spot in SEGMENTS for seed in range(seeds)]


def cost_table(done: Mapping[Run, Summary], seeds: int) -> str:
    """USD per million tokens on spot, and of the smallest on-demand fleet whose P99 is no higher."""
    lines = [
        "| model | trace | Spotjax on spot: P99 | USD per M tokens | on demand, our engine | USD per M tokens | saving "
        "| on demand, SpotServe's engine | USD per M tokens | saving |",
        "|---|---|" + "--:|" * 8,
    ]
    for model in PAPER_NAMES:
        for spot in SEGMENTS:
            tail, usd = _cost(done, seeds, "spotjax", model, spot)
            figures = [f"{tail:.1f} s", f"{usd:.2f}"]
            for system in ("spotjax", "spotserve"):
                found = _least_on_demand(done, seeds, system, model, spot, tail)
                if found is None:
                    figures += [f"none of up to {ON_DEMAND[-1]}", "", ""]
                else:
                    count, price = found
                    figures += [str(count), f"{price:.2f}", f"{1 - usd / price:.0%}"]
            lines.append(f"| {model} | {spot} | " + " | ".join(figures) + " |")
    return "\n".join(lines)


def _fits(system: str, model: str, count: int) -> bool:
    least = {"spotjax": {"opt-6.7b": 1, "gpt-20b": 2, "llama-30b": 3}, "spotserve": {"opt-6.7b": 1, "gpt-20b": 3, "llama-30b": 4}}
    return count >= least[system][model]


def _least_on_demand(
    done: Mapping[Run, Summary], seeds: int, system: str, model: str, spot: str, tail: float
) -> tuple[int, float] | None:
    for count in ON_DEMAND:
        if _fits(system, model, count):
            theirs, usd = _cost(done, seeds, f"{system}:{count}", model, spot)
            if theirs <= tail * 1.02:
                return count, usd
    return None


def _cost(done: Mapping[Run, Summary], seeds: int, system: str, model: str, spot: str) -> tuple[float, float]:
    """(P99 of latency, USD per million tokens), over seeds."""
    found = [done[Run(system, model, spot, 1.0, seed)] for seed in range(seeds)]
    return (
        mean_interval([s.number("latency.p99") for s in found]).mean,
        mean_interval([s.number("usd_per_million_tokens") for s in found]).mean,
    )


def _run(system: str, model: str, spot: str, cv: float | None, seed: int) -> Run:
    return Run(system, model, spot, cv, seed)


def _graced(system: str, notice: float, seed: int) -> Run:
    return Run(system, "gpt-20b", "B_S", 1.0, seed, assumed=(("notice_seconds", notice),))


def _ablated(system: str, spot: str, notice: float, seed: int) -> Run:
    return Run(system, "gpt-20b", spot, 1.0, seed, assumed=(("notice_seconds", notice),))


def _ablations() -> list[str]:
    return ["spotjax", *(f"spotjax-no-{feature}" for feature in FEATURES)]


def _arrivals(cv: float | None) -> str:
    return "as published" if cv is None else f"true CV {cv:g}"


def _tails(
    done: Mapping[Run, Summary], seeds: int, system: str, model: str, spot: str, cv: float | None
) -> list[float]:
    return [done[_run(system, model, spot, cv, seed)].number("latency.p99") for seed in range(seeds)]


def _least(tails: Mapping[str, Sequence[float]], systems: Sequence[str]) -> list[float]:
    """The better of some systems, seed by seed."""
    return [min(values) for values in zip(*(tails[system] for system in systems), strict=True)]
