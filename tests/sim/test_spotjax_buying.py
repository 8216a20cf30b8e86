"""A simulated Spotjax that rents its machines: they follow the load, replace what is taken, and nothing is lost."""

from __future__ import annotations

import pytest

from spotjax.tools.bench_autoscale import DOUBLINGS, bought, row


def test_machines_follow_a_load_that_doubles_and_halves_and_those_taken_are_replaced() -> None:
    world, name = bought(0.5, 4.0, seed=1, taken=4.0)
    found = row(world, name, 1, 4.0)
    there = [instances for _, instances, _, _ in found.phases]
    peak = DOUBLINGS.index(max(DOUBLINGS))
    assert there[peak] >= 3 * there[0] and there[-1] < there[peak]
    assert found.finished == pytest.approx(1.0, abs=0.01)
    fixed = there[peak] * world.scenario.kind.spot_price * world.now / 3600
    assert 0 < found.usd < 0.9 * fixed
