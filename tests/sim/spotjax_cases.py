"""Small worlds for a simulated Spotjax, and a Spotjax that looks over its own shoulder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import isnan

from spotjax.meshes.instance_types import instance_type
from spotjax.models.presets import preset
from spotjax.planner.demand import Demand
from spotjax.planner.published import PublishedProfile
from spotjax.planner.published_tables import TABLES
from spotjax.sim.assumptions import Assumptions
from spotjax.sim.systems.spotjax import Spotjax
from spotjax.sim.systems.spotjax_options import Feature, SpotjaxOptions
from spotjax.sim.workload import RequestTrace, SpotEvent, SpotTrace
from spotjax.sim.world import Scenario, World

KIND = instance_type("g4dn.12xlarge")
SPEC = preset("gpt-20b")
LATENCY = PublishedProfile(TABLES["gpt-20b"])
NAMES = tuple(f"i-{number}" for number in range(16))
POSITION_BYTES = SPEC.kv_bytes_per_position
REPLICA = 2
"""Instances of a replica of two stages."""
SWITCH_SECONDS = 0.5
WORKER_SECONDS = Assumptions().engine_start_seconds


def scenario(
    events: Sequence[SpotEvent], arrivals: Sequence[float], duration: float, output: int = 128, notice: float = 30.0
) -> Scenario:
    """gpt-20b, prompts of 512 tokens."""
    assumed = replace(Assumptions(), notice_seconds=notice, switch_seconds=SWITCH_SECONDS)
    requests = RequestTrace.of("given", sorted(arrivals), 512, output)
    return Scenario("small", SPEC, LATENCY, KIND, SpotTrace("given", tuple(events), duration), requests, assumed)


class Watched(Spotjax):
    """Verifies after everything that happens that no replica runs on an instance that is gone, and that requests are
    where they should be: on one replica or waiting, once."""

    def __init__(self, without: Feature | None = None, options: SpotjaxOptions | None = None) -> None:
        super().__init__(without, options or SpotjaxOptions(demand=Demand(8, 512, 128, kv_pages=640)))

    def check(self) -> None:
        """Of all that is running."""
        replicas = self._replicas
        if replicas.placement is None:
            return
        for number in replicas.running():
            assert replicas.placement.instances(number) <= self._world.instances.keys(), "it runs on what is gone"
        book, queued = self._world.book, list(replicas.parked)
        for member in replicas.members:
            if member.stopped is None:
                queued += [request for request, _, _ in member.replica.remaining()]
            else:
                queued += [request for request, _ in member.stopped]
        assert len(set(queued)) == len(queued), "a request is in two places"
        assert all(isnan(book.finish[request]) for request in queued), "a request goes on that is finished"

    def ready(self, names: Sequence[str]) -> None:
        super().ready(names)
        self.check()

    def noticed(self, names: Sequence[str], deadline: float) -> None:
        super().noticed(names, deadline)
        self.check()

    def lost(self, names: Sequence[str]) -> None:
        super().lost(names)
        self.check()


class Once(list[float]):
    """A column that is written once."""

    def __setitem__(self, key: object, value: object) -> None:
        assert isinstance(key, int) and isinstance(value, float)
        assert isnan(self[key]), f"request {key} finished twice"
        super().__setitem__(key, value)


def run(case: Scenario, without: Feature | None = None, options: SpotjaxOptions | None = None) -> tuple[World, Watched]:
    """One run to the end."""
    world, system = World(case), Watched(without, options)
    world.book.finish = Once(world.book.finish)
    world.run(system)
    system.check()
    return world, system


def finished(world: World) -> bool:
    """Whether every request has all its tokens."""
    book = world.book
    return book.generated == book.output and not any(map(isnan, book.finish))
