"""The page of results: tables go where they belong, and the simulator stays where the published figures are."""

from __future__ import annotations

from pathlib import Path

import pytest

from spotjax.tools.results import TABLES, insert
from spotjax.tools.results_calibration import PUBLISHED, runs, simulated, tables
from spotjax.tools.results_runs import Run, run, scenario_of

PAGE = Path(__file__).parents[2] / "docs" / "results.md"


def test_a_table_replaces_the_one_before_and_nothing_else() -> None:
    page = "text\n<!-- table: cost -->\nold\n<!-- end -->\nmore\n<!-- table: day -->\n<!-- end -->\n"
    assert insert(page, "cost", r"new \1") == page.replace("old", r"new \1")
    assert insert(insert(page, "day", "x"), "day", "") == insert(page, "day", "")


def test_a_page_without_the_place_is_told_so() -> None:
    with pytest.raises(SystemExit, match="no place for the table cost"):
        insert("nothing here", "cost", "")


def test_the_page_has_a_filled_place_for_every_table() -> None:
    page = PAGE.read_text()
    for name in TABLES:
        _, place, rest = page.partition(f"<!-- table: {name} -->\n")
        table = rest.partition("<!-- end -->")[0].strip()
        assert place and table, f"table {name} is empty: python -m spotjax.tools.results --write docs/results.md"


def test_the_published_figures_are_still_met() -> None:
    done = {one: run(one) for one in runs(1)}
    for (system, spot), theirs in PUBLISHED.items():
        ours = simulated(done, 1, system, spot)
        for own, other in zip(ours, theirs, strict=True):
            assert 0.6 < own / other < 1.6, f"{system} on {spot}: {own:.1f} s, published {other:.1f} s"
    text = tables(done, 1)
    near = int(text.partition(" of 32 figures within 15%")[0].rpartition("\n")[2])
    assert near >= 18, text


def test_runs_of_one_seed_are_the_same_and_systems_share_what_comes() -> None:
    one, other = (scenario_of(Run(system, cv=6.0, seed=3))[0] for system in ("spotjax", "rerouting"))
    assert one.requests.arrival.tolist() == other.requests.arrival.tolist() and one.spot == other.spot
    assert run(Run("spotjax", spot="B_S")) == run(Run("spotjax", spot="B_S"))
