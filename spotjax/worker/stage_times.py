"""How long steps take on one stage of a worker."""

from __future__ import annotations


class StageTimes:
    """Steps on one stage. ``add`` is called in the thread that reads the stage's results.

    Attributes:
      steps: that came back.
      seconds: that the stage was busy with them.
    """

    __slots__ = ("_back", "seconds", "steps")

    def __init__(self) -> None:
        self.steps, self.seconds, self._back = 0, 0.0, 0.0

    def add(self, begun: float, now: float) -> None:
        """A step that was dispatched at some time is back; while the one before ran, it waited."""
        self.seconds += now - max(begun, self._back)
        self._back = now
        self.steps += 1
