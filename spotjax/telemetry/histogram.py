"""A histogram of plain numbers, for one thread: a tenth of what prometheus_client's, with its locks, would take."""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate


class Histogram:
    """Counts by bucket.

    Args:
      bounds: upper bounds of the buckets, rising; what is above the last has a bucket of its own.

    Attributes:
      sum: of all values.
    """

    __slots__ = ("_bounds", "_counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds, self._counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """Adds a value so many times."""
        self._counts[bisect_left(self._bounds, value)] += count
        self.sum += value * count

    @property
    def count(self) -> int:
        """Values that were added."""
        return sum(self._counts)

    def buckets(self) -> list[tuple[str, float]]:
        """(Upper bound as text, values up to it), the last bound ``+Inf``, as ``HistogramMetricFamily`` takes them."""
        bounds = [*(repr(float(bound)) for bound in self._bounds), "+Inf"]
        return list(zip(bounds, map(float, accumulate(self._counts)), strict=True))
