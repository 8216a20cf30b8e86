"""What happened to the fleet, for operators: a short history and everybody who follows it."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable

from spotjax.fleet.status import FleetEvent

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
        self._history: deque[tuple[int, FleetEvent]] = deque(maxlen=HISTORY)
        self._count = 0
        self._changed = asyncio.Event()
        self._closed = False

    def record(self, kind: str, epoch: int, message: str, /, **fields: str | int | float) -> None:
        """Adds one event."""
        log.info("%s", message, extra={"event": kind, "epoch": epoch, **fields})
        self._count += 1
        self._history.append((self._count, FleetEvent(self._clock(), kind, epoch, message, fields)))
        self._wake()

    def recent(self) -> tuple[FleetEvent, ...]:
        """The last events, the oldest first."""
        return tuple(event for _, event in self._history)

    def close(self) -> None:
        """Ends all followers once they have read what is there."""
        self._closed = True
        self._wake()

    async def follow(self) -> AsyncIterator[FleetEvent]:
        """Recent events, then new ones as they happen."""
        seen = 0
        while True:
            changed = self._changed
            for number, event in [entry for entry in self._history if entry[0] > seen]:
                seen = number
                yield event
            if self._closed and (not self._history or self._history[-1][0] <= seen):
                return
            await changed.wait()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
