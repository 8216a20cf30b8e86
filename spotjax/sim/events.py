"""The clock of a simulation: what happens when, in order of time. Knows nothing of what happens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from itertools import count
from math import inf
from typing import Any


class EventQueue:
    """Calls functions at their simulated times.

    Events of the same time are called in the order in which they were announced. There is no way to take one back: its
    owner ignores it if it came to nothing.

    Attributes:
      now: simulated seconds since the start.
    """

    __slots__ = ("_heap", "_numbers", "now")

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._numbers = count()

    def at(self, seconds: float, function: Callable[..., None], *args: Any) -> None:
        """Calls ``function(*args)`` at a time, which must not have passed; at once if it is now."""
        heappush(self._heap, (max(seconds, self.now), next(self._numbers), function, args))

    def run(self, until: float, arrivals: Sequence[float], arrived: Callable[[int], None]) -> None:
        """Lets everything happen up to a time, that time included.

        Args:
          until: seconds.
          arrivals: times at which requests come, in order; a list apart, because there are most of these.
          arrived: called with the number of each.
        """
        heap, number, total = self._heap, 0, len(arrivals)
        coming = arrivals[0] if total else inf
        while True:
            if heap and heap[0][0] <= coming:
                if heap[0][0] > until:
                    break
                self.now, _, function, args = heappop(heap)
                function(*args)
            elif coming <= until:
                self.now = coming
                arrived(number)
                number += 1
                coming = arrivals[number] if number < total else inf
            else:
                break
        self.now = until
