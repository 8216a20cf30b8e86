"""Times the planner on large fleets, and compares its migrations with their lower bound and with simpler placements.

    python -m spotjax.tools.bench_planner --json planner.json

A 70B-shaped model on 8, 64, 256 and 1024 instances of eight devices loses an eighth of its instances, with KV of live
sequences in every replica; each part of the decision is timed. Then small fleets go through random events.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from spotjax.meshes.instance import DeviceRef, Instance, InstanceState
from spotjax.meshes.instance_types import instance_type
from spotjax.meshes.layout import split_layers
from spotjax.meshes.placement import Placement
from spotjax.meshes.shape import MeshShape, Position
from spotjax.models.presets import preset
from spotjax.models.spec import ModelSpec
from spotjax.planner.cohorts import assign_cohorts
from spotjax.planner.demand import Demand
from spotjax.planner.goal import Goal
from spotjax.planner.holdings import Holdings
from spotjax.planner.kv_cohorts import KvCohort, LiveSequence
from spotjax.planner.load import Load
from spotjax.planner.matcher import match
from spotjax.planner.migration import Links, MigrationPlan, plan_migration
from spotjax.planner.needs import Needs, needs_of
from spotjax.planner.optimizer import choose_shape

DEMAND = Demand(batch=16, prompt=1024, output=256)


@dataclass(frozen=True)
class Event:
    """A mesh that serves, and the instances and sequences of the one that follows."""

    spec: ModelSpec
    before: Placement
    instances: tuple[Instance, ...]
    live: Mapping[int, Sequence[LiveSequence]]


def placed(spec: ModelSpec, shape: MeshShape, instances: Sequence[Instance]) -> Placement:
    """A mesh on devices in order."""
    layers = split_layers(spec.config.layers, shape.stage)
    needs = needs_of(spec, shape, layers, ())
    return Placement(0, shape, layers, match(shape, needs, instances, Holdings({}, spec.dtype_bytes)))


def live_sequences(replicas: int, chance: random.Random, most: int) -> dict[int, list[LiveSequence]]:
    """Some sequences in every replica."""
    return {
        d: [LiveSequence(k, pages, pages * 16) for k in range(most) for pages in [chance.randint(1, 80)]]
        for d in range(replicas)
    }


def timed_decision(event: Event, shape: MeshShape | None) -> tuple[dict[str, float], MeshShape, MigrationPlan]:
    """Seconds of each part of one whole decision."""
    seconds: dict[str, float] = {}
    start, processor = time.perf_counter(), time.process_time()

    def lap(name: str) -> None:
        nonlocal start
        now = time.perf_counter()
        seconds[name], start = now - start, now

    ready = [instance for instance in event.instances if instance.state is InstanceState.READY]
    goal = Goal(load=Load(0.5 * len(ready), arrival_scv=4.0))
    decision = choose_shape(event.spec, ready, DEMAND, goal=goal)
    lap("choose")
    shape = shape or decision.shape
    layers = split_layers(event.spec.config.layers, shape.stage)
    cohorts = assign_cohorts(event.live, shape.data, DEMAND.pages, DEMAND.page_size).cohorts
    lap("cohorts")
    needs = needs_of(event.spec, shape, layers, cohorts)
    holdings = Holdings.of(event.spec, event.before, cohorts, event.instances)
    lap("needs")
    matching = match(shape, needs, ready, holdings)
    lap("match")
    targets = {device: needs[position] for position, device in matching.items()}
    plan = plan_migration(targets, holdings, Links.of(event.instances))
    lap("plan")
    seconds["total"] = sum(seconds.values())
    seconds["processor"] = time.process_time() - processor
    return seconds, shape, plan


def scale_event(instances: int, shape: MeshShape) -> Event:
    """An eighth of the instances is noticed, with KV everywhere."""
    spec, kind = preset("llama-3-70b"), instance_type("p5.48xlarge")
    fleet = [Instance(f"i-{n:04}", kind) for n in range(instances)]
    before = placed(spec, shape, fleet)
    after = tuple(replace(i, state=InstanceState.NOTICED) if n % 8 == 3 else i for n, i in enumerate(fleet))
    return Event(spec, before, after, live_sequences(shape.data, random.Random(instances), 12))


def growth(sizes: Sequence[int]) -> list[dict[str, Any]]:
    """One row for each size and kind of change."""
    rows = []
    for instances in sizes:
        for what, old, new in (
            ("same P and M", MeshShape(instances, 1, 8), MeshShape(instances - instances // 8, 1, 8)),
            ("P 1 to 2, M 8 to 4", MeshShape(instances, 1, 8), MeshShape(instances - instances // 8, 2, 4)),
        ):
            event = scale_event(instances, old)
            seconds, shape, plan = timed_decision(event, new)
            rows.append(
                {
                    "instances": instances,
                    "devices": 8 * instances,
                    "change": what,
                    "before": str(old),
                    "after": str(shape),
                    **seconds,
                    "transfers": len(plan.transfers),
                    "makespan_over_bound": plan.makespan / plan.lower_bound,
                }
            )
    return rows


def random_event(chance: random.Random) -> tuple[Event, MeshShape, Sequence[KvCohort]]:
    """Some of 4 to 16 instances go, some come, and the mesh changes to any other that fits."""
    spec, kind = preset("llama-3-70b"), instance_type("p5.48xlarge")
    shapes = [(1, 8), (2, 4), (2, 8), (4, 4), (3, 8), (5, 4), (4, 2)]
    count = chance.randint(4, 16)
    fleet = [Instance(f"i-{n:02}", kind) for n in range(count)]
    stage, tensor = chance.choice(shapes)
    before = placed(spec, MeshShape(8 // tensor * count // stage, stage, tensor), fleet)
    losing = chance.sample(range(count), chance.randint(0, min(3, count - 3)))
    states = [InstanceState.NOTICED, InstanceState.NOTICED, InstanceState.GONE]
    after = [replace(i, state=chance.choice(states)) if n in losing else i for n, i in enumerate(fleet)]
    after += [Instance(f"i-{count + n:02}", kind) for n in range(chance.randint(0 if losing else 1, 3))]
    ready = sum(i.state is InstanceState.READY for i in after)
    if chance.random() < 0.5:
        stage, tensor = chance.choice(shapes)
    shape = MeshShape(max(1, 8 // tensor * ready // stage), stage, tensor)
    live = live_sequences(before.shape.data, chance, chance.randint(0, 12))
    cohorts = assign_cohorts(live, shape.data, DEMAND.pages, DEMAND.page_size).cohorts
    return Event(spec, before, tuple(after), live), shape, cohorts


def compared(events: int, seed: int) -> dict[str, Any]:
    """Makespan over its lower bound, and bytes against devices in order and at random."""
    chance = random.Random(seed)
    ratios: list[float] = []
    bytes_by: dict[str, int] = {"matched": 0, "devices in order": 0, "random": 0}
    seconds_by = {"alive": dict.fromkeys(bytes_by, 0.0), "died out": dict.fromkeys(bytes_by, 0.0)}
    died_out = 0
    while len(ratios) < events:
        event, shape, cohorts = random_event(chance)
        ready = [i for i in event.instances if i.state is InstanceState.READY]
        if shape.devices > 8 * len(ready):
            continue
        needs = needs_of(event.spec, shape, split_layers(event.spec.config.layers, shape.stage), cohorts)
        holdings = Holdings.of(event.spec, event.before, cohorts, event.instances)
        in_order = match(shape, needs, ready, Holdings({}, event.spec.dtype_bytes))
        shuffled = chance.sample(ready, len(ready))
        placements: dict[str, Mapping[Position, DeviceRef]] = {
            "matched": match(shape, needs, ready, holdings),
            "devices in order": in_order,
            "random": match(shape, needs, shuffled, Holdings({}, event.spec.dtype_bytes)),
        }
        plans = {name: plan_for(event, needs, matching, holdings) for name, matching in placements.items()}
        loads = any(plan.bytes_loaded for plan in plans.values())
        died_out += loads
        for name, plan in plans.items():
            bytes_by[name] += plan.bytes_moved + plan.bytes_loaded
            seconds_by["died out" if loads else "alive"][name] += plan.makespan
        matched = plans["matched"]
        ratios.append(matched.makespan / matched.lower_bound if matched.lower_bound else 1.0)
    ordered = sorted(ratios)
    return {
        "events": events,
        "seed": seed,
        "makespan_over_bound": {
            "median": statistics.median(ordered),
            "p90": ordered[int(0.9 * events)],
            "worst": ordered[-1],
        },
        "bytes": bytes_by,
        "events_with_checkpoint": died_out,
        "makespan_seconds": seconds_by,
    }


def plan_for(
    event: Event, needs: Mapping[Position, Needs], matching: Mapping[Position, DeviceRef], holdings: Holdings
) -> MigrationPlan:
    """The migration to a given matching."""
    targets = {device: needs[position] for position, device in matching.items()}
    return plan_migration(targets, holdings, Links.of(event.instances))


def show(report: dict[str, Any]) -> None:
    """Prints the report as tables."""
    console = Console(width=140)
    table = Table(title="seconds of a whole decision; processor: time of this process alone")
    parts = ("choose", "cohorts", "needs", "match", "plan", "total", "processor")
    for heading in ("instances", "devices", "change", *parts, "transfers", "makespan / bound"):
        table.add_column(heading, justify="right")
    for row in report["growth"]:
        cells = [str(row["instances"]), str(row["devices"]), row["change"], *(f"{row[part]:.3f}" for part in parts)]
        table.add_row(*cells, str(row["transfers"]), f"{row['makespan_over_bound']:.3f}")
    console.print(table)
    events = report["random_events"]
    table = Table(title=f"{events['events']} random events, seed {events['seed']}")
    for heading in ("placement", "bytes moved or loaded", "relative", "makespans", "with checkpoint"):
        table.add_column(heading, justify="right")
    for name, size in events["bytes"].items():
        relative = size / events["bytes"]["matched"]
        seconds = [f"{events['makespan_seconds'][kind][name]:.1f} s" for kind in ("alive", "died out")]
        table.add_row(name, f"{size / 1e12:.2f} TB", f"{relative:.2f}x", *seconds)
    console.print(table)
    ratio = events["makespan_over_bound"]
    shown = ", ".join(f"{name} {value:.3f}" for name, value in ratio.items())
    console.print(f"makespan over lower bound: {shown}; {events['events_with_checkpoint']} events read the checkpoint")


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", type=int, nargs="+", default=[8, 64, 256, 1024], metavar="COUNT")
    parser.add_argument("--events", type=int, default=200, metavar="COUNT")
    parser.add_argument("--seed", type=int, default=0, metavar="NUMBER")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to FILE")
    arguments = parser.parse_args()
    warm_up = timed_decision(scale_event(8, MeshShape(8, 1, 8)), MeshShape(7, 1, 8))  # imports, caches
    assert warm_up
    report = {
        "machine": {"cores": os.cpu_count(), "load": os.getloadavg()[0], "python": platform.python_version()},
        "growth": growth(arguments.instances),
        "random_events": compared(arguments.events, arguments.seed),
    }
    show(report)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
