"""What is measured of a load that is known, and how many instances that comes to."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import msgspec
import pytest
from capacity_cases import SETTINGS

from spotjax.fleet.capacity.load import Measured, Meter
from spotjax.fleet.capacity.wanted import Basis, Steady, Wanted, affordable, at_prices, scale_of, wanted
from spotjax.fleet.change import Planning
from spotjax.meshes.instance import DeviceRef, Instance, InstanceType
from spotjax.meshes.layout import split_layers
from spotjax.meshes.placement import Placement
from spotjax.meshes.shape import MeshShape, Position
from spotjax.models.config import DecoderConfig
from spotjax.models.spec import ModelSpec
from spotjax.planner.cost import Roofline
from spotjax.planner.demand import Demand
from spotjax.planner.goal import Goal
from spotjax.planner.latency import Scaled
from spotjax.planner.load import Load
from spotjax.planner.optimizer import choose_shape

SPEC = ModelSpec(DecoderConfig(vocab=64, width=256, layers=4, heads=8, kv_heads=8, head_size=32, mlp=1024))
DEMAND = Demand(batch=4, prompt=64, output=64, page_size=16)
BOX = InstanceType("box", 1, 2**30, 1e12, 1e11, 1e10, 1e9, spot_price=1.0, on_demand_price=3.0)
PLANNING = Planning(SPEC, DEMAND)
BASIS = Basis(PLANNING, (), BOX)
ONE = choose_shape(SPEC, [Instance("i", BOX)], DEMAND, goal=Goal(Load(1e-6), near_tie=1e9)).rate
"""Requests per second that one instance serves at full batch, or less."""
MOST = choose_shape(SPEC, [Instance("i", BOX)], DEMAND).rate
LIMITS = msgspec.structs.replace(SETTINGS, most=32, utilisation=0.5)


def loaded(rate: float, **more: object) -> Measured:
    return replace(Measured(Load(rate)), **more)


def test_rate_lengths_and_service_are_those_of_a_known_queue() -> None:
    """A server without a limit: Poisson arrivals at 2/s that take 5 s and 40 tokens each."""
    random, meter, now, ends, tokens = Random(1), Meter(200.0, 0.0), 0.0, list[float](), 0.0
    look = 0.0
    while now < 600:
        now += random.expovariate(2.0)
        while look < now:
            for end in [end for end in ends if end <= look]:
                ends.remove(end)
                meter.finished(40)
            tokens += len(ends) * 8.0  # each gets 8 tokens a second
            meter.sample(look, len(ends), 3, round(tokens))
            look += 1.0
        meter.arrived(now, 100)
        ends.append(now + 5.0)
    found = meter.measured(now)
    assert found.load.rate == pytest.approx(2.0, rel=0.2) and found.load.arrival_scv == pytest.approx(1.0, abs=0.5)
    assert (found.prompt, found.output, found.queued) == (100, 40, 3)
    assert found.service_seconds == pytest.approx(5.0, rel=0.1) and found.batch == pytest.approx(10.0, rel=0.2)


def test_few_requests_tell_little_and_nobody_is_idle_while_something_runs() -> None:
    meter = Meter(100.0, 0.0)
    for number in range(5):
        meter.arrived(10 + number / 100, 10)
    found = meter.measured(10.2)
    assert found.load.rate <= 5 / 25 and found.prompt == found.output == 0
    meter.sample(500.0, 1, 0, 0)
    assert meter.measured(500.0).idle_seconds == 0.0
    assert meter.measured(800.0).idle_seconds == 300.0
    assert meter.measured(800.0).load.rate < 0.01


@pytest.mark.parametrize("times", [0.2, 1.0, 2.0, 5.0])
def test_instances_are_as_many_as_keep_up_with_room_to_spare(times: float) -> None:
    found = wanted(LIMITS, loaded(times * MOST), BASIS)
    assert found.target is not None and found.target.rate > times * MOST * 2 * 0.95
    fewer = [Instance(f"{n}", BOX) for n in range(found.target.instances - 1)]
    if fewer:
        assert choose_shape(SPEC, fewer, DEMAND).rate < times * MOST * 2 * 1.05, "one fewer would not do"
    assert found.instances == found.target.instances


def test_limits_spares_queues_and_what_runs_count() -> None:
    base = wanted(LIMITS, loaded(2 * MOST), BASIS).instances
    assert wanted(msgspec.structs.replace(LIMITS, spares=2), loaded(2 * MOST), BASIS).instances == base + 2
    assert wanted(msgspec.structs.replace(LIMITS, most=base - 1), loaded(2 * MOST), BASIS).instances == base - 1
    assert wanted(LIMITS, loaded(0.0), BASIS, floor=7).instances == 7
    assert wanted(LIMITS, loaded(2 * MOST), BASIS, affordable=2).instances == 2
    assert wanted(LIMITS, loaded(0.0, queued=round(240 * MOST)), BASIS).instances > 1
    assert wanted(LIMITS, loaded(0.0, running=5 * DEMAND.batch), BASIS).instances == 5
    assert wanted(LIMITS, loaded(0.0), None).instances == 1
    slow = Basis(PLANNING, (), BOX, scale=3.0)
    assert wanted(LIMITS, loaded(2 * MOST), slow).instances >= 3 * base - 3


def test_an_idle_service_has_its_floor_and_never_less_than_a_replica_needs() -> None:
    idle = loaded(0.0, idle_seconds=1000.0)
    limits = msgspec.structs.replace(LIMITS, least=4, idle=2)
    assert wanted(limits, loaded(0.0), BASIS).instances == 4
    assert wanted(limits, idle, BASIS).instances == 2
    assert wanted(limits, idle, BASIS, floor=3).instances == 4, "an operator wants more"
    assert wanted(msgspec.structs.replace(limits, idle=0), idle, BASIS).instances == 0
    small = replace(BOX, memory_bytes=SPEC.parameter_bytes // 2)
    assert wanted(LIMITS, loaded(0.0), Basis(PLANNING, (), small)).instances > 1


def test_a_latency_target_buys_more_than_keeping_up() -> None:
    keeps_up = wanted(LIMITS, loaded(2 * MOST), BASIS)
    assert keeps_up.target is not None
    target = keeps_up.target.percentile_seconds * 0.7
    quick = wanted(msgspec.structs.replace(LIMITS, latency_seconds=target), loaded(2 * MOST), BASIS)
    assert quick.target is not None and quick.target.percentile_seconds <= target
    assert quick.instances > keeps_up.instances


def test_up_at_once_down_after_a_while() -> None:
    steady = Steady(100.0)
    seen = [steady.add(now, Wanted(count, "")).instances for now, count in
            [(0, 2), (10, 5), (20, 3), (100, 3), (109, 1), (111, 1), (150, 1), (205, 1), (211, 1)]]  # fmt: skip
    assert seen == [2, 5, 5, 5, 5, 3, 3, 1, 1]


def test_the_planners_error_is_found_from_what_requests_take() -> None:
    slower = replace(PLANNING, latency=lambda kind: Scaled(Roofline(SPEC, kind), 7.0))
    layers = split_layers(4, 1)
    placement = Placement(1, MeshShape(1, 1, 1), layers, {Position(0, 0, 0): DeviceRef("i", 0)})
    truth = choose_shape(
        SPEC, [Instance("i", BOX)], replace(DEMAND, batch=4), goal=Goal(), latency=slower.latency
    ).latency
    found = scale_of(PLANNING, placement, BOX, loaded(1.0, service_seconds=truth, batch=4.0))
    assert found == pytest.approx(7.0)
    assert scale_of(PLANNING, placement, BOX, loaded(1.0)) == 0.0


def test_prices_are_those_of_the_offers() -> None:
    assert at_prices(BOX, 0.5, 0.0).spot_price == 0.5 and at_prices(BOX, 0.0, 0.0).spot_price == 1.0
    assert affordable(msgspec.structs.replace(SETTINGS, cost_per_hour=3.5), 1.0) == 3
    assert affordable(msgspec.structs.replace(SETTINGS, cost_per_hour=0.0), 1.0) == float("inf")
