"""SpotServe as published: its solver, its static batches, decisions at batch boundaries (Miao et al. 2024).

When instances come or go, the whole mesh stops, replica by replica at the batch boundary, or after the steps, that its
interruption arranger finds; parked batches go on with their KV on the next mesh. Only if nothing but the number of
replicas grows do the others go on. Where the artifact clears parked batches for which there is no replica any more,
they are queued again here; and where it never really takes an instance away, what stands on it here is gone: replicas,
and KV that has not been moved. Parameters that are under way then are taken to come from elsewhere as fast.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from math import inf

from spotjax.meshes.instance import Instance, InstanceState
from spotjax.meshes.layout import split_layers
from spotjax.meshes.placement import Placement
from spotjax.planner.cohorts import choose_heirs
from spotjax.planner.holdings import Holdings
from spotjax.planner.kv_cohorts import KvCohort, LiveSequence
from spotjax.planner.links import Direction, Link, Links
from spotjax.planner.matcher import match
from spotjax.planner.migration import plan_migration
from spotjax.planner.needs import needs_of
from spotjax.planner.plan import MigrationPlan
from spotjax.planner.published import OriginalChoice
from spotjax.sim.replica_static import CONSERVATIVE, GENEROUS, Parked
from spotjax.sim.systems.artifact import BATCH, ArtifactSystem, FleetEvent, Workload, as_ready

PAGE_SIZE = 16
TRANSFERS = 64
"""Parts of a plan are cut finer only up to so many: its seconds hardly change, and it is there in milliseconds."""


class SpotServe(ArtifactSystem):
    """The published system."""

    name = "spotserve"

    def __init__(self, workload: Workload, batches_ahead: int) -> None:
        super().__init__(workload, batches_ahead)
        self._choice: OriginalChoice | None = None
        self._placement: Placement | None = None
        self._parked: dict[int, Parked] = {}
        self._stood_on: list[frozenset[str]] = []
        self._moved_at = 0.0

    def start(self) -> None:
        """The first mesh, with everything in place."""
        requests = self.world.scenario.requests
        self._longest = int((requests.prompt + requests.output).max(initial=0))
        self._choice = self.choose(len(self.names))
        if self._choice is not None:
            self._placement, _ = self._place(self._choice, ())
            for number in range(self._choice.shape.data):
                self.open(self._choice, self._placement.instances(number))
            self.record(self._choice.shape, "start")

    def lost(self, names: Sequence[str]) -> None:
        """Parked batches go, too, whose KV is still there."""
        if self.world.now < self._moved_at:
            for number in [number for number in self._parked if not self._stood_on[number].isdisjoint(names)]:
                self.requeue(self._parked.pop(number).requests)
        super().lost(names)

    def handle(self, event: FleetEvent) -> None:
        """Stops the mesh for another one, or adds replicas to it."""
        event = self._merged(event)
        self.update_names(event)
        choice = self.choose(len(self.names))
        if choice is None or self._choice is None:
            if choice is self._choice:
                self.done()  # there is still nothing to serve with
            else:
                self._switch_by(choice, event.seconds, CONSERVATIVE)
            return
        gone = self._stands_on(event.removed)
        if not gone and choice.shape == self._choice.shape:
            self.done()  # the same mesh on the same instances
        elif not gone and self._only_grows(choice):
            self.world.at(self.there_at(self._spare()), self._more_replicas, choice)
        else:
            seconds = self._expected_seconds(choice)
            if event.removed:
                self._switch_by(choice, event.seconds - seconds, CONSERVATIVE)
            else:  # the artifact counts from when it begins, also where that is late
                by = self.world.now + self.world.scenario.assumptions.announced_seconds + seconds
                self._switch_by(choice, by, GENEROUS)

    def _merged(self, event: FleetEvent) -> FleetEvent:
        """Instances that go within a grace period after others come are handled together with those."""
        grace = self.world.scenario.assumptions.notice_seconds
        if event.added and self._events and self._events[0].removed:
            following = self._events[0]
            if following.seconds <= event.seconds + grace:
                self._events.popleft()
                return FleetEvent(event.seconds, event.added, following.removed)
        return event

    def _stands_on(self, names: Sequence[str]) -> bool:
        placement = self._placement
        return placement is not None and any(device.instance in names for device in placement.devices.values())

    def _only_grows(self, choice: OriginalChoice) -> bool:
        """Whether all that changes is that replicas come, on instances where none are."""
        assert self._choice is not None
        now, then = self._choice.shape, choice.shape
        spare = len(self._spare()) * self.world.scenario.kind.devices
        same = (now.stage, now.tensor) == (then.stage, then.tensor)
        return same and 0 < (then.data - now.data) * then.stage * then.tensor <= spare

    def _spare(self) -> list[str]:
        return [name for name in self.names if not self._stands_on([name])]

    def _more_replicas(self, choice: OriginalChoice) -> None:
        """New replicas beside those that serve."""
        if not self._only_grows(choice):  # instances went before they could be used; that is the next event
            self.done()
            return
        placement, plan = self._place(choice, (), beside=True)
        start = max(self._transfer_seconds(plan), self.world.scenario.assumptions.engine_start_seconds)
        self.world.at(self.world.now + start, self._added, choice, placement, plan)

    def _added(self, choice: OriginalChoice, placement: Placement, plan: MigrationPlan) -> None:
        self._choice, self._placement = choice, placement
        for number in range(len(self.replicas), choice.shape.data):
            self.open(choice, placement.instances(number))
        self.record(choice.shape, "more replicas", moved=plan.bytes_moved, loaded=plan.bytes_loaded)
        self.dispatch()
        self.done()

    def _switch_by(self, choice: OriginalChoice | None, seconds: float, caution: float) -> None:
        """Stops all replicas by ``seconds``, each as its batches allow, and goes on on another mesh."""
        count = len(self.names)
        self._parked, self._moved_at, self._stood_on = {}, inf, list(self.replicas.values())
        left = set(range(len(self.replicas)))

        def stopped(number: int, batch: Parked | None, waiting: list[int]) -> None:
            if batch is not None:
                self._parked[number] = batch
            self.requeue(waiting)
            left.discard(number)
            if not left:
                self._change(choice, count)

        if not left:
            self.world.at(self.there_at(self.names), self._change, choice, count)
        for number, replica in enumerate(list(self.replicas)):
            replica.stop_by(seconds, caution, partial(stopped, number))

    def _change(self, choice: OriginalChoice | None, count: int) -> None:
        """All have stopped: moves KV and parameters, starts the engines."""
        if len(self.names) < count:  # some went that were counted on
            choice = self.choose(len(self.names))
        self.replicas, self._choice = {}, choice
        replicas = 0 if choice is None else choice.shape.data
        dropped = sorted(self._parked, key=lambda old: (-self._parked[old].steps, old))[replicas:]
        requests = [request for old in dropped for request in self._parked.pop(old).requests]
        self.requeue(requests)
        if choice is None:
            self._placement = None
            self.record(None, "too few instances", recomputed=len(requests))
            self.done()
            return
        live = self._live()
        heirs = choose_heirs(live, replicas)
        placement, plan = self._place(choice, _cohorts(live, heirs))
        # Where there is no plan, nothing was there to move.
        seconds = self.load_seconds(choice.shape) if plan is None else self._transfer_seconds(plan)
        self._placement, self._moved_at = placement, self.world.now + seconds
        wait = self.there_at(device.instance for device in placement.devices.values()) - self.world.now
        stall = max(seconds, wait + self.world.scenario.assumptions.engine_start_seconds)
        self.world.at(self.world.now + stall, self._resume, choice, heirs, stall, plan, len(requests))

    def _resume(
        self, choice: OriginalChoice, heirs: Mapping[int, int], stall: float, plan: MigrationPlan | None, dropped: int
    ) -> None:
        assert self._placement is not None
        replicas = [self.open(choice, self._placement.instances(number)) for number in range(choice.shape.data)]
        kept = 0
        for old, batch in sorted(self._parked.items()):
            if replicas[heirs[old]].ended:
                dropped += len(batch.requests)
                self.requeue(batch.requests)
            else:
                kept += len(batch.requests)
                replicas[heirs[old]].resume(batch)
        self._parked = {}
        if plan is None:
            moved, loaded = 0, self.world.scenario.spec.parameter_bytes * choice.shape.data
        else:
            moved, loaded = plan.bytes_moved, plan.bytes_loaded
        self.record(choice.shape, "switched", stall=stall, moved=moved, loaded=loaded, kept=kept, recomputed=dropped)
        self.dispatch()
        self.done()

    def _transfer_seconds(self, plan: MigrationPlan | None) -> float:
        """As the artifact estimates it: the busiest link between instances, that inside of one, and a constant."""
        busy: defaultdict[Link, float] = defaultdict(float)
        for links in () if plan is None else plan.link_seconds.values():
            for link, seconds in links.items():
                busy[link] += seconds
        inside = max((busy[link] for link in busy if link.direction is Direction.INSIDE), default=0.0)
        between = max((busy[link] for link in busy if link.direction is not Direction.INSIDE), default=0.0)
        return inside + between + self.world.scenario.assumptions.switch_seconds

    def _expected_seconds(self, choice: OriginalChoice) -> float:
        """As if every replica had a whole batch of the longest requests at their ends (artifact)."""
        assert self._choice is not None
        batch = [_sequence(request, self._longest) for request in range(BATCH)]
        live = dict.fromkeys(range(self._choice.shape.data), batch)
        return self._transfer_seconds(self._place(choice, _cohorts(live, choose_heirs(live, choice.shape.data)))[1])

    def _live(self) -> dict[int, list[LiveSequence]]:
        """The sequences of parked batches, by the replica that they were on."""
        prompt = self.world.book.prompt
        return {
            old: [_sequence(request, prompt[request] + batch.steps) for request in batch.requests]
            for old, batch in self._parked.items()
        }

    def _place(
        self, choice: OriginalChoice, cohorts: Sequence[KvCohort], beside: bool = False
    ) -> tuple[Placement, MigrationPlan | None]:
        """Matches devices to positions, and plans what moves; no plan where nobody holds anything yet.

        With ``beside``, the replicas of before stay where they are.
        """
        spec, shape, before = self.world.scenario.spec, choice.shape, self._placement
        layers = split_layers(spec.config.layers, shape.stage)
        instances, leaving = as_ready(self.world, self.names), self._leaving()
        holdings = Holdings.of(spec, before, cohorts, [*instances, *leaving])
        needs = needs_of(spec, shape, layers, cohorts)
        if before is None or not beside:
            devices = match(shape, needs, instances, holdings)
        else:
            spare, new = as_ready(self.world, self._spare()), range(before.shape.data, shape.data)
            needs = {position: arrays for position, arrays in needs.items() if position.data in new}
            devices = {**before.devices, **match(shape, needs, spare, holdings, new)}
        placement = Placement(1 if before is None else before.epoch + 1, shape, layers, devices)
        if before is None:
            return placement, None
        wanted = {devices[position]: arrays for position, arrays in needs.items()}
        links = Links.of([*instances, *leaving], self.world.scenario.assumptions.checkpoint_bandwidth)
        return placement, plan_migration(wanted, holdings, links, transfers=TRANSFERS)

    def _leaving(self) -> list[Instance]:
        """Those with a notice that can still send."""
        return [
            Instance(name, one.type, InstanceState.NOTICED)
            for name, one in self.world.instances.items()
            if name not in self.names
        ]


def _sequence(request: int, positions: int) -> LiveSequence:
    return LiveSequence(request, -(-positions // PAGE_SIZE), positions)


def _cohorts(live: Mapping[int, Sequence[LiveSequence]], heirs: Mapping[int, int]) -> list[KvCohort]:
    """What heirs take over: all or nothing of a batch."""
    return [KvCohort(old, heirs[old], tuple(live[old]), PAGE_SIZE) for old in sorted(heirs)]
