"""Ends the process when a step hangs: nothing else helps against a device that does not answer.

Heartbeats come from another process and go on meanwhile; only the end of this one tells the fleet.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

log = logging.getLogger(__name__)

STEP_SECONDS = 60.0
"""Far above any step that does not compile, and steps do not."""
LOOK_SECONDS = 1.0


@dataclass(eq=False)
class _Step:
    """A step under way.

    Attributes:
      name: for the log.
      seconds: how long it has been seen to run.
    """

    name: str
    seconds: float = 0.0


class Watchdog:
    """Watches steps from a thread of its own.

    Args:
      clock: monotonic seconds.
      end: ends the process with an exit code, at once.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, end: Callable[[int], object] = os._exit) -> None:
        self._clock, self._end = clock, end
        self._steps: set[_Step] = set()
        self._looked = clock()
        self._closing = threading.Event()

    def start(self) -> None:
        """Looks every second from now on, until ``close``."""
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def close(self) -> None:
        """Ends the thread."""
        self._closing.set()

    @contextmanager
    def over(self, step: str) -> Iterator[None]:
        """A step runs in the body. From any thread."""
        running = _Step(step)
        self._steps.add(running)
        try:
            yield
        finally:
            self._steps.discard(running)

    def look(self) -> None:
        """Ends the process if a step has run for too long, not counting time in which the process was stopped."""
        now = self._clock()
        passed, self._looked = min(now - self._looked, 2 * LOOK_SECONDS), now
        for step in tuple(self._steps):
            step.seconds += passed
            if step.seconds > STEP_SECONDS:
                log.critical("%s has run for %d s: the device hangs, and the process ends", step.name, step.seconds)
                self._end(1)

    def _watch(self) -> None:
        while not self._closing.wait(LOOK_SECONDS):
            self.look()
