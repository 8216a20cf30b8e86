"""What the simulator says of a live race, beside what was measured: ``python -m spotjax.tools.race_prediction FILE``.

FILE is what ``bench_live_trace --json`` wrote, with a profile. Simulated are the same requests, the same losses, the
measured times of stages, prompts' and steps', and the same recovery policies, which plan with the server's functions.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import NamedTuple, get_args

from rich.console import Console
from rich.table import Table

from spotjax.fleet.change import Recovery
from spotjax.meshes.shape import MeshShape
from spotjax.sim.results import Outcome, Summary
from spotjax.sim.systems.spotjax import Spotjax
from spotjax.sim.systems.spotjax_options import SpotjaxOptions
from spotjax.sim.world import World
from spotjax.tools.race_results import Inputs, read_race, scenario


class Prediction(NamedTuple):
    """One run, simulated."""

    arrivals: str
    recovery: Recovery
    summary: Summary


def predict(inputs: Inputs) -> list[Prediction]:
    """All runs of a race.

    Raises:
      ConfigError: no profile was measured.
    """
    found = []
    for arrivals in inputs.requests:
        for recovery in get_args(Recovery):
            wanted = MeshShape.parse(inputs.shape) if recovery == "rerouting" else None
            demand = inputs.demand
            options = SpotjaxOptions(batch=demand.batch, demand=demand, recovery=recovery, wanted=wanted)
            world = World(scenario(inputs, arrivals))
            world.run(Spotjax(options=options))
            found.append(Prediction(arrivals, recovery, Outcome.of(world, recovery, 0).summary()))
    return found


def table(path: Path) -> Table:
    """Measured and simulated, side by side.

    Raises:
      ConfigError: the file is not of a race with a profile.
    """
    measured = {(run["arrivals"], run["recovery"]): run for run in json.loads(path.read_text())["results"]}
    shown = Table(title="measured and simulated, seconds")
    for column in ("arrivals", "recovery", "average", "simulated", "P99", "simulated"):
        shown.add_column(column, justify="left" if column in ("arrivals", "recovery") else "right")
    for arrivals, recovery, summary in predict(read_race(path)):
        if run := measured.get((arrivals, recovery)):
            pairs = [(run["average"], "latency.mean"), (run["p99"], "latency.p99")]
            figures = [f"{value:.1f}" for live, name in pairs for value in (live, summary.number(name))]
            shown.add_row(arrivals, recovery, *figures)
    return shown


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("race", type=Path)
    Console().print(table(parser.parse_args().race))


if __name__ == "__main__":
    main()
