"""At which token boundary a simulated Spotjax stops for a change: ``planner.deadline`` with simulated figures."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from math import inf

from spotjax.fleet.change import KvChange
from spotjax.meshes.placement import Placement
from spotjax.planner.deadline import Departure, Pace, RunningSequence, Saved, arrange
from spotjax.planner.demand import Demand
from spotjax.planner.kv_cohorts import cohort_of
from spotjax.sim.systems.spotjax_replicas import Replicas
from spotjax.sim.times import ReplicaTimes
from spotjax.sim.world import World


class Boundary:
    """When to stop.

    Args:
      world: its clock and its instances.
      replicas: what runs.
      times: of the replicas of a mesh.
      demand: whose batch and context give the time of a step.
      late: instances that have notice are left at the last boundary that fits, not at the first.

    Attributes:
      deadlines: of instances that have notice.
    """

    def __init__(
        self, world: World, replicas: Replicas, times: Callable[[Placement], ReplicaTimes], demand: Demand, late: bool
    ) -> None:
        self.deadlines: dict[str, float] = {}
        self._world, self._replicas, self._times = world, replicas, times
        self._demand, self._late = demand, late

    def arrange(
        self,
        stopping: Sequence[int],
        leaving: Collection[str],
        kv: KvChange,
        left: Mapping[str, float],
        seconds: float,
    ) -> tuple[int, float, frozenset[int]]:
        """How many more steps to run, how long one takes, and the requests for whose KV there is no time.

        Args:
          stopping: the replicas that will stop.
          leaving: instances of the mesh that go, or are gone.
          kv: what would become of KV now.
          left: by cohort, the share of it that is not in place yet.
          seconds: that it would take to move.
        """
        assert self._replicas.placement is not None, "something runs"
        now, times = self._world.now, self._times(self._replicas.placement)
        step_seconds = times.step(self._demand.batch, self._demand.context)
        moved: dict[str, float] = defaultdict(float)
        for transfer in kv.plan.transfers:
            name = cohort_of(transfer.pieces[0].name) or ""
            moved[name] += transfer.bytes * left.get(name, 0.0)
        total = sum(moved.values())
        position_bytes = self._world.scenario.spec.kv_bytes_per_position
        pace = Pace(
            step_seconds,
            self._replicas.boundary_seconds(stopping),
            total / seconds if seconds > 0 else inf,
            self._world.scenario.assumptions.switch_seconds,
            position_bytes if total else 0,
        )
        share = {
            live.key: moved[cohort.name] * live.pages / cohort.pages
            for cohort in kv.cohorts
            for live in cohort.sequences
        }
        sequences = [
            RunningSequence(str(request), int(share.get(request, 0)), remaining, times.prefill(max(1, computed))[0])
            for number in stopping
            for request, remaining, computed in self._replicas.members[number].replica.remaining()
        ]
        departures = [Departure(name, self.deadlines.get(name, now)) for name in sorted(leaving)]
        # What there is no time for is decided by the step under way; the stop also has time for a prompt before it.
        longest = max(pace.in_flight_seconds, times.prefill(min(self._demand.prompt, self._demand.step_tokens))[0])
        wanted = arrange(now, departures, (), sequences, replace(pace, in_flight_seconds=longest))
        needed = arrange(now, departures, (), sequences, pace)
        assert wanted is not None and needed is not None, "there are departures"
        bytes_of = {sequence.key: sequence.bytes for sequence in sequences}
        too_late = frozenset(int(key) for key in needed.recomputed if bytes_of.get(key))
        steps = wanted.steps
        if not self._late or (wanted.saved is not Saved.KV and needed.saved is not Saved.TOKENS):
            steps = 0
        return steps, step_seconds, too_late
