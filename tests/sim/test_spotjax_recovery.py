"""The baselines as recovery policies of a simulated Spotjax: the server's plans, on the same engine."""

from __future__ import annotations

import pytest

from spotjax.fleet.change import Recovery
from spotjax.meshes.instance_types import instance_type
from spotjax.meshes.shape import MeshShape
from spotjax.models.presets import preset
from spotjax.planner.published import PublishedProfile
from spotjax.planner.published_tables import TABLES
from spotjax.sim.assumptions import Assumptions
from spotjax.sim.results import Outcome
from spotjax.sim.systems.spotjax import Spotjax
from spotjax.sim.systems.spotjax_options import SpotjaxOptions
from spotjax.sim.workload import RequestTrace, SpotEvent, SpotTrace
from spotjax.sim.world import Scenario, World

NAMES = tuple(f"i-{number}" for number in range(6))
PAIR = MeshShape(3, 2, 4)


def served(recovery: Recovery, notice: float = 30.0) -> tuple[World, Outcome]:
    """GPT-20B on three pairs of instances, of which one goes at 100 s; a new one comes at 200 s."""
    spot = SpotTrace(
        "test", (SpotEvent(0, added=NAMES), SpotEvent(100, removed=("i-5",)), SpotEvent(200, added=("new",))), 400.0
    )
    requests = RequestTrace.of("test", [float(second) for second in range(0, 300, 6)], 512, 128)
    scenario = Scenario(
        "test", preset("gpt-20b"), PublishedProfile(TABLES["gpt-20b"]), instance_type("g4dn.12xlarge"), spot, requests,
        Assumptions(notice_seconds=notice),
    )  # fmt: skip
    world, wanted = World(scenario), PAIR if recovery == "rerouting" else None
    system = Spotjax(options=SpotjaxOptions(recovery=recovery, wanted=wanted))
    world.run(system)
    return world, Outcome.of(world, system.name, 0)


@pytest.mark.parametrize("recovery", ["spotjax", "reparallelization", "rerouting"])
@pytest.mark.parametrize("notice", [0.0, 30.0])
def test_no_request_is_lost_in_any_policy(recovery: Recovery, notice: float) -> None:
    _, outcome = served(recovery, notice)
    assert outcome.finished.all() and not outcome.lost.any()


def test_reparallelization_stops_until_all_parameters_are_read() -> None:
    world, outcome = served("reparallelization")
    spec, assumed = world.scenario.spec, world.scenario.assumptions
    first = world.changes[1]
    assert first.shape == MeshShape(2, 2, 4) and first.loaded >= 2 * spec.parameter_bytes
    seconds = spec.parameter_bytes / first.shape.stage / assumed.checkpoint_bandwidth
    assert first.stall == pytest.approx(seconds + assumed.switch_seconds, rel=0.05)
    assert outcome.recomputed.sum() > 0 and first.kept == 0


def test_rerouting_closes_the_hurt_replica_and_opens_another_without_stopping_others() -> None:
    world, _ = served("rerouting", notice=0.0)
    shapes = [str(change.shape) for change in world.changes]
    assert shapes[0] == "3x2x4" and "2x2x4" in shapes and shapes[-1] == "3x2x4"
    loads = [change for change in world.changes if change.loaded]
    assert len(loads) == 1 and loads[0].loaded == pytest.approx(world.scenario.spec.parameter_bytes, rel=0.05)


def test_spotjax_reads_nothing_and_computes_nothing_again() -> None:
    world, outcome = served("spotjax")
    assert sum(change.loaded for change in world.changes) == 0 and outcome.recomputed.sum() == 0
    assert max(change.stall for change in world.changes) < 2
