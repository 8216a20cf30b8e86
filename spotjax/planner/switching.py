"""Whether a better mesh is worth the pause that changing to it takes. Decides between two, chooses neither."""

from __future__ import annotations

from spotjax.planner.goal import Goal, Running
from spotjax.planner.options import Options


def pays_back(table: Options, current: int, better: int, goal: Goal, running: Running) -> bool:
    """Whether changing from one row of the table to another gains more until the next change than it costs.

    Both are counted in request-seconds of waiting. The change stalls the requests that run (rate x time of service, by
    Little's law) and delays those that come meanwhile. It gains the difference in latency for all that come before the
    horizon; under overload, the backlog that builds up at the one and not at the other. Without a load, both are
    counted in tokens: those not decoded during the stall against those decoded more afterwards.
    """
    if table.shape(current) == table.shape(better):
        return False
    stall, horizon = running.stall_seconds, running.horizon_seconds
    left = max(0.0, horizon - stall)
    if goal.load is None:
        return bool((table.tokens[better] - table.tokens[current]) * left > table.tokens[current] * stall)
    rate = goal.load.rate
    price = stall * (rate * table.service[current] + rate * stall / 2)
    backlog = (min(rate, table.rate[better]) - min(rate, table.rate[current])) * left**2 / 2
    finite = table.seconds[better] < float("inf") and table.seconds[current] < float("inf")
    if finite and table.seconds[better] > table.seconds[current] * (1 - running.least_gain):
        return False
    gain = rate * (table.seconds[current] - table.seconds[better]) * left if finite else backlog
    return bool(gain > price)
