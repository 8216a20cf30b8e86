"""How a quantity is spread over requests: mean and percentiles, ours and those of SpotServe's artifact."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Seconds = NDArray[np.float64]

PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True)
class Distribution:
    """How one quantity is spread over requests; in the quantity's unit.

    Attributes:
      mean: average.
      p50, p90, p95, p99: percentiles.
      largest: the worst.
    """

    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    largest: float

    @classmethod
    def of(cls, values: Seconds) -> Distribution | None:
        """With percentiles interpolated linearly between the two nearest values; None of nothing."""
        if not len(values):
            return None
        p50, p90, p95, p99 = np.percentile(values, PERCENTILES).tolist()
        return cls(float(values.mean()), p50, p90, p95, p99, float(values.max()))

    @classmethod
    def as_published(cls, values: Seconds) -> Distribution | None:
        """The same with the percentiles of SpotServe's artifact, see ``published_percentile``."""
        if not len(values):
            return None
        p50, p90, p95, p99 = (published_percentile(values, share / 100) for share in PERCENTILES)
        return cls(float(values.mean()), p50, p90, p95, p99, float(values.max()))


def published_percentile(values: Seconds, share: float) -> float:
    """The value at index ``int(share * n)`` of the sorted ones, as SpotServe's artifact takes it.

    Raises:
      ValueError: there are no values, or the share is not from 0 up to but without 1.
    """
    if not len(values) or not 0 <= share < 1:
        raise ValueError(f"a share in [0, 1) of at least one value is needed, got {share} of {len(values)}")
    index = int(share * len(values))
    return float(np.partition(values, index)[index])
