"""The service as the capacity loop sees it, its clocks, and what it tells operators. Decides nothing."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from spotjax.fleet.change import Planning
from spotjax.fleet.notices.standing import Word
from spotjax.fleet.status import FleetEvent, FleetStatus, Reconfiguration
from spotjax.meshes.instance import Instance

log = logging.getLogger(__name__)
REMEMBERED = 16
"""Actions that ``spotjax status`` tells of."""


class Served(Protocol):
    """The service, as far as this needs it: a ``fleet.controller.Controller``."""

    @property
    def planning(self) -> Planning:
        """What changes of the mesh are planned with."""
        ...

    def members(self) -> Sequence[Instance]:
        """Instances that are not gone."""
        ...

    def status(self) -> FleetStatus:
        """See ``FleetService``."""
        ...

    async def release(self, instance: str) -> Reconfiguration:
        """See ``FleetService``."""
        ...

    async def preempt(self, instance: str, grace_seconds: float) -> Reconfiguration:
        """See ``FleetService``."""
        ...

    def noticed(self, word: Word) -> None:
        """See ``Attendance``."""
        ...

    def gone(self, instance: str, how: str) -> None:
        """See ``Attendance``."""
        ...

    def record(self, kind: str, message: str, **fields: str | int | float) -> None:
        """Puts an event into the fleet's stream."""
        ...


@dataclass(frozen=True)
class Clocks:
    """Time, passed in: monotonic and Unix seconds, and a wait."""

    monotonic: Callable[[], float]
    wall: Callable[[], float]
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep


class Actions:
    """What was done: in the fleet's stream of events once there is a fleet, in the log in any case."""

    def __init__(self, served: Callable[[], Served | None], clocks: Clocks) -> None:
        self._served, self._clocks = served, clocks
        self._last: deque[FleetEvent] = deque(maxlen=REMEMBERED)

    def record(self, kind: str, message: str, **fields: str | int | float) -> None:
        """One action."""
        self._last.append(FleetEvent(self._clocks.wall(), kind, 0, message, fields))
        if (served := self._served()) is not None:
            served.record(kind, message, **fields)
        else:
            log.info("%s", message, extra={"event": kind, **fields})

    def last(self) -> tuple[FleetEvent, ...]:
        """The last ones, the oldest first."""
        return tuple(self._last)
