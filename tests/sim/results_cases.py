"""A system that needs no model of latency: every request takes as long as it is told, by one server or by many."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import partial

from spotjax.meshes.instance_types import instance_type
from spotjax.meshes.shape import MeshShape
from spotjax.models.presets import preset
from spotjax.planner.cost import Roofline
from spotjax.sim.assumptions import Assumptions
from spotjax.sim.results import Outcome
from spotjax.sim.workload import RequestTrace, SpotTrace, by_counts
from spotjax.sim.world import Change, Scenario, World

G4DN = instance_type("g4dn.12xlarge")


class FixedTime:
    """Serves one request after the other, ``seconds`` each, its tokens evenly spaced; drops what comes when told to.

    Every instance that is lost begins the request again that is running.
    """

    name = "fixed"

    def __init__(self, seconds: float, drops: Sequence[int] = ()) -> None:
        self.seconds, self.drops = seconds, drops
        self.waiting: deque[int] = deque()
        self.running: int | None = None
        self.attempt = 0

    def begin(self, world: World) -> None:
        self.world = world
        world.changes.append(Change(0.0, MeshShape(1, 1, 4), "start", loaded=7))

    def arrived(self, request: int) -> None:
        if request in self.drops:
            self.world.book.lost.add(request)
            return
        self.waiting.append(request)
        if self.running is None:
            self.next()

    def next(self) -> None:
        self.running = self.waiting.popleft() if self.waiting else None
        if self.running is not None:
            self.attempt += 1
            book, gap = self.world.book, self.seconds / self.world.book.output[self.running]
            if book.first_token[self.running] != book.first_token[self.running]:
                book.first_token[self.running] = self.world.now + gap
            book.wait(self.running, gap, 0.0)
            self.world.at(self.world.now + self.seconds, partial(self.end, self.attempt))

    def end(self, attempt: int) -> None:
        if attempt == self.attempt and self.running is not None:
            self.world.book.finish[self.running] = self.world.now
            self.next()

    def coming(self, names: Sequence[str], ready_at: float) -> None: ...

    def ready(self, names: Sequence[str]) -> None: ...

    def noticed(self, names: Sequence[str], deadline: float) -> None: ...

    def lost(self, names: Sequence[str]) -> None:
        self.world.changes.append(Change(self.world.now, None, "lost", stall=2.5, moved=11))
        if self.running is not None:
            self.world.book.restart(self.running)
            self.world.book.recomputed[self.running] += 3
            self.waiting.appendleft(self.running)
            self.next()

    def ended(self) -> None: ...


def scenario(requests: RequestTrace, spot: SpotTrace | None = None, **assumed: float) -> Scenario:
    """With one instance for 100 s if nothing else is said."""
    spec = preset("opt-6.7b")
    spot = spot or by_counts("one", [(0, 1)], 100.0)
    return Scenario("tiny", spec, Roofline(spec, G4DN), G4DN, spot, requests, Assumptions(**assumed))


def outcome(system: FixedTime, case: Scenario, seed: int = 0) -> Outcome:
    world = World(case)
    world.run(system)
    return Outcome.of(world, system.name, seed)
