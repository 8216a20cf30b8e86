"""Plans what has to move: a source for every needed slice that is not in place. Carries nothing out.

Every missing box is cut where its holders differ (``missing``), each part gets a holder to come from (``sources``), and
parts are put in order: parameters first, which move while decoding goes on, then KV, each with the front layers first.
KV pages that are full may move early too.
A bound on memory (``memory``) puts some parameters off until after the stop.
In-place slices never move.
"""

from __future__ import annotations

from collections.abc import Mapping

from spotjax.errors import PlanError
from spotjax.meshes.instance import DeviceRef
from spotjax.planner.holdings import Holdings
from spotjax.planner.kv_cohorts import cohort_of
from spotjax.planner.links import Direction, Link, Links
from spotjax.planner.memory import within_memory
from spotjax.planner.missing import Gaps, Part, order, split, with_full_pages_early
from spotjax.planner.needs import Needs, StackedNeeds
from spotjax.planner.plan import MigrationPlan, Phase, SliceMove, Transfer
from spotjax.planner.sources import choose_sources, lower_bound

__all__ = [
    "TRANSFERS",
    "Direction",
    "Link",
    "Links",
    "MigrationPlan",
    "Phase",
    "SliceMove",
    "Transfer",
    "plan_migration",
]

TRANSFERS = 8192
"""Up to so many parts are cut finer, down to single arrays, to share them out evenly. Fewer are planned faster."""


def plan_migration(
    needs: Mapping[DeviceRef, Needs],
    holdings: Holdings,
    links: Links,
    room: Mapping[DeviceRef, int] | None = None,
    full_pages: Mapping[str, int] | None = None,
    transfers: int = TRANSFERS,
) -> MigrationPlan:
    """Finds a source for everything that the target devices need and do not have.

    Args:
      needs: what every device of the new mesh must have.
      holdings: what every device has now.
      links: bandwidths of the instances that hold or need something.
      room: free bytes of every target device; None plans as if there were enough. See ``memory``.
      full_pages: by cohort, KV pages that decoding no longer writes to (``KvCohort.full_pages``): they move before the
        stop. None leaves all KV for after it.
      transfers: parts are cut down to single arrays while there are fewer than so many, else to runs of layers.

    Raises:
      PlanError: a target stands on a dying or gone instance, or the type of an instance is not given.
    """
    for target in needs:
        if target.instance in holdings.dying or target.instance in holdings.gone:
            raise PlanError(f"device {target} cannot be a target: its instance is going or gone; match without it")
    wanted = {target: StackedNeeds.of(arrays) for target, arrays in needs.items()}
    gaps = Gaps(holdings)
    missing = list(gaps.parts(wanted))
    nowhere = {_cohort(part) for part in missing if not gaps.holders[part.holders]}
    lost = frozenset(cohort for cohort in nowhere if cohort is not None)
    kept = [part for part in missing if _cohort(part) not in lost]
    if full_pages:
        kept = [one for part in kept for one in with_full_pages_early(part, full_pages)]
    parts = sorted(split(kept, transfers), key=order)
    chosen, link_seconds = choose_sources(parts, gaps.holders, holdings, links)
    moving = sum(part.bytes for part in parts)
    loaded = sum(transfer.bytes for transfer in chosen if transfer.source is None)
    plan = MigrationPlan(
        transfers=tuple(chosen),
        lost=tuple(sorted(lost)),
        bytes_in_place=_bytes_needed(wanted, lost, holdings) - moving,
        bytes_moved=moving - loaded,
        bytes_loaded=loaded,
        link_seconds=link_seconds,
        lower_bound_seconds={
            phase: lower_bound([part for part in parts if part.phase is phase], gaps.holders, links) for phase in Phase
        },
    )
    return plan if room is None else within_memory(plan, wanted, holdings, room, links)


def _bytes_needed(needs: Mapping[DeviceRef, StackedNeeds], lost: frozenset[str], holdings: Holdings) -> int:
    """Everything that all devices need, KV of lost cohorts not counted."""
    shared: dict[int, int] = {}
    total = 0
    for wanted in needs.values():
        key = id(wanted.parameters)
        if key not in shared:
            shared[key] = holdings.bytes_of(wanted.parameters.items())
        total += shared[key]
        total += holdings.bytes_of(item for item in wanted.kv.items() if cohort_of(item[0]) not in lost)
    return total


def _cohort(part: Part) -> str | None:
    return cohort_of(part.pieces[0].name)
