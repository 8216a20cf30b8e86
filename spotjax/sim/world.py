"""The world that a system under test lives in: its instances, requests and clock, and a record of what it did.

Gives and takes instances as the spot trace says, with notices, start-up times and a bill. Serves nothing itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from spotjax.meshes.instance import Instance, InstanceState, InstanceType
from spotjax.meshes.shape import MeshShape
from spotjax.models.spec import ModelSpec
from spotjax.planner.latency import LatencyModel
from spotjax.sim.assumptions import Assumptions
from spotjax.sim.events import EventQueue
from spotjax.sim.requests import RequestBook
from spotjax.sim.workload import RequestTrace, SpotTrace


@dataclass(frozen=True)
class Scenario:
    """What is simulated, whatever the system.

    Attributes:
      name: what it is called in results.
      spec: the model.
      latency: seconds of its stages on these instances.
      kind: the only instance type.
      spot: what the market gives and takes.
      requests: what comes.
      assumptions: everything else.
    """

    name: str
    spec: ModelSpec
    latency: LatencyModel
    kind: InstanceType
    spot: SpotTrace
    requests: RequestTrace
    assumptions: Assumptions = field(default_factory=Assumptions)


@dataclass(frozen=True)
class Change:
    """One change of the mesh, for tables and timelines.

    Attributes:
      seconds: when serving went on.
      shape: the mesh from then on, None if there is none.
      reason: one line.
      stall: seconds without a token for the sequences that were stopped.
      moved: bytes from device to device.
      loaded: bytes from the checkpoint.
      kept: sequences that went on with their KV.
      recomputed: sequences that went on from their tokens, or from nothing.
    """

    seconds: float
    shape: MeshShape | None
    reason: str
    stall: float = 0.0
    moved: int = 0
    loaded: int = 0
    kept: int = 0
    recomputed: int = 0


class System(Protocol):
    """A serving system as far as a simulation drives it. Everything is called at ``world.queue.now``."""

    name: str

    def begin(self, world: World) -> None:
        """The start; instances that are there from the first second are ready in ``world.instances``.

        Parameters are in place, processes are not started: see ``Assumptions.engine_start_seconds``.
        """
        ...

    def arrived(self, request: int) -> None:
        """A request came."""
        ...

    def coming(self, names: Sequence[str], ready_at: float) -> None:
        """Instances were granted and will be ready then."""
        ...

    def ready(self, names: Sequence[str]) -> None:
        """They can be used."""
        ...

    def noticed(self, names: Sequence[str], deadline: float) -> None:
        """They will be taken away then."""
        ...

    def lost(self, names: Sequence[str]) -> None:
        """They are gone, with or without notice."""
        ...

    def ended(self) -> None:
        """The time is over: writes down which tokens the requests that run have by now."""
        ...


class World:
    """One run of one system in one scenario.

    Attributes:
      scenario: what is simulated.
      queue: the clock.
      book: the requests.
      instances: by name, those that were granted and are not gone.
      changes: what the system did to its mesh.
      counts: (seconds, instances paid for) at every change.
    """

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.queue = EventQueue()
        self.book = RequestBook(scenario.requests)
        self.instances: dict[str, Instance] = {}
        self.changes: list[Change] = []
        self.counts: list[tuple[float, int]] = []
        self._since: dict[str, float] = {}
        self._spent = {False: 0.0, True: 0.0}

    @property
    def now(self) -> float:
        """Simulated seconds since the start."""
        return self.queue.now

    def at(self, seconds: float, function: Callable[..., None], *args: object) -> None:
        """See ``EventQueue.at``."""
        self.queue.at(seconds, function, *args)

    def run(self, system: System) -> None:
        """Lets everything happen until the end of the spot trace."""
        spot, assumed = self.scenario.spot, self.scenario.assumptions
        for event in spot.events:
            if event.seconds == 0 and event.added:
                self._grant(event.added, event.on_demand, InstanceState.READY)
        system.begin(self)
        for event in spot.events:
            if event.added and event.seconds > 0:
                wait = assumed.on_demand_start_seconds if event.on_demand else assumed.start_seconds
                self._schedule(system, event.added, event.on_demand, event.seconds, event.seconds + wait)
            if event.removed:
                self._schedule_removal(system, event.removed, event.seconds, event.notice)
        self.queue.run(spot.duration, self.book.arrival, system.arrived)
        system.ended()
        for name in list(self._since):
            self._pay(name)

    def request_on_demand(self, system: System, count: int, prefix: str) -> tuple[str, ...]:
        """Rents instances that nobody takes away; they are ready after their start-up time."""
        names = tuple(f"{prefix}-{number}" for number in range(count))
        self.rent(system, names, on_demand=True)
        return names

    def rent(self, system: System, names: tuple[str, ...], *, on_demand: bool) -> None:
        """Rents instances beside those of the spot trace; they are ready after their start-up time."""
        assumed = self.scenario.assumptions
        wait = assumed.on_demand_start_seconds if on_demand else assumed.start_seconds
        self._schedule(system, names, on_demand, self.now, self.now + wait)

    def take(self, system: System, names: tuple[str, ...], seconds: float) -> None:
        """Takes instances away at a time, with the notice that all have."""
        self._schedule_removal(system, names, seconds, None)

    def release(self, name: str) -> None:
        """Gives an instance back."""
        self._pay(name)
        del self.instances[name]
        self._count()

    def ready_instances(self) -> list[Instance]:
        """Those that can be used and have no notice, in the order in which they came."""
        return [instance for instance in self.instances.values() if instance.state is InstanceState.READY]

    def hours(self) -> tuple[float, float]:
        """Instance-hours paid for so far: (spot, on demand)."""
        running = {False: 0.0, True: 0.0}
        for name, since in self._since.items():
            running[self.instances[name].on_demand] += self.now - since
        return (self._spent[False] + running[False]) / 3600, (self._spent[True] + running[True]) / 3600

    def cost(self) -> float:
        """USD so far."""
        spot, on_demand = self.hours()
        return spot * self.scenario.kind.spot_price + on_demand * self.scenario.kind.on_demand_price

    def _schedule(
        self, system: System, names: tuple[str, ...], on_demand: bool, granted_at: float, ready_at: float
    ) -> None:
        """Grants instances, tells the system that they come, and that they are ready."""

        def coming() -> None:
            left = list(names)
            if self.now >= granted_at:  # some may be going, or gone, again
                joining = {name for name, one in self.instances.items() if one.state is InstanceState.JOINING}
                left = [name for name in names if name in joining]
            if left:
                system.coming(left, ready_at)

        def ready() -> None:
            there = [name for name in names if name in self.instances]
            for name in there:
                if self.instances[name].state is InstanceState.JOINING:
                    self.instances[name] = replace(self.instances[name], state=InstanceState.READY)
            system.ready([name for name in there if self.instances[name].state is InstanceState.READY])

        told_at = max(self.now, ready_at - self.scenario.assumptions.announced_seconds)
        self.at(granted_at, self._grant, names, on_demand, InstanceState.JOINING)
        self.at(told_at, coming)
        self.at(ready_at, ready)

    def _schedule_removal(
        self, system: System, names: tuple[str, ...], seconds: float, notice_seconds: float | None
    ) -> None:
        """Gives notice of instances, and takes them."""

        def notice() -> None:
            there = [name for name in names if name in self.instances]
            for name in there:
                self.instances[name] = replace(self.instances[name], state=InstanceState.NOTICED)
            if there:
                system.noticed(there, seconds)

        def take() -> None:
            there = [name for name in names if name in self.instances]
            for name in there:
                self.release(name)
            if there:
                system.lost(there)

        if notice_seconds is None:
            notice_seconds = self.scenario.assumptions.notice_seconds
        if notice_seconds > 0:
            self.at(max(self.now, seconds - notice_seconds), notice)
        self.at(seconds, take)

    def _grant(self, names: Sequence[str], on_demand: bool, state: InstanceState) -> None:
        for name in names:
            self.instances[name] = Instance(name, self.scenario.kind, state, on_demand)
            self._since[name] = self.now
        self._count()

    def _pay(self, name: str) -> None:
        self._spent[self.instances[name].on_demand] += self.now - self._since.pop(name)

    def _count(self) -> None:
        if self.counts and self.counts[-1][0] == self.now:
            self.counts.pop()
        self.counts.append((self.now, len(self.instances)))
