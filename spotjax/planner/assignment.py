"""Maximum-weight assignment with deterministic ties: the most weight, then the shortest longest time, then order.

The maximum is found with the shortest augmenting paths of Crouse (2016), as SciPy has them. Knows no devices.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
from numpy.typing import NDArray

Weights = NDArray[np.int64]
"""Whole bytes, exact in doubles up to 2**53; rows are assigned to columns."""

Seconds = NDArray[np.float64]
"""How long each row would take on each column."""

BOTTLENECK_ROUNDS = 12
"""Halvings in the search for the shortest longest time among all assignments of the greatest weight."""


def assign(weights: Weights, seconds: Seconds | None = None) -> list[int]:
    """A column for every row, all different, of the greatest total weight; columns are at least as many as rows.

    Among those, one whose slowest row takes the least time (found by bisection, so up to a 4096th of the range).
    Columns that are equal for all rows are taken from the left, and rows that are equal for all columns have theirs in
    order, so that ties keep order.
    """
    if not len(weights):
        return []
    chosen = heaviest_pairs(weights)[1]
    if seconds is not None:
        chosen = _shorten(weights, seconds, chosen)
    keys = weights if seconds is None else np.concatenate([weights, seconds.view(np.int64)])
    for columns in _equal_rows(keys.T):
        takers = np.flatnonzero(np.isin(chosen, columns))
        chosen[takers] = columns[: len(takers)]
    keys = weights if seconds is None else np.concatenate([weights, seconds.view(np.int64)], axis=1)
    for alike in _equal_rows(keys):
        chosen[alike] = np.sort(chosen[alike])
    return [int(column) for column in chosen]


def heaviest_pairs(weights: Weights) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Rows and their columns, no column twice, of the greatest total weight."""
    from scipy.optimize import linear_sum_assignment  # a third of a second that processes that never plan do without

    rows, columns = linear_sum_assignment(weights, maximize=True)
    return rows, columns


def _shorten(weights: Weights, seconds: Seconds, chosen: NDArray[np.intp]) -> NDArray[np.intp]:
    """An assignment of the same weight whose longest time is as short as bisection finds it."""
    rows = np.arange(len(weights))
    most = weights[rows, chosen].sum()
    longest = seconds[rows, chosen].max()
    least = seconds.min(axis=1).max()
    for _ in range(BOTTLENECK_ROUNDS):
        if longest <= least * (1 + 1e-9):
            break
        allowed = (least + longest) / 2
        # Forbidden pairs cost more than all weight together, so they are chosen only where nothing else is left.
        barred = np.where(seconds <= allowed, weights, weights - (most + 1))
        found = heaviest_pairs(barred)[1]
        if barred[rows, found].sum() == most:
            chosen, longest = found, seconds[rows, found].max()
        else:
            least = allowed
    return chosen


def _equal_rows(table: NDArray[np.int64]) -> list[NDArray[np.intp]]:
    """Indices of the rows that have an equal, a group at a time."""
    groups: dict[bytes, list[int]] = defaultdict(list)
    for index, row in enumerate(np.ascontiguousarray(table)):
        groups[row.tobytes()].append(index)
    return [np.array(group) for group in groups.values() if len(group) > 1]
