"""What operators are told of a change of the mesh, as it goes on and when it is done. Decides nothing."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from spotjax.fleet.events import EventLog
from spotjax.fleet.status import Flow, Reconfiguration
from spotjax.meshes.placement import Placement
from spotjax.planner.migration import MigrationPlan
from spotjax.reshard.transfer import Preparation, Traffic


def flows_of(plan: MigrationPlan) -> tuple[Flow, ...]:
    """What a plan moves, by instances; the checkpoint comes first."""
    sizes: Counter[tuple[str, str]] = Counter()
    for transfer in plan.transfers:
        sizes[transfer.source.instance if transfer.source else "", transfer.target.instance] += transfer.bytes
    return tuple(Flow(source, target, size) for (source, target), size in sorted(sizes.items()))


def planned(events: EventLog, epoch: int, before: Placement | None, preparation: Preparation) -> None:
    """A change of the mesh was planned."""
    shape, plan = preparation.placement.shape, preparation.plan
    events.record(
        "plan",
        epoch,
        f"mesh {before.shape if before else 'none'} -> {shape}: {plan.bytes_in_place} bytes stay, "
        f"{plan.bytes_moved} move, {plan.bytes_loaded} are loaded",
        flows_of(plan),
        shape=str(shape),
        bytes_in_place=plan.bytes_in_place,
        bytes_moved=plan.bytes_moved,
        bytes_loaded=plan.bytes_loaded,
    )


def prepared(events: EventLog, epoch: int, loaded: Traffic, seconds: float) -> None:
    """Its parameters are in place."""
    events.record(
        "precopy",
        epoch,
        f"parameters in place after {seconds:.3f} s, {loaded.moved} bytes moved, {loaded.loaded} loaded",
        bytes_moved=loaded.moved,
        bytes_loaded=loaded.loaded,
        seconds=seconds,
    )


def switched(
    events: EventLog, report: Reconfiguration, kv: MigrationPlan, moved: int, precopied: int, carried: int
) -> None:
    """The new mesh decodes: so many bytes of KV moved after the stop and before; so many replicas never stopped."""
    assert report.after is not None, "there is a mesh after a switch"
    events.record(
        "switch",
        report.epoch,
        f"epoch {report.epoch}: mesh {report.after.shape}, paused {report.pause_seconds:.3f} s, {moved} bytes of KV "
        f"moved and {precopied} before, {report.requests_kept} sequences go on, {report.requests_recomputed} recompute",
        flows_of(kv),
        shape=str(report.after.shape),
        pause_seconds=report.pause_seconds,
        kv_bytes_moved=moved,
        kv_bytes_precopied=precopied,
        kept=report.requests_kept,
        recomputed=report.requests_recomputed,
        replicas_undisturbed=carried,
    )


def unchanged(epoch: int, preparation: Preparation, running: int) -> Reconfiguration:
    """The mesh fits as it is."""
    placement = replace(preparation.placement, epoch=epoch)
    return Reconfiguration(epoch, placement, placement, preparation.plan.bytes_in_place, 0, 0, 0.0, 0.0, running, 0)
