"""Simulated runs of the paper's workloads, side by side on all cores. Knows no tables: see ``results``."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

from rich.progress import track

from spotjax.meshes.instance_types import instance_type
from spotjax.models.presets import preset
from spotjax.planner.published import PublishedProfile
from spotjax.planner.published_tables import TABLES
from spotjax.sim.assumptions import Assumptions
from spotjax.sim.experiment import simulate
from spotjax.sim.results import Summary
from spotjax.sim.traces import scenarios
from spotjax.sim.workload import RequestTrace, SpotTrace
from spotjax.sim.world import Scenario

FIRST_SEED = 100
"""Results are drawn from seeds that nothing was tried or tuned on."""
PAPER_NAMES = {"opt-6.7b": "OPT-6.7B", "gpt-20b": "GPT-20B", "llama-30b": "LLaMA-30B"}


@dataclass(frozen=True)
class Run:
    """One simulation, by names, so that it can be told to another process.

    Attributes:
      system: as in ``spotjax simulate``.
      model: preset.
      spot: segment of the paper; ``N on demand``; or ``day xN``.
      cv: of arrivals: None as the artifact makes them, else their true coefficient of variation.
      seed: of arrivals, and of the market.
      rate: requests per second; None is the paper's.
      duration: seconds, of days and of on-demand instances.
      most: instances that are rented at a time of those that the market offers; None rents all.
      assumed: assumptions other than the default, and other than the segment's.
    """

    system: str
    model: str = "gpt-20b"
    spot: str = "A_S"
    cv: float | None = None
    seed: int = 0
    rate: float | None = None
    duration: float = 1020.0
    most: int | None = None
    assumed: tuple[tuple[str, float], ...] = ()


def seeds_from(count: int) -> range:
    """The seeds of so many repetitions."""
    return range(FIRST_SEED, FIRST_SEED + count)


def mean_of(summaries: Iterable[Summary], name: str) -> float:
    """Average over repetitions of a number, by its name in ``Summary``."""
    return fmean(summary.number(name) for summary in summaries)


class Market(NamedTuple):
    """What a run is fed with beside its requests."""

    spot: SpotTrace
    start_seconds: float
    required: tuple[tuple[float, float], ...]


def run(one: Run) -> Summary:
    """Carries a simulation out."""
    scenario, required = scenario_of(one)
    return simulate(scenario, one.system, one.seed, required).summary()


def run_all(runs: Iterable[Run], what: str, jobs: int | None = None) -> dict[Run, Summary]:
    """Carries simulations out, with progress on the terminal."""
    wanted = list(dict.fromkeys(runs))
    with ProcessPoolExecutor(jobs or os.cpu_count()) as pool:
        done = track(pool.map(run, wanted), what, total=len(wanted), transient=True)
        return dict(zip(wanted, done, strict=True))


def scenario_of(one: Run) -> tuple[Scenario, tuple[tuple[float, float], ...]]:
    """The scenario of a run, and the throughput that the solver of the published systems is to reach."""
    name = PAPER_NAMES[one.model]
    market = _market(one)
    if one.most is not None:
        market = market._replace(spot=market.spot.held(one.most))
    fluctuating = bool(market.required)
    required = market.required or ((0.0, one.rate * 1.15 if one.rate else scenarios.REQUIRED[name]),)
    assumed = Assumptions(**{"start_seconds": market.start_seconds, **dict(one.assumed)})
    requests = _requests(one, fluctuating, market.spot.duration)
    profile = PublishedProfile(TABLES[one.model])
    kind = instance_type("g4dn.12xlarge")
    return Scenario(one.spot, preset(one.model), profile, kind, market.spot, requests, assumed), required


def _market(one: Run) -> Market:
    count, _, rest = one.spot.partition(" ")
    if rest == "on demand":
        return Market(scenarios.on_demand(int(count), one.duration), 0.0, ())
    if count == "day":
        return Market(scenarios.day(int(rest[1:]), one.seed, one.duration), 120.0, ())
    segment = scenarios.SEGMENTS[one.spot]
    return Market(segment.spot, segment.start_seconds, segment.required)


def _requests(one: Run, fluctuating: bool, duration: float) -> RequestTrace:
    if fluctuating:
        return scenarios.fluctuating_requests(one.seed, one.cv)
    rate = one.rate or scenarios.RATES[PAPER_NAMES[one.model]]
    if one.cv is None:
        return scenarios.published_requests(rate, duration, one.seed)
    return scenarios.gamma_requests(rate, duration, one.seed, one.cv)
