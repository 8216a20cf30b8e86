"""What the state of the fleet looks like to people."""

from __future__ import annotations

import time

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from spotjax.commands.capacity_views import capacity_view
from spotjax.commands.output import shown_bytes
from spotjax.fleet.notices.intervals import NoticeRecord
from spotjax.fleet.status import FleetEvent, FleetStatus, Reconfiguration, ReplicaStatus
from spotjax.meshes.instance import InstanceState
from spotjax.meshes.placement import Placement

COLOURS = {
    InstanceState.JOINING: "cyan",
    InstanceState.READY: "green",
    InstanceState.NOTICED: "yellow",
    InstanceState.DRAINING: "yellow",
    InstanceState.GONE: "red",
}


def status_view(status: FleetStatus) -> RenderableType:
    """Headline, instances, mesh and load."""
    state = "draining" if status.draining else "ready" if status.ready else "not ready"
    headline = f"[bold]{escape(status.model)}[/bold]  {state}  up {status.uptime_seconds:.0f} s"
    requests = (
        f"requests: {status.requests_running} running, {status.queued} queued, {status.requests_finished} finished   "
        f"tokens: {status.tokens_committed}   reconfigurations: {status.reconfigurations}"
    )
    rented = [capacity_view(status.capacity)] if status.capacity is not None else []
    notices = map(notices_line, status.notices)
    return Group(headline, instances_table(status), *mesh_tables(status), requests, *notices, *rented)


def notices_line(record: NoticeRecord) -> str:
    """``notices of gce: 3 given, 2 left in time, 1 taken after 12.1 s``."""
    parts = [f"{record.given} given"]
    if record.withdrawn:
        parts.append(f"{record.withdrawn} withdrawn")
    if record.left:
        parts.append(f"{record.left} left in time")
    if record.taken:
        shortest, longest = f"{record.shortest_seconds:.1f}", f"{record.longest_seconds:.1f}"
        parts.append(f"{record.taken} taken after {shortest if shortest == longest else f'{shortest} to {longest}'} s")
    return f"notices of {escape(record.source)}: {', '.join(parts)}"


def instances_table(status: FleetStatus) -> Table:
    """One row for each instance; where it is and what it is rented as only if that is known of any.

    Which positions its devices have is in the table of the mesh.
    """
    machines = any(instance.zone or instance.address for instance in status.instances)
    table = Table(title="instances", title_justify="left")
    for heading in ("name", "type", "state", "devices", "in use"):
        table.add_column(heading, no_wrap=heading in ("name", "state"))
    for heading in ("zone", "price", "address") if machines else ():
        table.add_column(heading)
    for instance in status.instances:
        colour = COLOURS[instance.state]
        state = f"[{colour}]{instance.state}[/{colour}]"
        if instance.advised and instance.state is InstanceState.READY:
            state += " [yellow](advised)[/yellow]"
        machine = (instance.zone, instance.price_class.replace("_", "-"), instance.address) if machines else ()
        table.add_row(
            *map(escape, (instance.name, instance.type)),
            state,
            str(instance.devices),
            str(len(instance.positions)),
            *map(escape, machine),
        )
    return table


def mesh_tables(status: FleetStatus) -> list[RenderableType]:
    """The mesh as a grid, replicas down and stages across, with the load of every replica."""
    if status.placement is None:
        return ["no mesh: too few instances are alive for one replica"]
    placement = status.placement
    title = f"mesh {placement.shape} (data x stage x tensor), epoch {placement.epoch}"
    table = Table(title=title, title_justify="left")
    table.add_column("replica")
    for stage, (start, stop) in enumerate(placement.layers):
        table.add_column(f"stage {stage}\nlayers {start}-{stop - 1}")
    for heading in ("running", "waiting", "KV pages"):
        table.add_column(heading, justify="right")
    loads = {replica.data: replica for replica in status.replicas}
    for data in range(placement.shape.data):
        load = loads.get(data)
        shown = load_cells(load) if load else ("",) * 3
        table.add_row(
            str(data), *(devices_of(placement, data, stage) for stage in range(placement.shape.stage)), *shown
        )
    return [table]


def load_cells(load: ReplicaStatus) -> tuple[str, ...]:
    """Sequences, and KV pages; of the prefix cache its pages and the share of prompts' positions that it had."""
    pages = f"{load.pages_used}/{load.pages_total}"
    if load.pages_cached:
        pages += f"\n{load.pages_cached} cached"
    if load.tokens_reused:
        pages += f"\n{load.tokens_reused / (load.tokens_reused + load.tokens_prefilled):.0%} hits"
    return str(load.running), str(load.waiting), pages


def devices_of(placement: Placement, data: int, stage: int) -> str:
    """``i-0/0 i-0/1``."""
    return " ".join(map(str, placement.group(data, stage)))


def event_line(event: FleetEvent) -> str:
    """``12:00:00 epoch 2 lost instance-1: ...`` in local time."""
    when = time.strftime("%H:%M:%S", time.localtime(event.time))
    instance = f" {event.fields['instance']}" if "instance" in event.fields else ""
    return f"{when} epoch {event.epoch} {event.kind}{instance}: {event.message}"


def reconfiguration_text(report: Reconfiguration) -> str:
    """What a change of the mesh did, in three lines."""
    before, after = (placement.shape if placement else "no mesh" for placement in (report.before, report.after))
    return (
        f"mesh {before} -> {after}, epoch {report.epoch}\n"
        f"{shown_bytes(report.bytes_in_place)} stayed in place, {shown_bytes(report.bytes_moved)} moved, "
        f"{shown_bytes(report.bytes_loaded)} loaded; {report.requests_kept} running sequences kept their KV, "
        f"{report.requests_recomputed} recompute it\n"
        f"paused for {report.pause_seconds:.3f} s after {report.precopy_seconds:.3f} s of copying during decoding"
    )
