"""A simulated Spotjax loses nothing, stops no longer than its plans say, and is better whole than without a part."""

from __future__ import annotations

from math import isnan

import pytest
from spotjax_cases import KIND, NAMES, POSITION_BYTES, SPEC, SWITCH_SECONDS, WORKER_SECONDS, finished, run, scenario

from spotjax.errors import ConfigError
from spotjax.meshes.shape import MeshShape
from spotjax.planner.demand import Demand
from spotjax.sim.systems.spotjax import Spotjax
from spotjax.sim.systems.spotjax_options import FEATURES, SpotjaxOptions
from spotjax.sim.workload import SpotEvent

START4, START6 = SpotEvent(0, NAMES[:4]), SpotEvent(0, NAMES[:6])
STEADY = [10.0 * number for number in range(30)]


def test_without_events_nothing_changes_and_all_is_served() -> None:
    world, _ = run(scenario([START4], STEADY, 400))
    assert finished(world)
    assert [(change.shape, change.reason) for change in world.changes] == [(MeshShape(2, 2, 4), "start")]
    assert max(world.book.recomputed) == 0


def test_requests_wait_until_the_first_workers_have_started() -> None:
    world, _ = run(scenario([START4], [0.0, 1.0, 20.0], 400))
    assert world.changes[0].seconds == WORKER_SECONDS
    assert [first > WORKER_SECONDS for first in world.book.first_token] == [True] * 3
    assert world.book.first_token[0] < WORKER_SECONDS + 3 and world.changes[0].loaded == 0


def test_an_instance_that_is_noticed_while_the_first_workers_start_is_left_out() -> None:
    world, system = run(scenario([SpotEvent(0, NAMES[:5]), SpotEvent(32, removed=NAMES[:1])], STEADY, 400))
    assert finished(world)
    assert [(change.seconds, change.shape) for change in world.changes] == [(WORKER_SECONDS, MeshShape(2, 2, 4))]
    assert system._replicas.standing_on() == set(NAMES[1:5])


def test_a_newcomer_that_goes_and_comes_again_starts_again() -> None:
    events = [SpotEvent(0, NAMES[:3]), SpotEvent(100, NAMES[3:4]), SpotEvent(102, removed=NAMES[3:4])]
    world, _ = run(scenario([*events, SpotEvent(104, NAMES[3:4])], STEADY, 400, notice=0))
    assert finished(world)
    one, late = run(scenario([events[0], SpotEvent(104, NAMES[3:4])], STEADY, 400, notice=0)), world.changes[-1]
    assert late.shape == MeshShape(2, 2, 4) and late.seconds == one[0].changes[-1].seconds > 104 + WORKER_SECONDS


def test_newcomers_are_used_as_soon_as_they_have_their_parameters_and_nobody_stops_for_them() -> None:
    world, _ = run(scenario([START4, SpotEvent(100, NAMES[4:6])], STEADY, 400))
    assert finished(world)
    change = world.changes[-1]
    assert change.shape == MeshShape(3, 2, 4) and change.stall == 0
    stages = SPEC.parameter_bytes / 2  # each newcomer gets a stage, at the speed of its network; embeddings are tied
    embedding = SPEC.parameters[0].size * SPEC.dtype_bytes
    copying = (stages + embedding) / KIND.network_bandwidth
    assert change.seconds == pytest.approx(100 + WORKER_SECONDS + copying + SWITCH_SECONDS, rel=0.005)
    assert change.moved == pytest.approx(2 * stages + embedding, rel=0.01)


@pytest.mark.parametrize("leave", ["early", "late"])
def test_a_replica_that_leaves_stops_for_its_kv_and_a_switch_and_the_others_go_on(leave: str) -> None:
    """One sequence on each replica; that on the one that goes moves, half of its layers from each instance."""
    options = SpotjaxOptions(leave="early" if leave == "early" else "late", demand=Demand(8, 512, 512, kv_pages=640))
    case = scenario([START6, SpotEvent(60, removed=NAMES[5:6])], [25.0, 25.1, 25.2], 400, 512)
    world, _ = run(case, options=options)
    assert finished(world)
    change = world.changes[-1]
    assert change.shape == MeshShape(2, 2, 4) and (change.kept, change.recomputed) == (1, 0)
    assert change.seconds < 60
    pages = change.moved / (16 * POSITION_BYTES)
    assert pages == round(pages) and 512 / 16 < pages <= 1024 / 16
    moving = change.moved / 2 / KIND.network_bandwidth
    assert change.stall == pytest.approx(moving + SWITCH_SECONDS, rel=0.05)
    gaps = sorted(world.book.largest_gap)
    assert gaps[1] < 0.5 < gaps[2], "the other sequences have not noticed"
    assert (change.seconds > 55) == (leave == "late")
    assert sum(world.book.recomputed) == 0


def test_a_spare_takes_the_place_of_one_that_is_noticed() -> None:
    world, _ = run(scenario([SpotEvent(0, NAMES[:5]), SpotEvent(60, removed=NAMES[:1])], STEADY, 400))
    assert finished(world)
    change = world.changes[-1]
    assert change.shape == MeshShape(2, 2, 4) and change.seconds < 60
    assert change.moved < 0.6 * SPEC.parameter_bytes, "one stage, and some KV"


@pytest.mark.parametrize("without", [None, "backup"])
def test_a_loss_without_notice_costs_the_last_moment_or_all_kv(without: str | None) -> None:
    case = scenario([START4, SpotEvent(35, removed=NAMES[:1])], [25.0, 25.1, 25.2], 400, notice=0)
    world, _ = run(case, "backup" if without else None)
    assert finished(world)
    hurt = [recomputed for recomputed in world.book.recomputed if recomputed]
    assert len(hurt) in (1, 2)
    if without is None:
        assert max(hurt) <= 4
    else:
        assert min(hurt) > 512


def test_a_copy_is_lost_with_its_keeper() -> None:
    case = scenario([START6, SpotEvent(35, removed=NAMES[:2])], [25.0 + n / 10 for n in range(6)], 400, notice=0)
    world, _ = run(case)  # the second is the keeper of the first
    assert finished(world)
    assert max(world.book.recomputed) > 512


def test_requests_wait_while_nothing_fits_and_the_checkpoint_is_read_when_something_does() -> None:
    events = [START4, SpotEvent(50, removed=NAMES[:4]), SpotEvent(200, NAMES[4:8])]
    for notice in (0, 30):
        world, _ = run(scenario(events, STEADY, 600, notice=notice))
        assert finished(world) and world.book.restarts == [0] * len(STEADY)
        reading = world.scenario.assumptions.checkpoint_bandwidth
        assert None in [change.shape for change in world.changes]
        change = world.changes[-1]
        assert change.shape == MeshShape(2, 2, 4) and change.loaded > 2 * 0.99 * SPEC.parameter_bytes
        starting = WORKER_SECONDS + SWITCH_SECONDS
        assert change.seconds == pytest.approx(200 + starting + change.loaded / 4 / reading, rel=0.01)


def test_kv_that_outlived_the_mesh_is_used_by_the_next() -> None:
    """Three of four go; what the fourth has is half of the layers of one replica: too little. Parameters are read."""
    events = [START4, SpotEvent(50, removed=NAMES[1:4]), SpotEvent(200, NAMES[4:7])]
    world, _ = run(scenario(events, [45.0, 45.1], 600, notice=0))
    assert finished(world)
    assert world.changes[-1].moved > 0 and world.changes[-1].loaded > 0


@pytest.mark.parametrize("second", [31.0, 35.0, 38.0, 45.0])
def test_a_notice_during_a_change_leads_to_another_plan(second: float) -> None:
    events = [SpotEvent(0, NAMES[:7]), SpotEvent(60, removed=NAMES[:1]), SpotEvent(second + 30, removed=NAMES[6:7])]
    world, system = run(scenario(events, STEADY, 400))
    assert finished(world)
    assert world.changes[-1].shape == MeshShape(2, 2, 4)
    assert sum(world.book.recomputed) == 0
    assert system._replicas.standing_on() <= set(NAMES[1:6])


@pytest.mark.parametrize("seconds", [100.5, 105.5, 108.0, 112.0, 112.3])
def test_a_newcomer_that_is_lost_before_it_serves_does_no_harm(seconds: float) -> None:
    events = [START4, SpotEvent(100, NAMES[4:6]), SpotEvent(seconds, removed=NAMES[5:6])]
    world, _ = run(scenario(events, STEADY, 400, notice=0))
    assert finished(world)
    assert world.changes[-1].shape == MeshShape(2, 2, 4)


def test_what_was_copied_before_a_plan_was_given_up_is_not_copied_again() -> None:
    """Parameters of a newcomer whose peer goes while they are copied are there when the next one comes."""
    events = [START4, SpotEvent(100, NAMES[4:6]), SpotEvent(111, removed=NAMES[5:6]), SpotEvent(120, NAMES[6:7])]
    world, _ = run(scenario(events, STEADY, 400, notice=0))
    assert world.changes[-1].shape == MeshShape(3, 2, 4)
    assert world.changes[-1].moved < 0.65 * SPEC.parameter_bytes


def test_an_instance_that_comes_back_under_its_name_has_nothing() -> None:
    events = [START4, SpotEvent(50, removed=NAMES[:1]), SpotEvent(60, NAMES[:1])]
    world, _ = run(scenario(events, STEADY, 400, notice=0))
    assert finished(world)
    assert world.changes[-1].shape == MeshShape(2, 2, 4)
    assert world.changes[-1].moved > 0.4 * SPEC.parameter_bytes


def test_without_optimizer_only_the_number_of_replicas_changes() -> None:
    events = [SpotEvent(0, NAMES[:6]), SpotEvent(60, removed=NAMES[:1]), SpotEvent(90, removed=NAMES[1:4])]
    for without in ("optimizer", None):
        world, _ = run(scenario(events, STEADY, 600), "optimizer" if without else None)
        kinds = {(change.shape.stage, change.shape.tensor) for change in world.changes if change.shape}
        assert kinds == {(2, 4)}
    events = [SpotEvent(0, NAMES[:3]), SpotEvent(60, removed=NAMES[:1])]
    world, _ = run(scenario(events, [], 600), "optimizer")
    assert [change.shape for change in world.changes] == [MeshShape(1, 3, 4), None]
    world, _ = run(scenario(events, [], 600))
    assert [change.shape for change in world.changes] == [MeshShape(1, 3, 4), MeshShape(1, 2, 4)]


@pytest.mark.parametrize("notice", [0.0, 30.0])
def test_nothing_is_better_without_one_of_its_parts(notice: float) -> None:
    events = [
        SpotEvent(0, NAMES[:7]),
        SpotEvent(60, removed=NAMES[:1]),
        SpotEvent(120, NAMES[7:9]),
        SpotEvent(200, removed=NAMES[2:4]),
    ]
    case = scenario(events, [2.0 * number for number in range(150)], 600, notice=notice)
    whole, _ = run(case)
    moved = sum(change.moved + change.loaded for change in whole.changes)
    stalled = sum(change.stall for change in whole.changes)
    for feature in FEATURES:
        world, _ = run(case, feature)
        assert finished(world)
        assert sum(change.moved + change.loaded for change in world.changes) >= 0.98 * moved, feature
        if feature in ("matcher", "migration", "arranger", "precopy"):
            assert sum(change.stall for change in world.changes) >= 0.95 * stalled, feature
        if feature == "backup":
            assert sum(world.book.recomputed) >= sum(whole.book.recomputed)


def test_positions_in_order_of_devices_move_more() -> None:
    events = [SpotEvent(0, NAMES[:7]), SpotEvent(60, removed=NAMES[:1])]
    moved = {}
    for without in ("matcher", None):
        world, _ = run(scenario(events, STEADY, 400), "matcher" if without else None)
        assert finished(world)
        moved[without] = sum(change.moved for change in world.changes)
    assert moved["matcher"] > 3 * moved[None]


def test_stalls_are_longer_where_parameters_move_after_the_stop() -> None:
    events = [SpotEvent(0, NAMES[:5]), SpotEvent(60, removed=NAMES[:1])]
    whole, _ = run(scenario(events, STEADY, 400))
    copying = SPEC.parameter_bytes / 2 / KIND.network_bandwidth
    for without in ("migration", "arranger"):
        world, _ = run(scenario(events, STEADY, 400), "migration" if without == "migration" else "arranger")
        assert world.changes[-1].stall > whole.changes[-1].stall + 0.9 * copying


def test_on_demand_instances_are_requested_when_the_load_asks_for_them_and_given_back() -> None:
    events = [SpotEvent(0, NAMES[:2]), SpotEvent(600, NAMES[2:10])]
    case = scenario(events, [1.5 * number for number in range(600)], 1500)
    plain, _ = run(case)
    options = SpotjaxOptions(fallback=True, demand=Demand(8, 512, 128, kv_pages=640))
    world, _ = run(case, options=options)
    assert finished(world)
    assert plain.hours()[1] == 0 < world.hours()[1] < 8 * 1500 / 3600
    assert not any(one.on_demand for one in world.instances.values()), "they are given back when spot ones came"
    mean = sum(map(float.__sub__, world.book.finish, world.book.arrival)) / len(world.book)
    unfinished = sum(map(isnan, plain.book.finish))
    late = sum(end - start for end, start in zip(plain.book.finish, plain.book.arrival, strict=True) if not isnan(end))
    assert unfinished or mean < late / len(plain.book)


def test_only_features_can_be_left_out() -> None:
    with pytest.raises(ConfigError, match="no feature 'magic'"):
        Spotjax("magic")  # type: ignore[arg-type]
