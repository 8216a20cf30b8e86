"""Spotjax against the published systems at the paper's scale: same instances, same requests, seed by seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, median

from spotjax.sim.results import Summary
from spotjax.sim.statistics import paired_ratio
from spotjax.tools.results_runs import PAPER_NAMES, Run, mean_of, seeds_from

SEGMENTS = ("A_S", "B_S", "A_S+O", "B_S+O")
FLUCTUATING = ("A'_S+O", "B'_S+O")
BASELINES = ("reparallelization", "rerouting")
SPOTSERVE = ("spotserve", "spotserve-new-batching")
SYSTEMS = ("spotjax", *SPOTSERVE, *BASELINES)
TRUE_CV = 6.0
NOTICES = (0.0, 30.0, 120.0)


def cells() -> list[tuple[str, str, float | None]]:
    """(Model, segment, CV of arrivals) of every comparison; the fluctuating load is published for GPT-20B."""
    steady = [(model, spot, cv) for model in PAPER_NAMES for spot in SEGMENTS for cv in (None, TRUE_CV)]
    return steady + [("gpt-20b", spot, cv) for spot in FLUCTUATING for cv in (None, TRUE_CV)]


def runs(seeds: int) -> list[Run]:
    """All that the head to head needs."""
    return [Run(system, *cell, seed) for cell in cells() for system in SYSTEMS for seed in seeds_from(seeds)]


def table(done: Mapping[Run, Summary], seeds: int) -> str:
    """P99 of every cell, and by how much Spotjax's is lower, with 95 % intervals over seeds."""
    lines = [
        "| model | trace | arrivals | Spotjax P99 | SpotServe | new batching | Repar. | Rerouting "
        "| SpotServe / Spotjax | its better batching / Spotjax | best baseline / Spotjax |",
        "|---|---|---|" + "--:|" * 8,
    ]
    gains: list[tuple[float, float, float]] = []
    for model, spot, cv in cells():
        tails = {system: _tails(done, seeds, system, model, spot, cv) for system in SYSTEMS}
        ours = tails["spotjax"]
        spotserve = paired_ratio(ours, tails["spotserve"])
        better = paired_ratio(ours, _least(tails, SPOTSERVE))
        baseline = paired_ratio(ours, _least(tails, BASELINES))
        gains.append((spotserve.mean, better.mean, baseline.mean))
        means = " | ".join(f"{fmean(tails[system]):.1f}" for system in SYSTEMS)
        columns = " | ".join(
            f"{one.mean:.2f} ({one.low:.2f}-{one.high:.2f})" if one.low is not None else f"{one.mean:.2f}"
            for one in (spotserve, better, baseline)
        )
        lines.append(f"| {model} | {spot} | {_arrivals(cv)} | {means} | {columns} |")
    spotserves, betters, baselines = (
        f"median {median(ratios):.2f}, least {min(ratios):.2f}, most {max(ratios):.2f}"
        for ratios in zip(*gains, strict=True)
    )
    lines += [
        "",
        f"Over {len(gains)} cells, P99 of SpotServe over that of Spotjax: {spotserves};\nwith its better batching: "
        f"{betters}; of the best baseline: {baselines}.\nSpotjax is worse than one of the others in "
        f"{sum(min(ratios) < 1 for ratios in gains)}.",
    ]
    return "\n".join(lines)


def grace_runs(seeds: int) -> list[Run]:
    """The same with other notices."""
    return [_graced(system, notice, seed) for system in SYSTEMS for notice in NOTICES for seed in seeds_from(seeds)]


def grace_table(done: Mapping[Run, Summary], seeds: int) -> str:
    """P99, the longest gap between two tokens, and restarted requests by notice: GPT-20B, B_S, Poisson arrivals."""
    lines = [
        "| system | " + " | ".join(f"{notice:g} s notice" for notice in NOTICES) + " |",
        "|---|" + "--:|" * len(NOTICES),
    ]
    for system in SYSTEMS:
        figures = []
        for notice in NOTICES:
            found = [done[_graced(system, notice, seed)] for seed in seeds_from(seeds)]
            tail, gap, again = (mean_of(found, name) for name in ("latency.p99", "largest_gap.largest", "restarted"))
            figures.append(f"{tail:.1f} s, gap {gap:.1f} s, {again:.1f} restarted")
        lines.append(f"| {system} | " + " | ".join(figures) + " |")
    return "\n".join(lines)


def _graced(system: str, notice: float, seed: int) -> Run:
    return Run(system, "gpt-20b", "B_S", 1.0, seed, assumed=(("notice_seconds", notice),))


def _arrivals(cv: float | None) -> str:
    return "as published" if cv is None else f"true CV {cv:g}"


def _tails(
    done: Mapping[Run, Summary], seeds: int, system: str, model: str, spot: str, cv: float | None
) -> list[float]:
    return [done[Run(system, model, spot, cv, seed)].number("latency.p99") for seed in seeds_from(seeds)]


def _least(tails: Mapping[str, Sequence[float]], systems: Sequence[str]) -> list[float]:
    """The better of some systems, seed by seed."""
    return [min(values) for values in zip(*(tails[system] for system in systems), strict=True)]
