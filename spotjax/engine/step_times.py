"""How long the steps of a replica take lately. Keeps no clock."""

from __future__ import annotations

WEIGHT = 0.1
"""Of the newest step in the mean, and share of the longest that every step forgets: some ten steps count."""


class StepTimes:
    """Running figures of one replica.

    Attributes:
      typical: exponentially weighted mean, in seconds; 0 before the first step.
      longest: in seconds, of some ten recent steps: the step under way may be a long prefill.
    """

    def __init__(self) -> None:
        self.typical = 0.0
        self.longest = 0.0

    def add(self, seconds: float) -> None:
        """Counts one step."""
        self.typical += (seconds - self.typical) * (WEIGHT if self.typical else 1.0)
        self.longest = max(seconds, self.longest - (self.longest - self.typical) * WEIGHT)
