"""SpotServe as published: its solver, its static batches, decisions at batch boundaries (Miao et al. 2024).

When instances come or go, the whole mesh stops, replica by replica at the batch boundary, or after the steps, that its
interruption arranger finds; parked batches go on with their KV on the next mesh. Only if nothing but the number of
replicas grows do the others go on. Where the artifact clears parked batches for which there is no replica any more,
they are queued again here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from spotjax.meshes.instance import Instance, InstanceState
from spotjax.meshes.layout import split_layers
from spotjax.meshes.placement import Placement
from spotjax.planner.cohorts import assign_cohorts, choose_heirs
from spotjax.planner.holdings import Holdings, LiveSequence, needs_of
from spotjax.planner.links import Links
from spotjax.planner.matcher import match
from spotjax.planner.migration import plan_migration
from spotjax.planner.plan import MigrationPlan
from spotjax.planner.published import OriginalChoice
from spotjax.sim.replica_static import CONSERVATIVE, GENEROUS, Parked, StaticReplica
from spotjax.sim.systems.artifact import ArtifactSystem, FleetEvent, as_ready

PAGE_SIZE = 16


class SpotServe(ArtifactSystem):
    """The published system."""

    name = "spotserve"

    def start(self, names: Sequence[str]) -> None:
        """The first mesh, with everything in place."""
        self._names = list(names)
        self._choice = self.choose(len(names))
        self._placement: Placement | None = None
        if self._choice is not None:
            self._placement, _ = self._place(self._choice, self._names, {})
            self._serve([self.replica(self._choice) for _ in range(self._choice.shape.data)])
            self.record(self._choice.shape, "start")

    def standing(self) -> list[tuple[StaticReplica, frozenset[str]]]:
        """By the placement that they were started on."""
        return [(replica, self._on[replica]) for replica in self.replicas]

    def _serve(self, replicas: list[StaticReplica]) -> None:
        """These, by their numbers in the placement."""
        assert self._placement is not None
        self.replicas = replicas
        self._on = {replica: self._placement.instances(number) for number, replica in enumerate(replicas)}

    def handle(self, event: FleetEvent) -> None:
        """Stops the mesh for another one, or adds replicas to it."""
        now, grace = self.world.now, self.world.scenario.assumptions.notice_seconds
        event = self._merged(event)
        before = self._names
        self._names = [name for name in (*before, *event.added) if name not in event.removed]
        choice = self.choose(len(self._names))
        if choice is None or self._choice is None:
            self._switch_by(choice, now, CONSERVATIVE)
            return
        gone = event.removed and self._stands_on(event.removed)
        if not gone and choice.shape == self._choice.shape:
            self.done()  # the same mesh on the same instances
            return
        placement, plan = self._place(choice, self._names, {})
        seconds = self._transfer_seconds(plan)
        same = (choice.shape.stage, choice.shape.tensor) == (self._choice.shape.stage, self._choice.shape.tensor)
        if same and not gone and choice.shape.data > self._choice.shape.data:
            self._placement, self._choice = placement, choice
            self.world.at(event.seconds, self._more_replicas, choice, seconds)
            return
        if event.removed:  # time that a late start of this change costs is given back at its end
            late = max(0.0, grace - (event.seconds - now))
            self._switch_by(choice, now + grace - seconds - late, CONSERVATIVE)
        else:
            self._switch_by(choice, now + grace + seconds, GENEROUS)

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

    def _more_replicas(self, choice: OriginalChoice, seconds: float) -> None:
        """New replicas beside those that serve."""
        start = max(seconds, self.world.scenario.assumptions.engine_start_seconds)
        self.world.at(self.world.now + start, self._added, choice)
        self.done()

    def _added(self, choice: OriginalChoice) -> None:
        if choice is self._choice:
            more = [self.replica(choice) for _ in range(choice.shape.data - len(self.replicas))]
            self._serve([*self.replicas, *more])
            self.record(choice.shape, "more replicas")
            self.dispatch()

    def _switch_by(self, choice: OriginalChoice | None, seconds: float, caution: float) -> None:
        """Stops all replicas by then, each as its batches allow, and goes on on another mesh."""
        parked: dict[int, Parked] = {}
        left = set(range(len(self.replicas)))

        def stopped(number: int, batch: Parked | None, waiting: list[int]) -> None:
            if batch is not None:
                parked[number] = batch
            self.requeue(waiting, restart=False)
            left.discard(number)
            if not left:
                self._change(choice, parked)

        if not left:
            self._change(choice, parked)
        for number, replica in enumerate(list(self.replicas)):
            replica.stop_by(seconds, caution, partial(stopped, number))

    def _change(self, choice: OriginalChoice | None, parked: Mapping[int, Parked]) -> None:
        """All have stopped: moves KV and parameters, starts the engines."""
        self.replicas, self._choice = [], choice
        if choice is None:
            self.requeue([r for batch in parked.values() for r in batch.requests], restart=True)
            self._placement = None
            self.record(None, "too few instances")
            self.done()
            return
        placement, plan = self._place(choice, self._names, parked)
        # Where there is no plan, nothing was there to move.
        seconds = self.load_seconds(choice.shape) if plan is None else self._transfer_seconds(plan)
        self._placement = placement
        stall = max(seconds, self.world.scenario.assumptions.engine_start_seconds)
        self.world.at(self.world.now + stall, self._resume, choice, parked, stall, plan)

    def _resume(
        self, choice: OriginalChoice, parked: Mapping[int, Parked], stall: float, plan: MigrationPlan | None
    ) -> None:
        self._serve([self.replica(choice) for _ in range(choice.shape.data)])
        lost = set() if plan is None else {int(name.partition("-")[0]) for name in plan.lost}
        saved = sorted(((old, batch) for old, batch in parked.items() if old not in lost), key=lambda e: -e[1].steps)
        going_on, others = sorted(saved[: choice.shape.data]), saved[choice.shape.data :]
        others += [(old, batch) for old, batch in parked.items() if old in lost]
        for replica, (_, batch) in zip(self.replicas, going_on, strict=False):
            replica.resume(batch)
        self.requeue([request for _, batch in others for request in batch.requests], restart=True)
        kept, dropped = (sum(len(batch.requests) for _, batch in some) for some in (going_on, others))
        moved, loaded = (0, 0) if plan is None else (plan.bytes_moved, plan.bytes_loaded)
        self.record(choice.shape, "switched", stall=stall, moved=moved, loaded=loaded, kept=kept, recomputed=dropped)
        self.dispatch()
        self.done()

    def _transfer_seconds(self, plan: MigrationPlan | None) -> float:
        """As the artifact estimates it: the busiest link inside and between instances, and a constant."""
        busy = [] if plan is None else [max(links.values(), default=0.0) for links in plan.link_seconds.values()]
        return sum(busy) + self.world.scenario.assumptions.switch_seconds

    def _place(
        self, choice: OriginalChoice, names: Sequence[str], parked: Mapping[int, Parked]
    ) -> tuple[Placement, MigrationPlan | None]:
        """Matches devices to positions, and plans what moves; no plan where nobody holds anything yet."""
        spec, shape, before = self.world.scenario.spec, choice.shape, self._placement
        layers = split_layers(spec.config.layers, shape.stage)
        live: dict[int, list[LiveSequence]] = {number: [] for number in range(before.shape.data)} if before else {}
        for old, batch in parked.items():
            live[old] = [
                LiveSequence(request, -(-positions // PAGE_SIZE), positions)
                for request in batch.requests
                if (positions := self.world.book.prompt[request] + batch.steps)
            ]
        heirs = choose_heirs(live, shape.data)
        cohorts = assign_cohorts(live, shape.data, 1 << 30, PAGE_SIZE, heirs).cohorts
        instances = as_ready(self.world, names)
        known = [*instances, *self._leaving(names)]
        holdings = Holdings.of(spec, before, cohorts, known)
        needs = needs_of(spec, shape, layers, cohorts)
        devices = match(shape, needs, instances, holdings)
        placement = Placement(1 if before is None else before.epoch + 1, shape, layers, devices)
        if before is None:
            return placement, None
        wanted = {devices[position]: arrays for position, arrays in needs.items()}
        links = Links.of(known, self.world.scenario.assumptions.checkpoint_bandwidth)
        return placement, plan_migration(wanted, holdings, links)

    def _leaving(self, names: Sequence[str]) -> list[Instance]:
        """Those with a notice that can still send."""
        return [
            Instance(name, one.type, InstanceState.NOTICED)
            for name, one in self.world.instances.items()
            if name not in names
        ]
