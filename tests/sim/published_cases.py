"""Small worlds for the published systems, watched after everything that happens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import isnan

from spotjax.meshes.instance import InstanceState
from spotjax.meshes.instance_types import instance_type
from spotjax.models.presets import preset
from spotjax.planner.published import PublishedProfile
from spotjax.planner.published_tables import TABLES
from spotjax.sim.assumptions import Assumptions
from spotjax.sim.events import EventQueue
from spotjax.sim.systems.artifact import ArtifactSystem, Workload
from spotjax.sim.systems.baselines import Reparallelization, Rerouting
from spotjax.sim.systems.spotserve import SpotServe
from spotjax.sim.workload import RequestTrace, SpotEvent, SpotTrace
from spotjax.sim.world import Scenario, World

KIND = replace(instance_type("g4dn.12xlarge"), tensor_instances=4)
MODELS = {"opt-6.7b": (2.0, 4), "gpt-20b": (0.4, 12), "llama-30b": (0.2, 16)}
"""Requests per second that are required, and devices that a replica takes at least (artifact)."""
NAMES = tuple(f"i-{number}" for number in range(64))
SYSTEMS: dict[str, Callable[[Workload], ArtifactSystem]] = {
    "spotserve": lambda workload: SpotServe(workload, 1),
    "spotserve-new-batching": lambda workload: SpotServe(workload, 0),
    "reparallelization": lambda workload: Reparallelization(workload, 2),
    "rerouting": lambda workload: Rerouting(workload, 2, pool=8),
}


def workload(model: str = "gpt-20b") -> Workload:
    required, least = MODELS[model]
    return Workload(TABLES[model], ((0.0, required),), least)


def scenario(
    events: Sequence[SpotEvent],
    arrivals: Sequence[float] = (),
    duration: float = 400.0,
    model: str = "gpt-20b",
    output: int | Sequence[int] = 128,
    **assumed: float,
) -> Scenario:
    """Prompts of 512 tokens."""
    requests = RequestTrace.of("given", sorted(arrivals), 512, output)
    spot = SpotTrace("given", tuple(events), duration)
    profile = PublishedProfile(TABLES[model])
    return Scenario("small", preset(model), profile, KIND, spot, requests, replace(Assumptions(), **assumed))


class Watched(EventQueue):
    """Calls ``check`` after everything that happens."""

    check: Callable[[], None]

    def at(self, seconds: float, function: Callable[..., None], *args: object) -> None:
        def checked() -> None:
            function(*args)
            self.check()

        super().at(seconds, checked)


class Once(list[float]):
    """A column that is written once."""

    def __setitem__(self, key: object, value: object) -> None:
        assert isinstance(key, int) and isinstance(value, float)
        assert isnan(self[key]), f"request {key} finished twice"
        super().__setitem__(key, value)


def places(system: ArtifactSystem) -> Counter[int]:
    """How often every request is somewhere: queued, waiting or running on a replica, or parked."""
    found = Counter(request for _, request in system._queue)
    for replica in system.replicas:
        running = [] if replica._running is None else replica._running.requests
        here = [*running, *(request for _, request in replica._waiting)]
        assert replica.pool == len(here)
        assert not (replica.ended and here), "a replica that has ended has requests"
        found.update(here)
    if isinstance(system, SpotServe):
        found.update(request for batch in system._parked.values() for request in batch.requests)
    return found


def check(world: World, system: ArtifactSystem) -> None:
    """Requests are in one place each, and replicas only on instances that can be used."""
    book = world.book
    arrived = sum(at <= world.now for at in book.arrival)
    unfinished = {request for request in range(arrived) if isnan(book.finish[request])}
    found = places(system)
    late = {request for request in unfinished - found.keys() if book.arrival[request] == world.now}
    assert found == Counter(unfinished - late), "a request is lost, or in two places"
    for replica, names in system.replicas.items():
        if not replica.ended:
            assert names <= world.instances.keys(), "a replica runs on what is gone"
            assert all(world.instances[name].state is not InstanceState.JOINING for name in names)
    taken = [name for replica, names in system.replicas.items() if not replica.ended for name in names]
    assert len(taken) == len(set(taken)), "two replicas stand on one instance"


def run(case: Scenario, system: ArtifactSystem) -> World:
    """One run to the end, watched."""
    world = World(case)
    world.queue = watched = Watched()
    watched.check = lambda: check(world, system)
    world.book.finish = Once(world.book.finish)
    world.run(system)
    check(world, system)
    for request, arrival in enumerate(world.book.arrival):
        consistent(world, request, arrival)
    return world


def consistent(world: World, request: int, arrival: float) -> None:
    """What the book says of one request fits together."""
    book = world.book
    first, finish, last = book.first_token[request], book.finish[request], book.last_token[request]
    assert isnan(first) or first > arrival
    if isnan(finish):
        assert book.generated[request] <= book.output[request], "a batch ends as a whole"
    else:
        assert arrival < first <= finish == last <= world.now
        assert book.generated[request] == book.output[request]
    if book.restarts[request]:
        assert not isnan(first) and book.recomputed[request] >= book.restarts[request] * book.prompt[request]
    else:
        assert book.recomputed[request] == 0
