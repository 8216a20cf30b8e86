"""How a simulated Spotjax changes its mesh: what ``fleet.reconfigure`` does, with the same plans, in simulated time.

One change at a time: copy while decoding goes on, stop at a token boundary, move the rest, go on. A change that is not
good any more, because an instance that it needs was noticed or lost, is given up, and another one is planned with what
is in place by then. Which boundary it is, is ``spotjax_boundary``'s to say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from spotjax.errors import NoFeasibleShape
from spotjax.fleet.change import KvChange, Planning, is_in_place, plan_change, plan_kv
from spotjax.fleet.recovery_policies import POLICIES, SPOTJAX
from spotjax.meshes.instance import DeviceRef, Instance, InstanceState
from spotjax.planner.links import Links
from spotjax.planner.migration import Phase
from spotjax.planner.needs import Needs
from spotjax.planner.optimizer import Decision
from spotjax.reshard.transfer import Preparation, Survivors
from spotjax.sim.systems.spotjax_boundary import Boundary
from spotjax.sim.systems.spotjax_options import Feature, SpotjaxOptions
from spotjax.sim.systems.spotjax_replicas import Replicas, survivors
from spotjax.sim.systems.spotjax_shapes import Shapes
from spotjax.sim.systems.spotjax_traffic import kv_seconds, received, sources
from spotjax.sim.systems.spotjax_underway import Underway
from spotjax.sim.world import Change, World


class Reconfigurer:
    """Keeps the mesh fitting to the instances.

    Args:
      world: where they are.
      planning: what every change is planned with.
      shapes: chooses meshes.
      replicas: what runs.
      boundary: says when to stop.
      options: see there.
      without: the feature that is left out.
    """

    def __init__(
        self,
        world: World,
        planning: Planning,
        shapes: Shapes,
        replicas: Replicas,
        boundary: Boundary,
        options: SpotjaxOptions,
        without: Feature | None,
    ) -> None:
        self._world, self._planning, self._shapes, self._replicas = world, planning, shapes, replicas
        self._boundary, self._options, self._without = boundary, options, without
        self._policy = POLICIES[planning.recovery]
        self._interruptions = 0
        self._held: dict[DeviceRef, Needs] = {}
        """Parameters on devices that the mesh does not use."""
        self._needs: dict[DeviceRef, Needs] = {}
        """Parameters on those that it does."""
        self._underway: Underway | None = None
        self._begun = self._suspended = False

    def begin(self) -> None:
        """The first mesh, with parameters in place. Before, nothing is changed."""
        self._begun = True
        try:
            decision = self._decide()
        except NoFeasibleShape as problem:
            self._suspend(str(problem))
            return
        preparation = plan_change(self._planning, None, self._instances(), {}, 1, decision=decision)
        self._replicas.install(preparation.placement, {}, (), self._world.now)
        self._needs = dict(preparation.needs)
        self._world.changes.append(Change(self._world.now, decision.shape, "start"))

    def interrupted(self, reason: str, *, forced: bool) -> None:
        """Instances were noticed or lost; ``forced``: the mesh has to change."""
        self._interruptions += forced
        there = self._world.instances
        self._held = {device: needs for device, needs in self._held.items() if device.instance in there}
        self.look(reason)

    def look(self, reason: str) -> None:
        """Makes the mesh fit, if it does not, to the instances that there are now."""
        if not self._begun:
            return
        if self._underway is not None:
            if not self._is_void(self._underway):
                return  # what has come meanwhile is looked at when it is done
            self._give_up(self._underway)
        self._plan(reason)

    def _plan(self, reason: str) -> None:
        replicas, now = self._replicas, self._world.now
        left = survivors(replicas.members, self._world.instances)
        try:
            preparation = self._prepare(left)
        except NoFeasibleShape as problem:
            if not replicas.running():
                self._suspend(f"{reason}: {problem}")
            return
        if preparation is None or (
            is_in_place(preparation, replicas.placement) and len(replicas.running()) == len(replicas.members)
        ):
            return
        standing = frozenset(device.instance for device in preparation.needs)
        needed = standing | sources(preparation.plan) | frozenset(left.backups.values())
        change = Underway(preparation, reason, now, self._leaving(), needed, self._links())
        self._underway = change
        if self._without == "arranger" or self._policy.stops_first:
            self._at_boundary(change, self._stop_early)
        elif self._without == "migration":
            self._arrange(change)
        else:
            self._copy_parameters(change)

    def _prepare(self, left: Survivors) -> Preparation | None:
        """The next mesh and the way to it; None if the mesh is as it should be.

        Raises:
          NoFeasibleShape: the model fits on no mesh of the ready instances.
        """
        replicas, instances = self._replicas, self._instances()
        epoch = 1 if replicas.placement is None else replicas.placement.epoch + 1
        if self._policy is not SPOTJAX:
            return self._policy.plan(self._planning, replicas.placement, instances, {}, epoch, replicas.running())
        decision = self._decide()
        if self._fits(decision):
            return None
        live = replicas.live(left.positions)
        return plan_change(
            self._planning, replicas.placement, instances, live, epoch, replicas.running(), self._held, left, decision
        )

    # The parts of a change, in order

    def _stop_early(self, change: Underway) -> None:
        self._replicas.stop(self._stopping(change), self._world.now)
        self._copy_parameters(change)

    def _copy_parameters(self, change: Underway) -> None:
        self._after(change.preparation.plan.seconds(Phase.PRECOPY), change, self._copied_parameters)

    def _copied_parameters(self, change: Underway) -> None:
        if self._without == "precopy":
            self._arrange(change)
        else:
            self._copy_pages(change, self._arrange)

    def _copy_pages(self, change: Underway, then: Callable[[Underway], None]) -> None:
        """One round of copying KV pages that are full and go to the heir of their replica, while decoding goes on."""
        kv, running = self._plan_kv(change), self._replicas.running()
        shares, full = change.full_pages(kv, running, self._planning.demand.page_size)

        def copied(change: Underway) -> None:
            change.copied |= full
            then(change)

        self._after(kv_seconds(kv, shares, self._links()), change, copied)

    def _arrange(self, change: Underway) -> None:
        """Stops, or waits for the last boundary that fits; looks again half-way, and copies what came since."""
        steps, step_seconds = self._steps_left(change)
        if steps:
            change.waited = True
            self._after(max(1.0, steps / 2) * step_seconds, change, self._arrange)
        elif change.waited and self._without != "precopy":
            self._copy_pages(change, self._arrange_stop)
        else:
            self._at_boundary(change, self._stop)

    def _arrange_stop(self, change: Underway) -> None:
        self._steps_left(change)
        self._at_boundary(change, self._stop)

    def _steps_left(self, change: Underway) -> tuple[int, float]:
        """Until the stop, and seconds of one; finds out for whose KV there is no time."""
        stopping = self._stopping(change)
        if not stopping or not change.leaving:
            return 0, 0.0
        change.too_late = frozenset()
        kv = self._plan_kv(change)
        left = change.left_to_move(kv)
        seconds = kv_seconds(kv, left, self._links())
        steps, step_seconds, change.too_late = self._boundary.arrange(stopping, change.leaving, kv, left, seconds)
        return steps, step_seconds

    def _at_boundary(self, change: Underway, then: Callable[[Underway], None]) -> None:
        self._after(self._replicas.boundary_seconds(self._stopping(change)), change, then)

    def _stop(self, change: Underway) -> None:
        self._replicas.stop(self._stopping(change), self._world.now)
        change.moving = True
        kv = self._plan_kv(change)
        change.needed |= sources(kv.plan)
        seconds = kv_seconds(kv, change.left_to_move(kv), self._links())
        seconds += change.preparation.plan.seconds(Phase.FINAL)  # parameters that found no room before
        if self._without == "migration":
            seconds += change.preparation.plan.seconds(Phase.PRECOPY)
        self._after(seconds + self._world.scenario.assumptions.switch_seconds, change, partial(self._switch, kv))

    def _switch(self, kv: KvChange, change: Underway) -> None:
        preparation, now = change.preparation, self._world.now
        stall = self._replicas.stall_seconds(now)
        kept, recomputed = self._replicas.install(preparation.placement, preparation.carried, kv.cohorts, now)
        self._held |= self._needs
        self._needs = dict(preparation.needs)
        there = self._world.instances
        self._held = {
            device: needs
            for device, needs in self._held.items()
            if device not in self._needs and device.instance in there
        }
        self._underway, self._suspended = None, False
        moved = preparation.plan.bytes_moved + kv.plan.bytes_moved
        self._world.changes.append(
            Change(
                now, preparation.placement.shape, change.reason, stall, moved, preparation.plan.bytes_loaded, kept,
                recomputed,
            )
        )  # fmt: skip
        self._plan("what came meanwhile")

    # What they need

    def _after(self, seconds: float, change: Underway, then: Callable[[Underway], None]) -> None:
        """Goes on with a change then, if it was not given up."""

        def go_on() -> None:
            if change is self._underway:
                then(change)

        if seconds > 0:
            self._world.at(self._world.now + seconds, go_on)
        else:
            then(change)

    def _is_void(self, change: Underway) -> bool:
        there = self._world.instances
        if not change.needed <= there.keys():
            return True
        if change.moving:
            return False
        ready = all(there[device.instance].state is InstanceState.READY for device in change.preparation.needs)
        if not self._policy.keeps_kv:  # what leaves has nothing that anybody waits for
            return not ready or not (self._leaving() & there.keys()) <= change.leaving
        return not ready or self._leaving() != change.leaving

    def _give_up(self, change: Underway) -> None:
        """Remembers what was copied to devices outside of the mesh: the next plan finds it there."""
        plan = change.preparation.plan
        passed = plan.seconds(Phase.PRECOPY) if change.moving else self._world.now - change.started
        if self._without != "migration":
            for device, arrays in received(plan, change.links, passed, self._needs).items():
                if device.instance in self._world.instances:
                    self._held[device] = {**self._held.get(device, {}), **arrays}
        self._underway = None

    def _suspend(self, reason: str) -> None:
        if not self._suspended:
            self._suspended = True
            self._world.changes.append(Change(self._world.now, None, reason))

    def _decide(self) -> Decision:
        placement = self._replicas.placement
        serving = placement.shape if placement is not None and self._replicas.running() else None
        horizon = (self._options.expected_interruption_seconds + self._world.now) / (1 + self._interruptions)
        return self._shapes.decide(self._world.now, self._world.ready_instances(), serving, horizon)

    def _fits(self, decision: Decision) -> bool:
        """Whether the mesh is as decided, on instances that are ready, and all of it runs."""
        placement = self._replicas.placement
        return (
            placement is not None
            and (placement.shape, placement.layers) == (decision.shape, decision.layers)
            and len(self._replicas.running()) == len(self._replicas.members)
            and not self._leaving()
        )

    def _leaving(self) -> frozenset[str]:
        """Instances of the mesh that are not ready."""
        standing = self._replicas.standing_on()
        ready = {name for name, one in self._world.instances.items() if one.state is InstanceState.READY}
        return frozenset(standing - ready)

    def _stopping(self, change: Underway) -> list[int]:
        return sorted(self._replicas.running().difference(change.preparation.carried))

    def _plan_kv(self, change: Underway) -> KvChange:
        """What becomes of KV if decoding stops now."""
        preparation = change.preparation
        live = {
            old: [sequence for sequence in sequences if sequence.key not in change.too_late]
            for old, sequences in self._replicas.live(preparation.survivors.positions, preparation.carried).items()
            if self._policy.keeps_kv
        }
        room = self._replicas.room(preparation.placement.shape.data, preparation.carried)
        return plan_kv(self._planning, preparation, self._replicas.placement, self._instances(), live, room)

    def _instances(self) -> Sequence[Instance]:
        return list(self._world.instances.values())

    def _links(self) -> Links:
        return Links.of(self._instances(), self._planning.checkpoint_bandwidth)
