"""Capacity that follows a load which doubles and halves, against fleets of a fixed size.

``python -m spotjax.tools.bench_autoscale`` simulates OPT-6.7B on g4dn.12xlarge, with latencies and prices that
SpotServe published and 512 + 128 tokens a request. Every ``--minutes`` the rate of arrivals (Poisson) doubles, three
times, and then halves again. What is bought and given back is decided by the code that a controller runs, once a
second, with the defaults of a capacity file; instances are simulated, 120 s from granted to ready for spot ones and
90 s on demand, and billed from the grant. In one row a rented spot instance, the oldest, is taken every ``--taken``
minutes with 30 s of notice; fixed fleets lose none. These have as many spot instances as the bought fleet had at the
end of the highest rate, and half as many. Latencies are from arrival to the last token; a request that did not end
counts with its age. Prints tables, medians over ``--seeds``; ``--output FILE`` writes JSON.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from spotjax.fleet.capacity.file import CapacitySettings
from spotjax.meshes.instance_types import instance_type
from spotjax.models.presets import preset
from spotjax.planner.published import PublishedProfile
from spotjax.planner.published_tables import TABLES
from spotjax.sim.assumptions import Assumptions
from spotjax.sim.results import Outcome
from spotjax.sim.systems.spotjax import Spotjax
from spotjax.sim.systems.spotjax_options import SpotjaxOptions
from spotjax.sim.traces import arrivals
from spotjax.sim.workload import RequestTrace, SpotTrace, by_counts
from spotjax.sim.world import Scenario, World

MODEL, KIND = "opt-6.7b", "g4dn.12xlarge"
PROMPT, OUTPUT = 512, 128
DOUBLINGS = (1, 2, 4, 8, 4, 2, 1)
"""Rates, in multiples of the first one."""
WARM_SECONDS = 600.0
"""Before the first request of the table: the first machines come."""
SETTINGS = CapacitySettings(
    most=48, on_demand="fallback", cost_per_hour=200.0, idle_seconds=1e9
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One run.

    Attributes:
      fleet: which.
      seed: of arrivals.
      usd: of all instances, from the start on.
      most, mean: instances paid for.
      on_demand_hours: of these.
      p50, p99: seconds of a request.
      finished: share of requests.
      recomputed: positions whose KV was computed again.
      phases: for each rate: requests per second, instances at its end, p50 and p99 of the requests that came in it.
    """

    fleet: str
    seed: int
    usd: float
    most: int
    mean: float
    on_demand_hours: float
    p50: float
    p99: float
    finished: float
    recomputed: int
    phases: tuple[tuple[float, int, float, float], ...]


def scenario(base: float, minutes: float, seed: int, spot: SpotTrace) -> Scenario:
    """The load, on instances of a trace."""
    seconds = minutes * 60
    times = arrivals.piecewise([base * each for each in DOUBLINGS], seconds, 1.0, seed) + WARM_SECONDS
    warm = arrivals.poisson(base, WARM_SECONDS, seed + 1000)
    requests = RequestTrace.of("doubles and halves", np.concatenate([warm, times]), PROMPT, OUTPUT)
    assumed = Assumptions(start_seconds=120.0)
    return Scenario(
        "autoscale", preset(MODEL), PublishedProfile(TABLES[MODEL]), instance_type(KIND), spot, requests, assumed
    )


def bought(base: float, minutes: float, seed: int, taken: float) -> tuple[World, str]:
    """A fleet that buys its own capacity, and whose machines are taken from time to time."""
    duration = WARM_SECONDS + len(DOUBLINGS) * minutes * 60
    world = World(scenario(base, minutes, seed, SpotTrace("bought", (), duration)))
    system = Spotjax(options=SpotjaxOptions(capacity=SETTINGS))

    def take() -> None:
        spot = [name for name, one in world.instances.items() if not one.on_demand]
        if spot:
            world.take(system, (spot[0],), world.now + world.scenario.assumptions.notice_seconds)
        world.at(world.now + taken * 60, take)

    if taken:
        world.at(WARM_SECONDS, take)
    world.run(system)
    return world, f"bought, one taken every {taken:g} min" if taken else "bought"


def fixed(base: float, minutes: float, seed: int, instances: int) -> tuple[World, str]:
    """A fleet of spot instances that never changes."""
    duration = WARM_SECONDS + len(DOUBLINGS) * minutes * 60
    world = World(scenario(base, minutes, seed, by_counts("fixed", [(0.0, instances)], duration)))
    world.run(Spotjax())
    return world, f"fixed, {instances}"


def row(world: World, fleet: str, seed: int, minutes: float) -> Row:
    """What came of it; latencies without those of the time before the first rate."""
    outcome = Outcome.of(world, fleet, seed)
    counted = outcome.arrival >= WARM_SECONDS
    hours = outcome.spot_hours + outcome.on_demand_hours
    return Row(
        fleet, seed, outcome.usd, max(count for _, count in outcome.instances), hours * 3600 / outcome.duration,
        outcome.on_demand_hours, *percentiles(outcome.latency()[counted]),
        float(outcome.finished[counted].mean()), int(outcome.recomputed.sum()),
        tuple(phase(outcome, number, minutes) for number in range(len(DOUBLINGS))),
    )  # fmt: skip


def phase(outcome: Outcome, number: int, minutes: float) -> tuple[float, int, float, float]:
    """One rate: what came, and how it was served."""
    begin, end = (WARM_SECONDS + each * minutes * 60 for each in (number, number + 1))
    inside = (outcome.arrival >= begin) & (outcome.arrival < end)
    there = [count for at, count in outcome.instances if at <= end - 1][-1]
    return float(inside.sum() / (end - begin)), there, *percentiles(outcome.latency()[inside])


def percentiles(latency: np.ndarray[Any, np.dtype[np.float64]]) -> tuple[float, float]:
    """Median and 99th."""
    middle, high = np.percentile(latency, (50, 99)).tolist()
    return middle, high


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--base", type=float, default=1.0, metavar="RATE", help="first requests per second (default: 1)"
    )
    parser.add_argument("--minutes", type=float, default=30.0, help="between changes of the rate (default: 30)")
    parser.add_argument(
        "--taken", type=float, default=10.0, help="minutes between instances that are taken (default: 10)"
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each (default: 3)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write JSON")
    arguments = parser.parse_args(argv)
    rows: list[list[Row]] = []
    for seed in range(arguments.seeds):
        make = partial(row, seed=seed, minutes=arguments.minutes)
        first = make(*bought(arguments.base, arguments.minutes, seed, 0.0))
        second = make(*bought(arguments.base, arguments.minutes, seed, arguments.taken))
        enough = first.phases[DOUBLINGS.index(max(DOUBLINGS))][1]
        peak = make(*fixed(arguments.base, arguments.minutes, seed, enough))
        half = make(*fixed(arguments.base, arguments.minutes, seed, enough // 2))
        rows.append(
            [first, second, replace(peak, fleet="fixed at the peak"), replace(half, fleet="fixed at half of it")]
        )
    report(list(zip(*rows, strict=True)))
    if arguments.output is not None:
        document = {
            "options": {**vars(arguments), "output": str(arguments.output)},
            "rows": [[asdict(r) for r in each] for each in rows],
        }
        arguments.output.write_bytes(msgspec.json.format(msgspec.json.encode(document), indent=1))
    return 0


def report(fleets: Sequence[Sequence[Row]]) -> None:
    """Tables, as Markdown."""
    print("| fleet | instances, mean (most) | on-demand hours | USD | P50 s | P99 s | finished |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for runs in fleets:

        def middle(name: str, runs: Sequence[Row] = runs) -> float:
            return float(statistics.median(getattr(run, name) for run in runs))

        print(
            f"| {runs[0].fleet} | {middle('mean'):.1f} ({middle('most'):g}) | {middle('on_demand_hours'):.2f} | "
            f"{middle('usd'):.2f} | {middle('p50'):.1f} | {middle('p99'):.1f} | {middle('finished'):.1%} |"
        )
    print("\n| requests/s | " + " | ".join(f"{runs[0].fleet}: instances, P99 s" for runs in fleets) + " |")
    print("|--:|" + "--:|" * len(fleets))
    for number in range(len(DOUBLINGS)):
        cells = []
        for runs in fleets:
            there, high = (statistics.median(run.phases[number][which] for run in runs) for which in (1, 3))
            cells.append(f"{there:g}, {high:.1f}")
        rate = statistics.median(run.phases[number][0] for run in fleets[0])
        print(f"| {rate:.2f} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    raise SystemExit(main())
