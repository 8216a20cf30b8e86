"""Numbers over seeds: how well a mean is known, and how much better one system is than another on the same seeds.

Intervals are Student's t: seeds are few and independent. Ratios are geometric means of pairs, so that "twice as fast"
and "half as fast" weigh the same and swapping the systems gives the reciprocal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, inf, log

import numpy as np
from scipy.special import stdtrit

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and where the true one lies with some confidence.

    Attributes:
      mean: of the values.
      low, high: the interval; None of a single value, which tells nothing about others.
      count: values.
    """

    mean: float
    low: float | None
    high: float | None
    count: int


def mean_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Mean of independent values with its interval of Student's t.

    Raises:
      ValueError: there are no values, one is not finite, or confidence is not between 0 and 1.
    """
    if not len(values) or not np.isfinite(values).all():
        raise ValueError(f"a mean needs finite values, got {list(values)}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    count, mean = len(values), float(np.mean(values))
    if count == 1:
        return Interval(mean, None, None, 1)
    half = float(stdtrit(count - 1, (1 + confidence) / 2) * np.std(values, ddof=1) / count**0.5)
    return Interval(mean, mean - half, mean + half, count)


def paired_ratio(ours: Sequence[float], theirs: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Geometric mean of ``theirs / ours``, seed by seed: how many times ours is lower.

    Raises:
      ValueError: the two differ in length, or a value is not positive and finite.
    """
    if len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} values cannot be paired with {len(theirs)}")
    if not all(0 < value < inf for value in (*ours, *theirs)):
        raise ValueError("ratios need positive, finite values")
    logs = mean_interval([log(other / own) for own, other in zip(ours, theirs, strict=True)], confidence)
    low, high = (None if end is None else exp(end) for end in (logs.low, logs.high))
    return Interval(exp(logs.mean), low, high, logs.count)
