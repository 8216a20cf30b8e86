"""What arrives at the service and how fast it gets done, measured lately. Counts what it is told.

The rate and its variation are the planner's ``LoadEstimator``'s, which the simulator uses, too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from spotjax.planner.load import WINDOW, Load, LoadEstimator

FEWEST = 8
"""Requests, or samples, before which nothing is said of their mean."""
MOST_SAMPLES = 1000
"""That are kept where requests take long."""


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
      window_seconds: what is longer ago counts little, and for the pace only where less would tell nothing.
      now: the start.
    """

    def __init__(self, window_seconds: float, now: float) -> None:
        self._window, self._busy_at = window_seconds, now
        self._estimator = LoadEstimator(window_seconds)
        self._prompts: deque[tuple[float, int]] = deque(maxlen=WINDOW)
        self._outputs: deque[int] = deque(maxlen=WINDOW)
        self._samples: deque[tuple[float, int, int, int]] = deque(maxlen=MOST_SAMPLES)

    def arrived(self, now: float, prompt: int, sequences: int = 1) -> None:
        """A request came, with a prompt of so many tokens."""
        for _ in range(sequences):
            self._estimator.arrived(now)
            self._prompts.append((now, prompt))
        self._busy_at = now

    def finished(self, output: int) -> None:
        """A sequence ended after so many tokens."""
        self._outputs.append(output)

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
        output = _mean(self._outputs)
        while len(self._samples) > FEWEST and self._samples[1][0] < now - self._window:
            if not output or self._samples[-1][3] - self._samples[1][3] < FEWEST * output:
                break  # in less time there is nothing to tell from
            self._samples.popleft()
        batch, service = self._pace(output)
        _, running, queued, _ = self._samples[-1] if self._samples else (now, 0, 0, 0)
        prompt = _mean([tokens for _, tokens in self._prompts])
        idle = now - self._busy_at
        return Measured(self._load(now), prompt, output, running, queued, idle, service, batch)

    def _load(self, now: float) -> Load:
        """The estimate; of few requests no more than if they had come in a quarter of the window: they tell little."""
        load = self._estimator.load(now)
        lately = sum(at > now - self._window for at, _ in self._prompts)
        return load if lately == WINDOW else replace(load, rate=min(load.rate, lately / (self._window / 4)))

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


def _mean(values: Sequence[int]) -> int:
    return max(1, round(sum(values) / len(values))) if len(values) >= FEWEST else 0
