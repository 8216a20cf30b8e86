"""At which token boundary decoding stops for a change of the mesh, and the wait until then.

The decision is ``planner.deadline``'s. It is made anew half-way to the stop, again and again, with what ``tempo`` has
measured by then, and at once when something happens to an instance. Changes no mesh.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from math import ceil, inf
from typing import Literal

from spotjax.engine.replica import Replica
from spotjax.fleet.change import KvChange
from spotjax.fleet.dispatch import Dispatcher
from spotjax.fleet.handover import CopiedPages
from spotjax.fleet.membership import Membership
from spotjax.fleet.tempo import SWITCH_SECONDS, Tempo
from spotjax.meshes.instance import InstanceState
from spotjax.meshes.placement import Placement
from spotjax.planner.deadline import Arrangement, Arrival, Departure, RunningSequence, Saved, arrange, steps_alone
from spotjax.planner.kv_cohorts import cohort_of

Leave = Literal["early", "late"]
"""When the mesh leaves an instance that has notice: as soon as it can, or at the last token boundary that fits."""


class Boundary:
    """When to stop.

    Args:
      leave: when the mesh leaves instances that have notice.
      members: the instances and their deadlines.
      dispatcher: the replicas.
      tempo: how fast things go.
      clock: monotonic seconds.
    """

    def __init__(
        self, leave: Leave, members: Membership, dispatcher: Dispatcher, tempo: Tempo, clock: Callable[[], float]
    ) -> None:
        self._late, self._hurry = leave == "late", False
        self._members, self._dispatcher, self._tempo, self._clock = members, dispatcher, tempo, clock
        self._stirred = asyncio.Event()

    def stir(self) -> None:
        """Something happened to an instance: whoever waits looks again."""
        self._stirred.set()

    def look(self) -> None:
        """What happened until now is taken into account."""
        self._stirred.clear()

    def hurry(self) -> None:
        """Ends the wait, and makes none from now on."""
        self._hurry = True
        self.stir()

    def arrange(
        self,
        current: Placement | None,
        carried: Collection[int],
        kv: KvChange,
        copied: CopiedPages,
        newcomers: Iterable[str],
    ) -> tuple[Arrangement, frozenset[int]]:
        """When to stop as things stand; now, unless instances of the mesh have notice and are to be left late.

        Args:
          current: the mesh as it is.
          carried: replicas that do not stop.
          kv: what would become of the KV if the others stopped now.
          copied: pages that are in place already.
          newcomers: instances that could join, but were not planned with.

        Returns: the arrangement, and the keys of the sequences whose KV there is no time to move.
        """
        now, late = self._clock(), self._late and not self._hurry
        departures = self._departures(current)
        if not departures:
            return Arrangement(0, Saved.KV, (), (), ()), frozenset()
        stopping = [replica for old, replica in enumerate(self._dispatcher.replicas) if old not in carried]
        pace = self._tempo.pace(stopping, kv.plan)
        sequences = _sequences(stopping, kv, copied, pace.step_seconds)
        arrivals = [Arrival(name, now + self._tempo.prepare_seconds) for name in newcomers] if late else []
        # What there is no time for is decided by what was measured; the stop has something to spare on top of it.
        cautious = replace(pace, fixed_seconds=max(pace.fixed_seconds, SWITCH_SECONDS))
        wanted = arrange(now, departures, arrivals, sequences, cautious)
        needed = arrange(now, departures, arrivals, sequences, pace)
        assert wanted is not None and needed is not None, "there are departures"
        too_late = frozenset(int(one.key) for one in sequences if one.bytes and one.key in needed.recomputed)
        if not late or (wanted.saved is not Saved.KV and needed.saved is not Saved.TOKENS):
            wanted = replace(wanted, steps=0)
        return wanted, too_late

    def ends(self, current: Placement | None) -> dict[int, float]:
        """Until when each running replica can go on, in monotonic seconds: the first deadline of its instances."""
        if current is None:
            return {}
        return {
            old: min(self._members.deadline(name) for name in current.instances(old))
            for old in sorted(self._dispatcher.running())
        }

    async def serve_on(self, current: Placement | None, reserve: float = 0.0) -> bool:
        """Where there is no mesh to change to: lets each replica decode until the last boundary before its end.

        Args:
          current: the mesh.
          reserve: seconds to be left then, at most half of what is left now.

        Returns: True as soon as something happens to an instance; False when all replicas have stopped.
        """
        started = self._clock()
        while ends := self.ends(current):
            ends = {old: max(end - reserve, (started + end) / 2) if reserve else end for old, end in ends.items()}
            first = min(ends.values())
            steps = self._steps_alone([self._dispatcher.replicas[old] for old in ends], first)
            if not steps:
                await self._dispatcher.stop([old for old in ends if ends[old] > first])
            elif await self.half_way(steps):
                return True
        return False

    async def half_way(self, steps: float) -> bool:
        """Waits for half of so many steps; returns True at once when something happens to an instance."""
        seconds = None if steps == inf else max(1.0, steps / 2) * self._tempo.pace(()).step_seconds
        try:
            await asyncio.wait_for(self._stirred.wait(), seconds)
        except TimeoutError:
            return False
        self.look()
        return True

    def _departures(self, current: Placement | None) -> list[Departure]:
        """Instances of the mesh that leave, or are gone."""
        leaving = standing_on(current).difference(self._members.having(InstanceState.READY))
        return [Departure(name, self._members.deadline(name)) for name in sorted(leaving)]

    def _steps_alone(self, replicas: Iterable[Replica], end: float) -> float:
        left = end - self._clock()
        if self._hurry or left <= 0:
            return 0
        return inf if left == inf else steps_alone(left, self._tempo.pace(replicas))


def standing_on(placement: Placement | None) -> frozenset[str]:
    """Instances that a mesh stands on."""
    return frozenset(device.instance for device in placement.devices.values()) if placement else frozenset()


def _sequences(
    replicas: Collection[Replica], kv: KvChange, copied: CopiedPages, step_seconds: float
) -> list[RunningSequence]:
    """What runs on replicas that will stop, with the bytes that would move after the stop.

    Of pages that sequences share, one of these has the bytes.
    """
    moved: dict[str | None, int] = defaultdict(int)
    for transfer in kv.plan.transfers:
        moved[cohort_of(transfer.pieces[0].name)] += transfer.bytes
    pages = {sequence.key: sequence.pages for replica in replicas for sequence in replica.scheduler.running.values()}
    left: dict[int, int] = {}
    for cohort in kv.cohorts:
        counted: set[int] = set()
        for live in cohort.sequences:
            more = {page for page in pages[live.key][: live.pages] if (cohort.old, page) not in copied} - counted
            left[live.key] = moved[cohort.name] * len(more) // cohort.pages
            counted |= more
    return [
        RunningSequence(
            str(sequence.key),
            left.get(sequence.key, 0),
            sequence.state.sampling.max_tokens - len(sequence.state.tokens),
            ceil(sequence.computed / replica.scheduler.limits.prefill_tokens) * step_seconds,
        )
        for replica in replicas
        for sequence in replica.scheduler.running.values()
    ]
