"""The simulator against what SpotServe published of GPT-20B: the averages and 99th percentiles of its artifact.

Published are one run each, with an arrival file that its generator made; simulated is the mean over seeds of the same
generator. Nothing is fitted: times are the artifact's profile and formula as they are, start-up and storage are the
assumptions of all other results.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from spotjax.sim.results import Summary
from spotjax.tools.results_runs import Run, seeds_from

SEGMENTS = ("A_S", "B_S", "A_S+O", "B_S+O")
SYSTEMS = ("reparallelization", "rerouting", "spotserve")
PUBLISHED = {
    ("reparallelization", "A_S"): (32.045, 61.287), ("rerouting", "A_S"): (26.333, 51.008),
    ("spotserve", "A_S"): (23.518, 46.108),
    ("reparallelization", "B_S"): (27.068, 56.284), ("rerouting", "B_S"): (47.570, 99.115),
    ("spotserve", "B_S"): (23.315, 37.083),
    ("reparallelization", "A_S+O"): (32.663, 65.816), ("rerouting", "A_S+O"): (30.373, 50.732),
    ("spotserve", "A_S+O"): (23.416, 49.005),
    ("reparallelization", "B_S+O"): (31.915, 73.257), ("rerouting", "B_S+O"): (24.580, 43.239),
    ("spotserve", "B_S+O"): (20.724, 33.388),
    ("spotserve", "3 on demand"): (141.482, 253.343), ("spotserve", "4 on demand"): (98.037, 175.346),
    ("spotserve", "6 on demand"): (29.146, 43.470), ("spotserve", "8 on demand"): (24.623, 34.450),
}  # fmt: skip
"""Seconds (average, P99) by system and trace: the artifact's ``tradeoff_plot.py``, before its corrections."""
WITHIN = 0.15
QUEUEING = ("spotserve", "spotserve-as-baselines", "spotserve-new-batching")
"""SpotServe with one batch ahead, as the public script says; with two, as its baselines; in the new batching."""


def runs(seeds: int) -> list[Run]:
    """All that the tables need."""
    cells = [*PUBLISHED, *((system, spot) for system in QUEUEING for spot in SEGMENTS)]
    return [Run(system, spot=spot, seed=seed) for system, spot in cells for seed in seeds_from(seeds)]


def tables(done: Mapping[Run, Summary], seeds: int) -> str:
    """Markdown."""
    rows = [_row(done, seeds, system, spot) for spot in SEGMENTS for system in SYSTEMS]
    rows += [_row(done, seeds, system, spot) for system, spot in PUBLISHED if "demand" in spot]
    ratios = [ratio for _, figures in rows for ratio in figures[2::3]]
    lines = ["| trace | system | average | published | ratio | P99 | published | ratio |", "|---|---|" + "--:|" * 6]
    for label, figures in rows:
        numbers = " | ".join(f"{v:.2f}" if n % 3 == 2 else f"{v:.1f}" for n, v in enumerate(figures))
        lines.append(f"| {label} | {numbers} |")
    near = sum(abs(ratio - 1) <= WITHIN for ratio in ratios)
    right = sum(_ordered(done, seeds, spot, which) for spot in SEGMENTS for which in (0, 1))
    lines += [
        "",
        f"{near} of {len(ratios)} figures within {WITHIN:.0%}; the three systems in the published order in {right} of "
        f"{2 * len(SEGMENTS)} comparisons,\nSpotServe the best of the three in "
        f"{sum(_best(done, seeds, spot, which) for spot in SEGMENTS for which in (0, 1))}.",
        "",
        "| SpotServe, average / P99 | " + " | ".join(SEGMENTS) + " |",
        "|---|" + "--:|" * len(SEGMENTS),
    ]
    published = [PUBLISHED["spotserve", spot] for spot in SEGMENTS]
    lines.append("| published | " + " | ".join(f"{mean:.1f} / {tail:.1f}" for mean, tail in published) + " |")
    for name, label in zip(QUEUEING, ("one batch ahead", "two batches ahead", "new batching"), strict=True):
        cells = [simulated(done, seeds, name, spot) for spot in SEGMENTS]
        lines.append(f"| {label} | " + " | ".join(f"{mean:.1f} / {tail:.1f}" for mean, tail in cells) + " |")
    return "\n".join(lines)


def simulated(done: Mapping[Run, Summary], seeds: int, system: str, spot: str) -> tuple[float, float]:
    """(Average, P99) of finished requests, as the artifact counts, averaged over seeds."""
    found = [done[Run(system, spot=spot, seed=seed)].latency_published for seed in seeds_from(seeds)]
    return fmean(one.mean for one in found if one), fmean(one.p99 for one in found if one)


def _row(done: Mapping[Run, Summary], seeds: int, system: str, spot: str) -> tuple[str, Sequence[float]]:
    ours, theirs = simulated(done, seeds, system, spot), PUBLISHED[system, spot]
    figures = [value for own, other in zip(ours, theirs, strict=True) for value in (own, other, own / other)]
    return f"{spot} | {system}", figures


def _ordered(done: Mapping[Run, Summary], seeds: int, spot: str, which: int) -> bool:
    ours = sorted(SYSTEMS, key=lambda system: simulated(done, seeds, system, spot)[which])
    return ours == sorted(SYSTEMS, key=lambda system: PUBLISHED[system, spot][which])


def _best(done: Mapping[Run, Summary], seeds: int, spot: str, which: int) -> bool:
    return min(SYSTEMS, key=lambda system: simulated(done, seeds, system, spot)[which]) == "spotserve"
