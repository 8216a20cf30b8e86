"""How long the copying of a simulated change takes, and what of it is done when it is cut short. Plans nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping

from spotjax.fleet.change import KvChange
from spotjax.meshes.instance import DeviceRef
from spotjax.meshes.slices import Index
from spotjax.meshes.stacks import arrays_in
from spotjax.planner.kv_cohorts import cohort_of
from spotjax.planner.links import Link, Links
from spotjax.planner.migration import MigrationPlan, Phase
from spotjax.planner.timeline import timeline


def kv_seconds(kv: KvChange, shares: Mapping[str, float], links: Links) -> float:
    """Until the busiest link has carried KV.

    Args:
      kv: where all of it would go.
      shares: by cohort, how much of its KV moves; none of those that are not named.
      links: bandwidths.
    """
    busy: dict[Link, float] = defaultdict(float)
    for transfer in kv.plan.transfers:
        share = shares.get(cohort_of(transfer.pieces[0].name) or "", 0.0)
        if share:
            for link in links.between(transfer.source, transfer.target):
                busy[link] += links.seconds(link, transfer.bytes) * share
    return max(busy.values(), default=0.0)


def received(
    plan: MigrationPlan, links: Links, seconds: float, placed: Collection[DeviceRef]
) -> dict[DeviceRef, dict[str, Index]]:
    """Arrays of parameters that devices outside of the mesh got in so many seconds of the copying before the stop."""
    got: dict[DeviceRef, dict[str, Index]] = defaultdict(dict)
    for timed in timeline(plan, links)[Phase.PRECOPY]:
        if timed.end <= seconds and timed.transfer.target not in placed:
            for piece in timed.transfer.pieces:
                got[timed.transfer.target].update(arrays_in(piece))
    return dict(got)


def sources(plan: MigrationPlan) -> frozenset[str]:
    """Instances that send."""
    return frozenset(transfer.source.instance for transfer in plan.transfers if transfer.source is not None)
