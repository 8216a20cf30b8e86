"""Carries out changes of the mesh, one at a time, and starts over when an instance vanishes in the middle of one.

The way of a preemption: plan, bring parameters and full pages of KV into place while decoding goes on, stop at a token
boundary, move the rest of the KV, switch the epoch, go on from the watermarks. Without notice it is the same way, with
fewer sources. Which boundary it is, is ``boundary``'s to say.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence

from spotjax.engine.commit_log import CommitLog
from spotjax.engine.replica import Replica
from spotjax.engine.request import RequestState
from spotjax.errors import InstanceLost, NoFeasibleShape
from spotjax.fleet import reports
from spotjax.fleet.boundary import Boundary, Leave, standing_on
from spotjax.fleet.change import KvChange, Live, Planning, is_in_place, plan_kv
from spotjax.fleet.cluster import Cluster
from spotjax.fleet.dispatch import Dispatcher
from spotjax.fleet.events import EventLog
from spotjax.fleet.membership import Membership
from spotjax.fleet.observer import Observer, Outcome, Path, Underway, Unobserved
from spotjax.fleet.precopy import Precopy
from spotjax.fleet.recovery_policies import POLICIES
from spotjax.fleet.saving import RESERVE_SECONDS, Saving
from spotjax.fleet.status import Reconfiguration
from spotjax.fleet.tempo import Tempo
from spotjax.meshes.instance import InstanceState
from spotjax.meshes.placement import Placement
from spotjax.planner.deadline import Arrangement
from spotjax.planner.optimizer import choose_shape
from spotjax.reshard.transfer import Preparation, Remains, Survivors, Traffic

Clock = Callable[[], float]
"""Monotonic seconds."""


class Reconfigurer:
    """Keeps the mesh fitting to the instances.

    Args:
      planning: what every change is planned with.
      members: the instances.
      cluster: the devices.
      dispatcher: the replicas and their sequences.
      events: told about everything.
      log: told about epochs.
      saving: of KV, when no mesh can be.
      clock: monotonic seconds.
      committed: told about sequences that ended in the course of a change.
      leave: when the mesh leaves an instance that has notice.
      observer: is told of every migration.

    Attributes:
      placement: the current mesh, None while there is none.
      epoch: counts placements upwards, also over restarts of the controller.
    """

    def __init__(
        self,
        planning: Planning,
        members: Membership,
        cluster: Cluster,
        dispatcher: Dispatcher,
        events: EventLog,
        log: CommitLog,
        saving: Saving,
        clock: Clock,
        committed: Callable[[Sequence[RequestState]], None],
        leave: Leave = "early",
        observer: Observer | None = None,
    ) -> None:
        self.placement: Placement | None = None
        self.epoch = log.epoch
        self._log, self._saving = log, saving
        self._stopped_on: Placement | None = None
        """The mesh that stopped last, while there is no other: what is left of its KV is still of use."""
        self._planning, self._members, self._cluster = planning, members, cluster
        self._policy = POLICIES[planning.recovery]
        self._dispatcher, self._events, self._clock, self._committed = dispatcher, events, clock, committed
        self._tempo = Tempo(planning.spec.kv_bytes_per_position)
        self._boundary = Boundary(leave, members, dispatcher, self._tempo, clock)
        self._one_at_a_time = asyncio.Lock()
        self._observer: Observer = observer or Unobserved()
        self._underway: Underway | None = None
        """The migration that is going on."""

    def recall(self, remains: Remains) -> None:
        """Takes up a mesh that stopped when its controller died; those who have parts of it are there again."""
        self.epoch = max(self.epoch, remains.placement.epoch)
        self._stopped_on = remains.placement
        for name in sorted(remains.holders):
            self._join(name, f"instance {name} is back with its part of epoch {remains.placement.epoch}")
        for name in standing_on(remains.placement) - remains.holders:
            self._stopped_on = self._stopped_on.without(name)

    def lose(self, instance: str) -> None:
        """An instance is gone, whatever it was doing. Steps that need it fail from now on."""
        self._members.set_state(instance, InstanceState.GONE)
        self._cluster.lose(instance)
        self._boundary.stir()

    def hurry(self) -> None:
        """Waits for no deadline any more."""
        self._boundary.hurry()

    def require_feasible_without(self, instance: str) -> None:
        """Verifies that the instances but one can hold the model.

        Raises:
          NoFeasibleShape: they cannot.
        """
        others = [other for other in self._members.joined() if other.name != instance]
        choose_shape(self._planning.spec, others, self._planning.demand, self._planning.wanted)

    async def reconfigure(self) -> Reconfiguration:
        """Makes the mesh fit to the instances that there are now, however often that takes.

        Call it whenever that may have changed; a change that waits for its last token boundary then looks again.
        Must not be cancelled: half a change leaves no replica running.
        """
        self._boundary.stir()
        async with self._one_at_a_time:
            while True:
                try:
                    report = await self._change()
                except InstanceLost as loss:
                    self._failed("lost")
                    self._events.record("lost", self.epoch, f"{loss}; planning again from what is left")
                    await asyncio.sleep(0)  # whoever is still to tell us of the loss gets a turn
                else:
                    self._failed("replanned")
                    if report is not None and not self._joinable() and not self._another_turn(report):
                        return report

    def _failed(self, outcome: Outcome) -> None:
        """The migration that is going on, if there is one, came to nothing."""
        underway, self._underway = self._underway, None
        if underway is not None:
            underway.failed(outcome, self.epoch)

    def _another_turn(self, report: Reconfiguration) -> bool:
        """Whether what was changed may be changed again at once."""
        return self._policy.in_turns and report.after is not None and report.after != report.before

    def _welcome(self) -> None:
        """Lets instances join. One that was lost and is back joins when the mesh has left it: its memory is empty."""
        for name in self._joinable():
            if self._stopped_on is not None:
                self._stopped_on = self._stopped_on.without(name)
            if name not in standing_on(self.placement):
                self._join(name, f"instance {name} joined")

    def _join(self, name: str, message: str) -> None:
        self._cluster.join(name)
        self._members.set_state(name, InstanceState.READY)
        self._events.record("joined", self.epoch, message, instance=name)

    def _joinable(self) -> list[str]:
        """Joining instances that can be given work."""
        return [name for name in self._members.having(InstanceState.JOINING) if self._cluster.joinable(name)]

    async def _change(self) -> Reconfiguration | None:
        """One change; None if instances came or went before it was made, so that another is called for."""
        self._boundary.look()
        self._welcome()
        before, started = self._mesh, self._clock()
        underway = Underway(self._observer, self._clock, self._path(), started)
        hurt = self._dispatcher.computed(self._hurt()) if self._policy.keeps_kv else {}
        survivors = await self._cluster.survivors(hurt) if hurt else Survivors()
        try:
            preparation = self._plan(survivors)
        except NoFeasibleShape as problem:
            if any(end > started for end in self._boundary.ends(self.placement).values()):
                self._events.record("arranged", self.epoch, f"decoding goes on until instances go: {problem}")
                self._saving.begin(self.epoch)
            reserve = RESERVE_SECONDS if self._saving.wanted else 0.0
            if await self._boundary.serve_on(self.placement, reserve):
                return None
            if self.placement is not None:
                underway.failed("suspended", self.epoch)
            return await self._suspend(str(problem))
        if is_in_place(preparation, before) and not any(replica.stopping for replica in self._dispatcher.replicas):
            self._saving.give_up()
            return reports.unchanged(self.epoch, preparation, self._running())
        self._underway = underway
        underway.done("plan")
        self._log.begin_epoch(preparation.placement.epoch)  # early: it is to be on disk before anybody has that mesh
        stopped = self._clock() if self._policy.stops_first else None
        if stopped is not None:
            await self._dispatcher.stop()
            self._require_ready(preparation)
        loaded = await self._cluster.prepare(preparation)
        prepared = self._clock()
        underway.done("prepare", parameters_moved=loaded.moved, parameters_loaded=loaded.loaded)
        self._tempo.prepared(prepared - started)
        reports.prepared(self._events, self.epoch, loaded, prepared - started)
        precopy = Precopy(self._dispatcher, self._cluster)
        await self._precopy(precopy, preparation)
        precopied = self._clock()
        underway.done("precopy", kv_precopied=precopy.bytes_moved)
        too_late = await self._decode_on(preparation, precopy)
        if too_late is None:
            return None
        underway.done("wait", kv_precopied=precopy.bytes_moved)
        return await self._switch(preparation, precopy, too_late, loaded, precopied - started, stopped, underway)

    def _plan(self, survivors: Survivors) -> Preparation:
        preparation = self._policy.plan(
            self._planning,
            self._mesh,
            self._members.joined(),
            self._live(survivors),
            self.epoch + 1,
            self._dispatcher.running(),
            self._cluster.held(),
            survivors,
        )
        reports.planned(self._events, self.epoch, self._mesh, preparation)
        return preparation

    async def _precopy(self, precopy: Precopy, preparation: Preparation) -> None:
        """One round of copying KV that is final, while decoding goes on."""
        started = self._clock()
        traffic = await precopy.round(self._intact(preparation))
        self._tempo.copied(traffic, self._clock() - started)

    def _arrange(self, preparation: Preparation, precopy: Precopy) -> tuple[Arrangement, frozenset[int]]:
        """When to stop, and the keys of sequences whose KV there is no time for, as things stand.

        Raises:
          InstanceLost: the preparation is not good any more.
        """
        self._require_ready(preparation)
        newcomers = [name for name in self._joinable() if name not in standing_on(self.placement)]
        kv = self._plan_kv(preparation)
        return self._boundary.arrange(self.placement, preparation.carried, kv, precopy.copied, newcomers)

    async def _decode_on(self, preparation: Preparation, precopy: Precopy) -> frozenset[int] | None:
        """Waits for the token boundary at which to stop.

        Returns: keys of the sequences whose KV there is no time for; None if there is time to plan with a newcomer.
        """
        arrangement, too_late = self._arrange(preparation, precopy)
        if steps := arrangement.steps:
            self._events.record("arranged", self.epoch, f"decoding goes on for some {steps} steps", steps=steps)
            hurt = self._hurt()
            while arrangement.steps and not arrangement.joining:
                await self._boundary.half_way(arrangement.steps)
                if self._hurt() != hurt:
                    raise InstanceLost("an instance is gone before its deadline")  # there may be copies of its KV
                arrangement, too_late = self._arrange(preparation, precopy)
            if not arrangement.joining:
                await self._precopy(precopy, preparation)
                arrangement, too_late = self._arrange(preparation, precopy)
        return None if arrangement.joining else too_late

    async def _switch(
        self,
        preparation: Preparation,
        precopy: Precopy,
        too_late: Collection[int],
        loaded: Traffic,
        precopy_seconds: float,
        stopped: float | None,
        underway: Underway,
    ) -> Reconfiguration:
        """Stops what changes, if that was not done before, moves the rest of the KV, starts on the new mesh."""
        before, carried = self.placement, preparation.carried
        stopped = self._clock() if stopped is None else stopped
        await self._dispatcher.stop(carried)
        self._committed(self._dispatcher.take_cancelled(carried))
        self._require_ready(preparation)
        underway.done("stop")
        running, paused = self._running(), self._dispatcher.begun(carried)
        kv = self._plan_kv(preparation, too_late)
        data = preparation.placement.shape.data
        handover = self._dispatcher.hand_over(data, kv.cohorts, preparation.heirs, carried, precopy.copied)
        going_on = sum(_with_kv(self._dispatcher.replicas[old]) for old in carried)
        try:
            pipelines, moved = await self._cluster.switch(handover.transfers)
        except InstanceLost:
            self._dispatcher.give_back(handover, carried)
            self._dispatcher.forget(handover, carried)
            raise
        underway.done("final", kv_moved=moved.moved)
        self._dispatcher.install(pipelines, handover, carried)
        self.placement, self.epoch = preparation.placement, preparation.placement.epoch
        self._stopped_on = None
        self._saving.give_up()
        pause = self._clock() - stopped
        underway.switched(self.epoch, pause, paused)
        self._underway = None
        self._tempo.switched(pause)
        kept = going_on + sum(len(sequences) for sequences in handover.adopted.values())
        kept = min(kept, running)  # what came on replicas that went on meanwhile is not counted
        report = Reconfiguration(
            self.epoch, before, self.placement,
            preparation.plan.bytes_in_place + kv.plan.bytes_in_place,
            loaded.moved + precopy.bytes_moved + moved.moved, loaded.loaded,
            precopy_seconds, pause, kept, running - kept,
        )  # fmt: skip
        reports.switched(self._events, report, kv.plan, moved.moved, precopy.bytes_moved, len(carried))
        return report

    def _plan_kv(self, preparation: Preparation, but: Collection[int] = ()) -> KvChange:
        """What becomes of KV if decoding stops now, that of some sequences left behind."""
        live = {
            old: [sequence for sequence in sequences if sequence.key not in but]
            for old, sequences in self._live(preparation.survivors).items()
        }
        room = self._dispatcher.room(preparation.placement.shape.data, preparation.carried)
        return plan_kv(self._planning, preparation, self._mesh, self._members.joined(), live, room)

    def _live(self, survivors: Survivors) -> Live:
        """The sequences whose KV may go on, by replica."""
        return self._dispatcher.live(survivors.positions) if self._policy.keeps_kv else {}

    @property
    def _mesh(self) -> Placement | None:
        """What KV is on: the current mesh, or the one that stopped last."""
        return self.placement or self._stopped_on

    def _path(self) -> Path:
        """Why the mesh changes now."""
        if self._mesh is None:
            return "first"
        if self.placement is None:
            return "resume"
        return "loss" if self._hurt() else "planned"

    def _hurt(self) -> list[int]:
        """Replicas of which an instance is gone."""
        if (mesh := self._mesh) is None:
            return []
        there = {instance.name for instance in self._members.joined() if instance.state is not InstanceState.GONE}
        return [data for data in range(mesh.shape.data) if not mesh.instances(data) <= there]

    def _intact(self, preparation: Preparation) -> dict[int, int]:
        """Heirs, by old replica, of those that stop with all their KV: no instance of them is gone."""
        if self.placement is None:
            return {}
        hurt = self._hurt()
        return {
            old: new for old, new in preparation.heirs.items() if old not in preparation.carried and old not in hurt
        }

    def _require_ready(self, preparation: Preparation) -> None:
        """Raises InstanceLost if an instance of the new mesh was noticed or lost since it was planned."""
        leaving = standing_on(preparation.placement).difference(self._members.having(InstanceState.READY))
        if leaving:
            raise InstanceLost(f"instance {min(leaving)} is leaving and cannot be part of the new mesh")
        if not preparation.carried.keys() <= self._dispatcher.running():
            raise InstanceLost("a replica that was to go on without stopping has stopped")

    async def _suspend(self, why: str) -> Reconfiguration:
        """No mesh fits: every request waits, none fails. What is left of the KV when one fits again is used then."""
        before = self.placement
        await self._dispatcher.stop()
        self._committed(self._dispatcher.take_cancelled())
        running = self._running()
        self._dispatcher.rest()
        if before is not None:
            ends = [self._members.deadline(name) for name in standing_on(before) if self._members.is_leaving(name)]
            await self._saving.end(before, min(ends, default=self._clock()) - self._clock())
        self.placement, self._stopped_on = None, self._mesh
        self._events.record("stop", self.epoch, f"requests wait for instances: {why}")
        return Reconfiguration(self.epoch, before, None, 0, 0, 0, 0.0, 0.0, 0, running)

    def _running(self) -> int:
        return sum(map(_with_kv, self._dispatcher.replicas))


def _with_kv(replica: Replica) -> int:
    """Sequences that have begun: one that was just let in has nothing to keep or to compute again."""
    return sum(sequence.computed > 0 for sequence in replica.scheduler.running.values())
