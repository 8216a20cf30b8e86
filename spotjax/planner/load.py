"""The load of the service: how often requests come, how unevenly, and how long they wait. Counts what it is told.

Waiting time is that of a G/G/m queue by Allen and Cunneen's formula, with Sakasegawa's (1977) approximation of the
probability to wait; its tail is taken as exponential.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from math import exp

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
"""One number for each of several configurations."""

WINDOW = 64
"""Gaps between arrivals that the variability is estimated from."""
SMOOTHING_SECONDS = 60.0
"""Time after which an arrival weighs 1/e in the rate."""


@dataclass(frozen=True, slots=True)
class Load:
    """What arrives.

    Attributes:
      rate: alpha, requests per second.
      arrival_scv: squared coefficient of variation of the gaps between arrivals; 1 for a Poisson process.
      service_scv: the same of how long requests take.

    Raises:
      ValueError: a number is negative.
    """

    rate: float
    arrival_scv: float = 1.0
    service_scv: float = 1.0

    def __post_init__(self) -> None:
        for name in ("rate", "arrival_scv", "service_scv"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")


def chance_to_wait(load: Load, servers: Floats, service_seconds: Floats) -> Floats:
    """Probability that a request finds all servers busy: 1 where they cannot keep up."""
    used = load.rate * service_seconds / servers
    return np.where(used < 1, np.minimum(used, 1) ** (np.sqrt(2 * (servers + 1)) - 1), 1.0)


def queueing_seconds(load: Load, servers: Floats, service_seconds: Floats) -> Floats:
    """Mean wait in a G/G/m queue; infinite where the servers cannot keep up.

    Args:
      load: what arrives.
      servers: m, requests served at once.
      service_seconds: mean time of one.
    """
    used = load.rate * service_seconds / servers
    variability = (load.arrival_scv + load.service_scv) / 2
    chance = chance_to_wait(load, servers, service_seconds)
    free = np.where(used < 1, 1 - used, 1.0)
    return np.where(used < 1, variability * chance * service_seconds / (servers * free), np.inf)


def waiting_percentile(load: Load, servers: Floats, service_seconds: Floats, percentile: float) -> Floats:
    """Wait that a share ``percentile`` (0 to 1) of requests stays below."""
    mean, chance = queueing_seconds(load, servers, service_seconds), chance_to_wait(load, servers, service_seconds)
    waits = chance > 1 - percentile
    return np.where(
        waits, np.log(np.where(waits, chance, 1.0) / (1 - percentile)) * mean / np.maximum(chance, 1e-300), 0.0
    )


@dataclass
class LoadEstimator:
    """Estimates the load from arrivals and finished requests, as they happen.

    The rate is an exponentially weighted count over SMOOTHING_SECONDS, corrected for the time before the first arrival;
    the coefficients of variation are those of the last WINDOW gaps and of the last WINDOW service times.
    """

    smoothing_seconds: float = SMOOTHING_SECONDS
    _started: float | None = None
    _last: float = 0.0
    _weight: float = 0.0
    _gaps: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    _services: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def arrived(self, now: float) -> None:
        """A request came at monotonic seconds ``now``, not before the one before it."""
        if self._started is None:
            self._started = now
        else:
            self._gaps.append(now - self._last)
            self._weight *= exp(-(now - self._last) / self.smoothing_seconds)
            self._weight += 1
        self._last = now

    def served(self, seconds: float) -> None:
        """A request was served for so long, waiting not counted."""
        self._services.append(seconds)

    def load(self, now: float) -> Load:
        """The estimate at monotonic seconds ``now``."""
        if self._started is None or now <= self._started:
            return Load(0.0)
        weight = self._weight * exp(-(now - self._last) / self.smoothing_seconds)
        seen = self.smoothing_seconds * (1 - exp(-(now - self._started) / self.smoothing_seconds))
        return Load(weight / seen, _scv(self._gaps), _scv(self._services))


def _scv(values: deque[float]) -> float:
    """Squared coefficient of variation; 1, a Poisson process's, while there are fewer than 8 values."""
    if len(values) < 8:
        return 1.0
    mean = sum(values) / len(values)
    if mean <= 0:
        return 1.0
    return sum((value - mean) ** 2 for value in values) / (len(values) - 1) / mean**2
