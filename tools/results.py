"""Makes the tables of docs/results.md: ``python -m spotjax.tools.results --write docs/results.md``.

Every table there stands between two comments, ``<!-- table: NAME -->`` and ``<!-- end -->``, and is put in anew; the
text around them is written by hand. ``--only NAME`` makes some of them. All arrivals and markets are drawn from seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np

from spotjax.sim.results import Summary
from spotjax.tools import results_calibration, results_cost, results_fleets, results_head_to_head
from spotjax.tools.results_runs import Run, run_all

Done = Mapping[Run, Summary]


class Table(NamedTuple):
    """A table of the page.

    Attributes:
      runs: simulations that it needs, given the number of seeds.
      make: its text, given what came of them and the number of seeds.
    """

    runs: Callable[[int], Iterable[Run]]
    make: Callable[[Done, int], str]


TABLES = {
    "calibration": Table(results_calibration.runs, results_calibration.tables),
    "head-to-head": Table(results_head_to_head.runs, results_head_to_head.table),
    "notice": Table(results_head_to_head.grace_runs, results_head_to_head.grace_table),
    "cost": Table(results_cost.runs, results_cost.table),
    "ablation": Table(results_fleets.ablation_runs, results_fleets.ablation_table),
    "day": Table(lambda _: results_fleets.day_runs(), lambda done, _: results_fleets.day_table(done)),
    "large-fleet": Table(lambda _: (), lambda _done, _seeds: results_fleets.large_fleet()),
}


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", nargs="+", choices=TABLES, default=list(TABLES), help="tables to make (default: all)")
    add("--seeds", type=int, default=5, help="of arrivals and of the market (default: 5)")
    add("--jobs", type=int, help="simulations side by side (default: one for each core)")
    add("--write", type=Path, metavar="PAGE", help="put the tables into this page; without it they are printed")
    add("--json", type=Path, metavar="FILE", help="also write the summaries of all runs")
    chosen = parser.parse_args(arguments)
    page = chosen.write.read_text() if chosen.write else ""
    for name in chosen.only if chosen.write else ():
        insert(page, name, "")  # says at once what the page lacks
    everything: dict[Run, Summary] = {}
    for name in chosen.only:
        done = run_all(TABLES[name].runs(chosen.seeds), name, chosen.jobs)
        everything |= done
        text = TABLES[name].make(done, chosen.seeds)
        if chosen.write:
            page = insert(chosen.write.read_text(), name, text)
            chosen.write.write_text(page)
        else:
            print(f"\n{name}\n\n{text}")
    if chosen.json:
        runs = [{"run": asdict(one), "summary": asdict(summary)} for one, summary in everything.items()]
        chosen.json.write_text(json.dumps({"machine": machine(), "seeds": chosen.seeds, "runs": runs}, indent=1))
    return 0


def insert(page: str, name: str, text: str) -> str:
    """The page with another text between the comments of a table.

    Raises:
      SystemExit: the page has no such comments.
    """
    marked = re.compile(rf"(<!-- table: {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
    if not marked.search(page):
        raise SystemExit(f"the page has no place for the table {name}: <!-- table: {name} --> and <!-- end -->")
    return marked.sub(lambda found: f"{found[1]}{text}\n{found[2]}", page)


def machine() -> dict[str, object]:
    """What the runs were made on."""
    return {
        "cores": os.cpu_count(),
        "processor": platform.machine(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "spotjax": version("spotjax"),
    }


if __name__ == "__main__":
    sys.exit(main())
