"""SpotServe, Reparallelization and Rerouting: nothing is lost, nothing runs where nothing is, and what they decide."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from published_cases import NAMES, SYSTEMS, run, scenario, workload

from spotjax.sim.systems.baselines import Reparallelization, Rerouting
from spotjax.sim.systems.spotserve import SpotServe
from spotjax.sim.workload import SpotEvent
from spotjax.sim.world import World

NETWORK = 50e9 / 8
"""Bytes per second between instances."""
THREE_BATCHES_EACH = [0.0] * 24
"""Requests for two replicas of gpt-20b on 8 instances, which begin at 5 s: the third is running at 36 s."""


def start(count: int) -> SpotEvent:
    return SpotEvent(0.0, added=NAMES[:count])


def shapes(world: World) -> list[str]:
    return [str(change.shape) for change in world.changes]


@st.composite
def markets(draw: st.DrawFn) -> list[SpotEvent]:
    """Instances come and go in any way, several in one instant, all of them, and some as soon as they have come."""
    there = list(NAMES[: draw(st.integers(0, 9))])
    events = [SpotEvent(0.0, added=tuple(there))] if there else []
    given, now = len(there), 0.0
    for _ in range(draw(st.integers(0, 9))):
        now += draw(st.sampled_from((0.0, 0.0, 1.0, 7.5, 20.0, 30.0, 45.0, 70.0)))
        if now == 0:
            now = 1.0
        if there and draw(st.booleans()):
            lost = draw(st.sampled_from((1, 1, 2, 3, len(there))))
            gone = draw(st.permutations(there))[:lost]
            there = [name for name in there if name not in gone]
            events.append(SpotEvent(now, removed=tuple(gone)))
        else:
            new = NAMES[given : given + draw(st.integers(1, 6))]
            given += len(new)
            there += new
            events.append(SpotEvent(now, added=new))
    return events


@pytest.mark.parametrize("name", SYSTEMS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whatever_comes_and_goes_every_request_is_somewhere_once(name: str, data: st.DataObject) -> None:
    events = data.draw(markets())
    gaps = data.draw(st.lists(st.sampled_from((0.0, 0.5, 2.0, 5.0, 11.0, 40.0)), max_size=30))
    outputs = [data.draw(st.sampled_from((1, 20, 128))) for _ in gaps]
    arrivals = [sum(gaps[: number + 1]) for number in range(len(gaps))]
    model = data.draw(st.sampled_from(("gpt-20b", "gpt-20b", "opt-6.7b")))
    case = scenario(
        events, arrivals, duration=700.0, model=model, output=outputs,
        notice_seconds=data.draw(st.sampled_from((0.0, 5.0, 30.0))),
        start_seconds=data.draw(st.sampled_from((0.0, 40.0))),
        engine_start_seconds=data.draw(st.sampled_from((0.0, 5.0))),
    )  # fmt: skip
    run(case, SYSTEMS[name](workload(model)))


CHOSEN = {
    "opt-6.7b": {
        3: "3x1x4", 4: "4x1x4", 6: "6x1x4", 7: "7x1x4", 8: "8x1x4", 9: "9x1x4", 10: "5x2x4", 12: "6x2x4",
    },
    "gpt-20b": {
        3: "1x3x4", 4: "1x2x8", 6: "2x3x4", 7: "2x3x4", 8: "2x2x8", 9: "2x2x8", 10: "2x2x8", 12: "3x2x8",
    },
    "llama-30b": {4: "1x2x8", 6: "1x3x8", 7: "1x3x8", 8: "1x4x8", 9: "1x4x8", 10: "1x4x8", 12: "1x6x8"},
}  # fmt: skip
"""By instances, as the artifact's rule chooses on its profiles."""


@pytest.mark.parametrize("model", CHOSEN)
def test_they_start_with_the_shapes_that_the_artifact_chooses(model: str) -> None:
    for instances, shape in CHOSEN[model].items():
        for system in (SpotServe(workload(model), 1), Reparallelization(workload(model), 2)):
            assert shapes(run(scenario([start(instances)], duration=10.0, model=model), system)) == [shape]


def test_rerouting_keeps_the_stages_of_the_whole_pool() -> None:
    events = [start(7), SpotEvent(100.0, added=NAMES[7:10]), SpotEvent(300.0, removed=NAMES[:1])]
    world = run(scenario(events), Rerouting(workload(), 2, pool=10))
    assert shapes(world) == ["1x2x8", "2x2x8", "1x2x8", "2x2x8"]  # 7, 10 and 9 instances, four to a replica
    load = 81048059904 / 4 / 7e8  # an instance reads a quarter of the parameters
    assert [change.seconds for change in world.changes[:2]] == pytest.approx([5.0, 100 + load + 5])
    assert world.changes[3].seconds - world.changes[2].seconds == pytest.approx(load + 5)


def test_a_spare_instance_takes_over_what_the_lost_one_held() -> None:
    events = [start(9), SpotEvent(100.0, removed=NAMES[:1])]
    world = run(scenario(events, duration=200.0, engine_start_seconds=0.0), SpotServe(workload(), 1))
    _, switched = world.changes
    width, layers = 6144, 22
    layer = 12 * width * width + 13 * width  # attention and MLP, their biases and norms
    half = (
        (layers * layer + (51200 + 2048) * width) * 4 // 2
    )  # four of eight devices of the first stage, and its embeddings
    assert str(switched.shape) == "2x2x8"
    assert switched.moved == pytest.approx(half, rel=2e-3) and switched.loaded == 0
    assert switched.stall == pytest.approx(switched.moved / NETWORK + 0.5)
    assert 95 < switched.seconds < 100


def test_kv_of_parked_batches_moves_and_they_go_on() -> None:
    events = [start(9), SpotEvent(40.0, removed=NAMES[:1])]
    quiet = run(scenario(events, duration=200.0), SpotServe(workload(), 1)).changes[1]
    busy = run(scenario(events, THREE_BATCHES_EACH, duration=200.0), SpotServe(workload(), 1))
    switched = busy.changes[1]
    assert (switched.kept, switched.recomputed) == (8, 0)
    assert busy.book.restarts == [0] * 24 and busy.book.generated == [128] * 24
    # Half of what four sequences hold in 22 layers of the stage that is taken over, in pages of 16 positions.
    least, most = (2 * 22 * 6144 * 4 * 4 * positions // 2 for positions in (512, 640))
    assert least < switched.moved - quiet.moved < most
    assert all(5 < largest < 6 for largest in busy.book.largest_gap[16:]), "they wait for engines to start"
    assert max(busy.book.largest_gap[:16]) < 0.2


def test_more_replicas_do_not_stop_those_that_serve() -> None:
    model = "opt-6.7b"
    grows = [start(4), SpotEvent(100.0, added=NAMES[4:6])]
    arrivals = [20.0 * number for number in range(9)]  # one at a time: the first replica serves them all
    alone, growing = (
        run(scenario(events, arrivals, model=model), SpotServe(workload(model), 1)) for events in ([start(4)], grows)
    )
    assert growing.book.finish == alone.book.finish
    assert shapes(growing) == ["4x1x4", "6x1x4"]
    assert growing.changes[1].seconds == pytest.approx(105) and growing.changes[1].stall == 0


@pytest.mark.parametrize("notice", [0.0, 30.0])
def test_replicas_that_were_to_come_do_not_appear_on_what_is_gone(notice: float) -> None:
    """``run`` looks after every event; and the mesh is then made for those that are left."""
    events = [start(4), SpotEvent(100.0, added=NAMES[4:6]), SpotEvent(103.0, removed=NAMES[4:5])]
    arrivals = [float(second) for second in range(200)]
    case = scenario(events, arrivals, model="opt-6.7b", notice_seconds=notice)
    system = SpotServe(workload("opt-6.7b"), 1)
    world = run(case, system)
    assert shapes(world) == ["4x1x4", "6x1x4", "5x1x4"]
    assert world.book.generated == [128] * 200
    assert NAMES[4] not in frozenset[str]().union(*system.replicas.values())


def test_what_comes_and_goes_within_the_notice_is_one_change() -> None:
    for events in (
        [SpotEvent(100.0, added=NAMES[8:9], removed=NAMES[:1])],
        [SpotEvent(100.0, added=NAMES[8:9]), SpotEvent(100.0, removed=NAMES[:1])],
    ):
        world = run(scenario([start(8), *events], [60.0] * 4, duration=200.0), SpotServe(workload(), 1))
        assert shapes(world) == ["2x2x8", "2x2x8"]
        assert world.changes[1].seconds >= 100


def test_a_second_notice_during_a_switch_is_handled_after_it() -> None:
    events = [start(8), SpotEvent(100.0, removed=NAMES[:1]), SpotEvent(103.0, removed=NAMES[1:2])]
    system = SpotServe(workload(), 1)
    world = run(scenario(events, [3.0 * number for number in range(60)]), system)
    assert shapes(world)[:3] == ["2x2x8", "2x3x4", "2x3x4"]
    assert [change.seconds > 100 - 5 for change in world.changes[1:]] == [True, True]
    assert frozenset[str]().union(*system.replicas.values()) == set(NAMES[2:8])
    assert world.book.generated == [128] * 60


def test_nothing_starts_on_an_instance_before_it_is_there() -> None:
    """The mesh has stopped before the newcomer that it grows by is ready, because it had nothing to do."""
    for name, least in (("spotserve", 20.0), ("reparallelization", 20.0 + 81048059904 / 4 / 7e8)):
        events = [start(3), SpotEvent(100.0, added=NAMES[3:4])]
        world = run(scenario(events, engine_start_seconds=20.0), SYSTEMS[name](workload()))
        assert shapes(world) == ["1x3x4", "1x2x8"]
        assert world.changes[1].seconds >= 100 + least


def test_parked_batches_without_a_replica_are_queued_again() -> None:
    events = [start(8), SpotEvent(40.0, removed=NAMES[:5])]
    world = run(scenario(events, THREE_BATCHES_EACH), SpotServe(workload(), 1))
    assert shapes(world) == ["2x2x8", "1x3x4"]
    assert (world.changes[1].kept, world.changes[1].recomputed) == (4, 4)
    assert world.book.restarts == [0] * 20 + [1] * 4 and world.book.recomputed[23] > 512
    assert world.book.generated == [128] * 24


@pytest.mark.parametrize("name", SYSTEMS)
def test_all_gone_and_back(name: str) -> None:
    events = [start(4), SpotEvent(100.0, removed=NAMES[:4]), SpotEvent(200.0, added=NAMES[4:8])]
    world = run(scenario(events, [10.0, 95.0, 150.0]), SYSTEMS[name](workload()))
    assert shapes(world) == ["1x2x8", "None", "1x2x8"]
    assert world.book.finish[0] < 100 and world.book.finish[2] >= world.book.finish[1] > world.changes[2].seconds
    load = 81048059904 / 4 / 7e8
    assert world.changes[2].seconds >= 200 + load, "nothing is read before an instance is there"
    assert world.changes[2].loaded == 81048059904
