"""Which replica the next request goes to: the rule of ``fleet.dispatch.Dispatcher``, fast for hundreds of replicas."""

from __future__ import annotations


def least_loaded(loads: list[int]) -> int:
    """Place of the replica with the fewest sequences that wait or run, the first of equals.

    Two passes in C: about 3 us for 200 replicas, which is less than keeping any structure up to date.

    Raises:
      ValueError: there is none.
    """
    return loads.index(min(loads))
