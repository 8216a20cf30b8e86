"""What the systems of SpotServe's evaluation share in its artifact: one queue, static replicas, one event at a time.

Requests wait in one queue in order of arrival and go to replicas in powers of two, first to those with nothing to do.
In the artifact's "old batching" a busy replica is given more, up to a number of batches; in the new one it is not.
Events of the spot trace are handled one after the other, each until the mesh of before has stopped. What a system makes
of an event is its own.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from spotjax.meshes.instance import Instance
from spotjax.meshes.shape import MeshShape
from spotjax.planner.published import OriginalChoice, choose_as_original, powers_of_two
from spotjax.planner.published_tables import Table
from spotjax.sim.replica_static import StaticReplica, StaticTimes
from spotjax.sim.world import Change, World

BATCH = 4
"""B in all of its runs, whatever its solver says."""


class Workload(NamedTuple):
    """What the artifact's scripts are told of a model.

    Attributes:
      table: its profile.
      required: requests per second that the solver has to reach, by time: (from second, requests per second).
      least_devices: devices that one replica takes at least.
    """

    table: Table
    required: tuple[tuple[float, float], ...]
    least_devices: int

    def required_at(self, seconds: float) -> float:
        """Requests per second that are required at a time."""
        return next(rate for since, rate in reversed(self.required) if since <= seconds)


class FleetEvent(NamedTuple):
    """What the artifact's scheduler handles: instances come or go at ``seconds``, known since a while."""

    seconds: float
    added: tuple[str, ...]
    removed: tuple[str, ...]


class ArtifactSystem:
    """The part that its systems share.

    Args:
      workload: of the model.
      batches_ahead: batches that a replica is given at once: 0 for the new batching, else the old one's limit.

    Attributes:
      names: instances that it plans with, in the order in which they came; announced ones as soon as that is handled.
      replicas: those that serve, or have served and are not cleared away, each with the instances that it stands on.
    """

    name = ""

    def __init__(self, workload: Workload, batches_ahead: int) -> None:
        self.workload, self._ahead = workload, batches_ahead
        self.names: list[str] = []
        self.replicas: dict[StaticReplica, frozenset[str]] = {}
        self._noticed: set[str] = set()
        self._ready_at: dict[str, float] = {}
        self._queue: list[tuple[float, int]] = []
        self._events: deque[FleetEvent] = deque()
        self._busy = False

    # What World calls.

    def begin(self, world: World) -> None:
        """The first mesh: parameters are in place, engines start."""
        self.world, self._busy = world, True
        self.names = [instance.name for instance in world.ready_instances()]
        world.at(world.scenario.assumptions.engine_start_seconds, self._begin)

    def _begin(self) -> None:
        self.start()
        self.dispatch()
        self.done()

    def arrived(self, request: int) -> None:
        """Queues it."""
        insort(self._queue, (self.world.book.arrival[request], request))
        self.dispatch()

    def coming(self, names: Sequence[str], ready_at: float) -> None:
        """Known in advance, as is what goes."""
        self._enqueue(FleetEvent(ready_at, tuple(names), ()))

    def ready(self, names: Sequence[str]) -> None:
        """Nothing: it was handled when it was announced."""

    def noticed(self, names: Sequence[str], deadline: float) -> None:
        """Handled at once, or when the event before is done with."""
        self._noticed.update(names)
        self._enqueue(FleetEvent(deadline, (), tuple(names)))

    def lost(self, names: Sequence[str]) -> None:
        """Replicas on them that are not done are gone, too. For those without notice, the event begins here."""
        self.names = [name for name in self.names if name not in names]
        dead = [replica for replica, on in self.replicas.items() if not replica.ended and not on.isdisjoint(names)]
        for replica in dead:
            self.requeue(replica.kill())
        sudden = tuple(name for name in names if name not in self._noticed)
        self._noticed.difference_update(names)
        if sudden:
            self._enqueue(FleetEvent(self.world.now, (), sudden))
        self.dispatch()

    def ended(self) -> None:
        """Batches that run are in the middle."""
        for replica in self.replicas:
            replica.commit()

    # What systems do.

    def start(self) -> None:
        """Forms the first mesh."""
        raise NotImplementedError

    def handle(self, event: FleetEvent) -> None:
        """Begins to handle an event; calls ``done`` when the next one may be."""
        raise NotImplementedError

    def done(self) -> None:
        """An event is handled: the next one."""
        self._busy = False
        if self._events:
            self._busy = True
            self.handle(self._events.popleft())

    # The dispatcher.

    def dispatch(self) -> None:
        """Gives requests to replicas as far as they take some."""
        while self._queue:
            replica, count = self._select(len(self._queue))
            if replica is None:
                return
            given, self._queue = self._queue[:count], self._queue[count:]
            requests = [request for _, request in given]
            replica.add_all(requests)

    def requeue(self, requests: Iterable[int]) -> None:
        """Puts requests back in order of arrival; their tokens, if they have any, are lost."""
        book = self.world.book
        for request in requests:
            if book.generated[request]:
                book.restart(request)
            insort(self._queue, (book.arrival[request], request))

    def _select(self, waiting: int) -> tuple[StaticReplica | None, int]:
        there = [replica for replica in self.replicas if not replica.ended]
        if not there:
            return None, 0
        count = max(power for power in powers_of_two(BATCH) if power <= waiting)
        idle = next((replica for replica in there if replica.pool == 0), None)
        if idle is not None:
            return idle, count
        least = min(there, key=lambda replica: replica.pool)
        return (None, 0) if least.pool >= self._ahead * BATCH else (least, count)

    # Shapes and replicas.

    def choose(self, instances: int) -> OriginalChoice | None:
        """What the artifact's solver takes on so many instances; None if not even one replica fits."""
        world = self.world
        devices = instances * world.scenario.kind.devices
        if devices < self.workload.least_devices:
            return None
        required = self.workload.required_at(world.now)
        return choose_as_original(self.workload.table, devices, required, self.workload.least_devices, BATCH)

    def update_names(self, event: FleetEvent) -> None:
        """Counts on what comes, unless that went again while the event waited, and no more on what goes."""
        there = self.world.instances
        added = [name for name in event.added if event.seconds > self.world.now or name in there]
        self.names = [name for name in (*self.names, *added) if name not in event.removed]
        self._ready_at |= dict.fromkeys(added, event.seconds)

    def there_at(self, names: Iterable[str]) -> float:
        """When all of these are there that were announced: now or later."""
        return max([self.world.now, *(self._ready_at.get(name, 0.0) for name in names)])

    def open(self, choice: OriginalChoice, names: Iterable[str]) -> StaticReplica:
        """A new replica of a shape on these instances, which has ended already if one of them is gone."""
        shape, scale = choice.shape, self.world.scenario.assumptions.scale
        times = StaticTimes(self.workload.table, shape.stage, shape.tensor, choice.micro_batches, scale)
        replica = StaticReplica(times, BATCH, self.world.book, self.world.queue, self.dispatch)
        self.replicas[replica] = frozenset(names)
        if not self.replicas[replica] <= self.world.instances.keys():
            replica.kill()
        return replica

    def load_seconds(self, shape: MeshShape) -> float:
        """All instances read the parameters of their devices from the checkpoint, side by side."""
        spec, kind = self.world.scenario.spec, self.world.scenario.kind
        share = spec.parameter_bytes / (shape.stage * shape.tensor)
        return share * kind.devices / self.world.scenario.assumptions.checkpoint_bandwidth

    def record(self, shape: MeshShape | None, reason: str, **figures: float) -> None:
        """One change of the mesh."""
        self.world.changes.append(Change(self.world.now, shape, reason, **figures))  # type: ignore[arg-type]

    def _enqueue(self, event: FleetEvent) -> None:
        self._events.append(event)
        if not self._busy:  # after all that is told in this instant
            self._busy = True
            self.world.at(self.world.now, self.done)


def as_ready(world: World, names: Iterable[str]) -> list[Instance]:
    """Instances to plan with, in the order given, those that are still starting included."""
    return [Instance(name, world.scenario.kind) for name in names]
