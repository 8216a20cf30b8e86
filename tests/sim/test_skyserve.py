"""The peer that keeps more spot replicas than it needs, with on-demand ones in reserve."""

from __future__ import annotations

import pytest

from spotjax.meshes.instance_types import instance_type
from spotjax.models.presets import preset
from spotjax.planner.published import PublishedProfile
from spotjax.planner.published_tables import TABLES
from spotjax.sim.assumptions import Assumptions
from spotjax.sim.experiment import simulate
from spotjax.sim.results import Outcome
from spotjax.sim.systems.skyserve import SkyServe
from spotjax.sim.workload import RequestTrace, SpotEvent, SpotTrace
from spotjax.sim.world import Scenario, World

MODEL = "gpt-20b"


def scenario(events: list[SpotEvent], arrivals: list[float], **assumed: float) -> Scenario:
    """A replica of GPT-20B takes two instances."""
    return Scenario(
        "test", preset(MODEL), PublishedProfile(TABLES[MODEL]), instance_type("g4dn.12xlarge"),
        SpotTrace("test", tuple(events), 600.0), RequestTrace.of("test", arrivals, 512, 128), Assumptions(**assumed),
    )  # fmt: skip


def served(events: list[SpotEvent], arrivals: list[float], **assumed: float) -> Outcome:
    return simulate(scenario(events, arrivals, **assumed), "skyserve")


def test_a_replica_that_loses_an_instance_restarts_its_requests_elsewhere() -> None:
    start = SpotEvent(0, added=("a", "b", "c", "d"))
    outcome = served([start, SpotEvent(10, removed=("a",))], [6.0, 6.1], notice_seconds=0)
    assert outcome.restarts.tolist() == [1, 0] and outcome.finished.all()
    assert 512 < outcome.recomputed[0] < 640 and outcome.recomputed[1] == 0
    assert [str(change.shape) for change in outcome.changes][:2] == ["2x2x4", "1x2x4"]


def test_a_replica_serves_when_its_engine_has_started_and_read_its_parameters() -> None:
    """Those of the first moment are in place; of the others, each of two instances reads a half."""
    events = [SpotEvent(0, added=("a", "b")), SpotEvent(100, added=("c", "d"))]
    outcome = served(events, [0.0], engine_start_seconds=7.0)
    first, second = outcome.changes[:2]
    assert (first.seconds, str(first.shape), first.loaded) == (7.0, "1x2x4", 0)
    size = preset(MODEL).parameter_bytes
    assert second.seconds == pytest.approx(107 + size / 2 / Assumptions().checkpoint_bandwidth)
    assert second.loaded == size and 7 < outcome.first_token[0] < 10


def test_a_replica_whose_instance_is_noticed_before_it_began_is_given_up_and_the_others_are_used() -> None:
    """Of three newcomers the first is noticed while two of them load; the other two load then."""
    events = [SpotEvent(0, added=("a", "b")), SpotEvent(100, added=("c", "d", "e")), SpotEvent(140, removed=("c",))]
    outcome = served(events, [])
    reading = preset(MODEL).parameter_bytes / 2 / Assumptions().checkpoint_bandwidth
    opened = [change for change in outcome.changes if change.reason == "opened" and change.loaded]
    assert opened[0].seconds == pytest.approx(110 + 5 + reading) and str(opened[0].shape) == "2x2x4"


def test_instances_that_the_trace_has_on_demand_serve_together_with_spot_ones() -> None:
    outcome = served([SpotEvent(0, added=("a",)), SpotEvent(0, added=("b",), on_demand=True)], [10.0])
    assert str(outcome.changes[0].shape) == "1x2x4" and outcome.first_token[0] < 15


def test_after_a_notice_a_replica_gets_no_more_requests_but_keeps_those_that_it_has() -> None:
    start = SpotEvent(0, added=("a", "b", "c", "d"))
    outcome = served([start, SpotEvent(35, removed=("a",))], [4.0, 6.0, 7.0])
    assert outcome.restarts.sum() == 0 and outcome.finished.all()


def test_with_no_spot_instances_left_those_on_demand_serve() -> None:
    outcome = served([SpotEvent(0, added=("a", "b")), SpotEvent(40, removed=("a", "b"))], [50.0, 51.0])
    assert outcome.finished.all() and outcome.on_demand_hours > 0
    assert outcome.first_token.min() > 100, "they had to start"


def test_what_is_rented_is_given_back_when_spot_instances_are_enough() -> None:
    many = tuple(f"spot-{number}" for number in range(8))
    world = World(scenario([SpotEvent(0, added=("a", "b")), SpotEvent(200, added=many)], [10.0, 300.0]))
    world.run(SkyServe())
    assert [change.reason for change in world.changes].count("released") == 1
    assert not any(instance.on_demand for instance in world.instances.values())


def test_a_replica_in_reserve_that_was_to_be_given_back_serves_again_when_it_is_needed() -> None:
    """Four replicas on spot instances come while it serves and go before it is done."""
    many = tuple(f"spot-{number}" for number in range(8))
    events = [SpotEvent(0, added=("a", "b")), SpotEvent(200, added=many), SpotEvent(300, removed=(*many, "a", "b"))]
    case = scenario(events, [280.0, 350.0], notice_seconds=0)
    system = SkyServe()
    world = World(case)

    def keep_busy() -> None:  # with a request that ends after the spot instances went
        for one in system._standing:
            one.leaving = system._is_rented(one)

    world.at(290.0, keep_busy)
    world.run(system)
    reserve = [one for one in system._standing if system._is_rented(one)]
    assert reserve and not any(one.leaving for one in reserve)
    assert all(finish == finish for finish in world.book.finish)


@pytest.mark.parametrize("notice", [0.0, 30.0])
def test_no_request_is_lost_whatever_goes(notice: float) -> None:
    names = [f"i-{number}" for number in range(6)]
    events = [SpotEvent(0, added=tuple(names))]
    events += [SpotEvent(40.0 + 35 * number, removed=(name,)) for number, name in enumerate(names)]
    outcome = served(events, [float(second) for second in range(0, 200, 5)], notice_seconds=notice)
    assert outcome.finished.all() and not outcome.lost.any()
