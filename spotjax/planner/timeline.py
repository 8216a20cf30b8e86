"""When each transfer of a migration runs, and when each stage has all it needs. An estimate; schedules nothing real."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from spotjax.meshes.instance import DeviceRef
from spotjax.meshes.shape import Position
from spotjax.planner.links import Link, Links
from spotjax.planner.plan import MigrationPlan, Phase, Transfer


@dataclass(frozen=True, slots=True)
class Timed:
    """A transfer with its estimated seconds from the start of its phase."""

    transfer: Transfer
    start: float
    end: float


def timeline(plan: MigrationPlan, links: Links) -> dict[Phase, list[Timed]]:
    """Transfers in the plan's order; each starts as soon as the links that it needs are free."""
    timed: dict[Phase, list[Timed]] = {phase: [] for phase in Phase}
    free: dict[tuple[Phase, Link], float] = defaultdict(float)
    for transfer in plan.transfers:
        needed = links.between(transfer.source, transfer.target)
        start = max(free[transfer.phase, link] for link in needed)
        end = start + max(links.seconds(link, transfer.bytes) for link in needed)
        for link in needed:
            free[transfer.phase, link] = end
        timed[transfer.phase].append(Timed(transfer, start, end))
    return timed


def stages_ready(
    timed: Mapping[Phase, list[Timed]], devices: Mapping[Position, DeviceRef]
) -> dict[tuple[int, int], float]:
    """Seconds after the stop at which each (replica, stage) has all it needs: front stages start before the others."""
    ready = {(position.data, position.stage): 0.0 for position in devices}
    stage_of = {device: (position.data, position.stage) for position, device in devices.items()}
    for entry in timed[Phase.FINAL]:
        stage = stage_of[entry.transfer.target]
        ready[stage] = max(ready[stage], entry.end)
    return ready
