"""What happened to the fleet, for operators: a short history and everybody who follows it."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence

from spotjax.fleet.status import FleetEvent, Flow

log = logging.getLogger(__name__)
HISTORY = 256
"""Events that a new follower still sees; one who reads more slowly than this many events come loses the oldest."""


class EventLog:
    """Records events, one log line each.

    Args:
      wall_clock: Unix time in seconds.
    """

    def __init__(self, wall_clock: Callable[[], float]) -> None:
        self._clock = wall_clock
        self._history: deque[FleetEvent] = deque(maxlen=HISTORY)
        self._count = 0
        self._changed = asyncio.Event()
        self._closed = False

    def record(
        self, kind: str, epoch: int, message: str, flows: Sequence[Flow] = (), /, **fields: str | int | float
    ) -> None:
        """Adds one event."""
        log.info("%s", message, extra={"event": kind, "epoch": epoch, **fields})
        self._count += 1
        self._history.append(FleetEvent(self._clock(), kind, epoch, message, fields, self._count, tuple(flows)))
        self._wake()

    def recent(self) -> tuple[FleetEvent, ...]:
        """The last events, the oldest first."""
        return tuple(self._history)

    def close(self) -> None:
        """Ends all followers once they have read what is there."""
        self._closed = True
        self._wake()

    async def follow(self, after: int = 0) -> AsyncIterator[FleetEvent]:
        """Recent events beyond the number ``after``, then new ones as they happen."""
        seen = after
        while True:
            changed = self._changed
            for event in [event for event in self._history if event.number > seen]:
                seen = event.number
                yield event
            if self._closed and self._count <= seen:
                return
            await changed.wait()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
