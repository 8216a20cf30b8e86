"""How fast steps, copies and switches are, as far as it was measured. Decides nothing."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from math import inf

from spotjax.engine.replica import Replica
from spotjax.planner.deadline import Pace
from spotjax.planner.plan import MigrationPlan, Phase
from spotjax.reshard.transfer import Traffic

STEP_SECONDS = 0.1
"""Of a step, before one was measured."""
SHORTEST_STEP = 1e-3
SWITCH_SECONDS = 0.5
"""Of a stop and a switch, before one was measured, and where there is time for caution; SpotServe assumes the same."""
RECENT = 8
"""The longest of so many is what the next one is expected to take."""
MEASURABLE_BYTES = 1 << 24
"""Fewer bytes say more about delays than about bandwidth."""


class Tempo:
    """Measurements of one service.

    Args:
      position_bytes: KV of one token position.

    Attributes:
      prepare_seconds: the longest that parameters took to come into place, the first loading included.
    """

    def __init__(self, position_bytes: int) -> None:
        self.prepare_seconds = 0.0
        self._position_bytes = position_bytes
        self._step_seconds, self._longest_step = STEP_SECONDS, STEP_SECONDS
        self._bandwidth = inf
        self._copy_seconds: deque[float] = deque(maxlen=RECENT)
        self._switch_seconds: deque[float] = deque(maxlen=RECENT)

    def prepared(self, seconds: float) -> None:
        """Parameters were brought into place in that time."""
        self.prepare_seconds = max(self.prepare_seconds, seconds)

    def copied(self, traffic: Traffic, seconds: float) -> None:
        """KV was copied in that time."""
        if traffic.moved < MEASURABLE_BYTES:
            self._copy_seconds.append(seconds)
        elif seconds > 0:
            self._bandwidth = traffic.moved / seconds

    def switched(self, seconds: float) -> None:
        """From the stop to the switch it took that time."""
        self._switch_seconds.append(seconds)

    def pace(self, replicas: Iterable[Replica], plan: MigrationPlan | None = None) -> Pace:
        """How fast things go.

        Args:
          replicas: those that will stop.
          plan: the moves of KV after the stop, if there are any.
        """
        measured = [replica.step_times for replica in replicas if replica.step_times.typical]
        if measured:
            self._step_seconds = max(SHORTEST_STEP, *(times.typical for times in measured))
            self._longest_step = max(self._step_seconds, *(times.longest for times in measured))
        moved = plan.bytes_moved if plan is not None else 0
        busiest = max(plan.link_seconds.get(Phase.FINAL, {}).values(), default=0.0) if plan is not None else 0.0
        return Pace(
            self._step_seconds,
            self._longest_step,
            min(moved / busiest if busiest else inf, self._bandwidth),
            max(self._switch_seconds, default=SWITCH_SECONDS) + max(self._copy_seconds, default=0.0),
            self._position_bytes if moved else 0,
        )
