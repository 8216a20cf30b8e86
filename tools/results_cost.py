"""What a token costs on spot instances and on demand, at the same 99th percentile of latency.

An on-demand fleet of N instances is the reference, with SpotServe's engine, as in the paper's comparison, and with
ours. Beside it stands the smallest spot fleet on which Spotjax reaches the reference's P99: so many instances are
rented of those that the market of a trace offers, and another one for each that is taken. With the same engine and the
same number of instances the saving is that of the prices, 51 %.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import product

from spotjax.sim.results import Summary
from spotjax.tools.results_runs import FIRST_SEED, Run, mean_of, seeds_from

SEGMENTS = ("A_S", "B_S")
LEAST = {
    ("spotserve", "opt-6.7b"): 2, ("spotserve", "gpt-20b"): 3, ("spotserve", "llama-30b"): 4,
    ("spotjax", "opt-6.7b"): 2, ("spotjax", "gpt-20b"): 2, ("spotjax", "llama-30b"): 3,
}  # fmt: skip
"""Instances that are worth a look: with fewer, one replica does not fit, or the load is far too much."""
REFERENCES = (4, 6, 8)
MOST = 10
TOLERANCE = 1.02
"""P99 that is higher by less counts as equal."""


def runs(seeds: int) -> list[Run]:
    """All that the table needs; Poisson arrivals."""
    models = {model for _, model in LEAST}
    on_demand = [_reference(*key, count, spot) for key in LEAST for count in REFERENCES for spot in SEGMENTS]
    on_spot = [_rented(model, most, spot) for model in models for most in _sizes(model) for spot in SEGMENTS]
    return [replace(one, seed=seed) for one in (*on_demand, *on_spot) for seed in seeds_from(seeds)]


def table(done: Mapping[Run, Summary], seeds: int) -> str:
    """Markdown."""
    lines = [
        "| model | market | reference | its P99 | USD per M tokens | Spotjax on spot: at most | its P99 "
        "| USD per M tokens | saving |",
        "|---|---|---|" + "--:|" * 6,
    ]
    for (engine, model), count, spot in product(LEAST, REFERENCES, SEGMENTS):
        tail, usd = _cost(done, seeds, _reference(engine, model, count, spot))
        label = f"| {model} | {spot} | {count} on demand, {engine}'s engine | {tail:.1f} s | {usd:.2f} "
        found = next(
            (most for most in _sizes(model) if _tail(done, seeds, model, most, spot) <= tail * TOLERANCE), None
        )
        if found is None:
            lines.append(label + f"| not with {MOST} | | | |")
        else:
            ours, price = _cost(done, seeds, _rented(model, found, spot))
            lines.append(label + f"| {found} | {ours:.1f} s | {price:.2f} | {1 - price / usd:.0%} |")
    return "\n".join(lines)


def _sizes(model: str) -> range:
    return range(LEAST["spotjax", model], MOST + 1)


def _reference(engine: str, model: str, count: int, spot: str) -> Run:
    return Run(f"{engine}:{count}", model, spot, 1.0, FIRST_SEED)


def _rented(model: str, most: int, spot: str) -> Run:
    return Run("spotjax", model, spot, 1.0, FIRST_SEED, most=most)


def _tail(done: Mapping[Run, Summary], seeds: int, model: str, most: int, spot: str) -> float:
    return _cost(done, seeds, _rented(model, most, spot))[0]


def _cost(done: Mapping[Run, Summary], seeds: int, one: Run) -> tuple[float, float]:
    """(P99 of latency, USD per million tokens), averaged over seeds."""
    found = [done[replace(one, seed=seed)] for seed in seeds_from(seeds)]
    return mean_of(found, "latency.p99"), mean_of(found, "usd_per_million_tokens")
