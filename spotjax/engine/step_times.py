"""How long the steps of a replica take lately. Keeps no clock."""

from __future__ import annotations

WEIGHT = 0.1
"""Of the newest step in the mean, and share of the longest that every step forgets: some ten steps count."""


class StepTimes:
    """Running figures of one replica.

    Attributes:
      typical: exponentially weighted mean of what steps take, in seconds; 0 before the first step.
      longest: in seconds, from when one of some ten recent steps was scheduled until it was back: that long it may take
        until nothing is in flight, and the step under way may be a long prefill.
    """

    def __init__(self) -> None:
        self.typical = 0.0
        self.longest = 0.0

    def add(self, seconds: float, until_back: float) -> None:
        """Counts one step.

        Args:
          seconds: from when it could begin, because so many before it were back as there are stages.
          until_back: from when it was scheduled.
        """
        self.typical += (seconds - self.typical) * (WEIGHT if self.typical else 1.0)
        self.longest = max(until_back, self.longest - (self.longest - self.typical) * WEIGHT)
