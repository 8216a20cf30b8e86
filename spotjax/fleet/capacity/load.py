"""What arrives at the service and how fast it gets done, measured over a sliding window. Counts what it is told.

The rate and its variation are the planner's ``LoadEstimator``'s, which the simulator uses, too.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

from spotjax.planner.load import Load, LoadEstimator

FEWEST = 8
"""Requests, or samples, before which nothing is said of their mean."""


@dataclass(frozen=True, slots=True)
class Measured:
    """The load at a moment.

    Attributes:
      load: what arrives, sequences per second.
      prompt, output: mean tokens of a sequence; 0 while there were too few to tell.
      running: sequences that replicas have taken up.
      queued: sequences that wait.
      idle_seconds: since there was any.
      service_seconds: mean seconds of a sequence once it runs, as measured; 0 while it cannot be told.
      batch: sequences that ran at once meanwhile, of all replicas, on average.
    """

    load: Load
    prompt: int = 0
    output: int = 0
    running: int = 0
    queued: int = 0
    idle_seconds: float = 0.0
    service_seconds: float = 0.0
    batch: float = 0.0


class Meter:
    """Measures. All times are monotonic seconds.

    Args:
      window_seconds: what is longer ago counts little or not at all.
      now: the start.
    """

    def __init__(self, window_seconds: float, now: float) -> None:
        self._window, self._busy_at = window_seconds, now
        self._estimator = LoadEstimator(window_seconds)
        self._prompts: deque[tuple[float, int]] = deque()
        self._outputs: deque[tuple[float, int]] = deque()
        self._samples: deque[tuple[float, int, int, int]] = deque()

    def arrived(self, now: float, prompt: int, sequences: int = 1) -> None:
        """A request came, with a prompt of so many tokens."""
        for _ in range(sequences):
            self._estimator.arrived(now)
            self._prompts.append((now, prompt))
        self._busy_at = now

    def finished(self, now: float, output: int) -> None:
        """A sequence ended after so many tokens."""
        self._outputs.append((now, output))

    def sample(self, now: float, running: int, queued: int, tokens: int) -> None:
        """How things are.

        Args:
          now: not before the last sample.
          running: sequences that replicas have taken up.
          queued: sequences that wait.
          tokens: output tokens since the start.
        """
        if running or queued:
            self._busy_at = now
        self._samples.append((now, running, queued, tokens))

    def measured(self, now: float) -> Measured:
        """What all that comes to."""
        for column in (self._prompts, self._outputs, self._samples):
            while column and column[0][0] < now - self._window:
                column.popleft()
        output = _mean(self._outputs)
        batch, service = self._pace(output)
        _, running, queued, _ = self._samples[-1] if self._samples else (now, 0, 0, 0)
        return Measured(
            self._load(now), _mean(self._prompts), output, running, queued, now - self._busy_at, service,
            batch,
        )  # fmt: skip

    def _load(self, now: float) -> Load:
        """The estimate, but no more than came in the window would be in a quarter of it: few requests tell little."""
        load = self._estimator.load(now)
        return replace(load, rate=min(load.rate, len(self._prompts) / (self._window / 4)))

    def _pace(self, output: int) -> tuple[float, float]:
        """(Sequences at once, seconds of one) by Little's law: as many run as come, times how long each takes."""
        if len(self._samples) < FEWEST or not output:
            return 0.0, 0.0
        area, (begin, _, _, before) = 0.0, self._samples[0]
        at, last = begin, 0
        for now, running, _, _ in self._samples:
            area += (now - at) * (running + last) / 2
            at, last = now, running
        seconds, tokens = at - begin, self._samples[-1][3] - before
        if seconds <= 0 or tokens < FEWEST * output or area <= 0:
            return 0.0, 0.0
        return area / seconds, area * output / tokens


def _mean(column: deque[tuple[float, int]]) -> int:
    if len(column) < FEWEST:
        return 0
    return max(1, round(sum(value for _, value in column) / len(column)))
