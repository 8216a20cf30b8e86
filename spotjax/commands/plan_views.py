"""What a plan looks like to people: configurations, mesh, migration and its timeline."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from math import inf

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from spotjax.commands.output import shown_bytes
from spotjax.commands.plan import Study
from spotjax.meshes.instance import InstanceState
from spotjax.meshes.shape import Position
from spotjax.planner.optimizer import Candidate
from spotjax.planner.plan import Phase
from spotjax.planner.timeline import stages_ready, timeline

BAR = 48
"""Characters of the timeline."""
LINKS_SHOWN = 16
TARGETS_SHOWN = 24


def study_view(study: Study) -> RenderableType:
    """Everything."""
    parameters = shown_bytes(study.spec.parameter_bytes)
    ready = sum(instance.state is InstanceState.READY for instance in study.instances)
    headline = f"[bold]{escape(study.model)}[/bold]  {parameters} of parameters  {ready} instances  ({study.latencies})"
    return Group(headline, *configurations(study), *instance_delta(study), mesh(study), *migration(study))


def configurations(study: Study) -> Iterator[RenderableType]:
    """The chosen configuration and those that lost, and why."""
    table = Table(title="configurations (DxPxM: replicas x stages x tensor degree)", title_justify="left")
    for heading in ("DxPxM", "B", "req/s", "tokens/s", "latency", "with wait", "p99", "USD/h", "GiB"):
        table.add_column(heading, justify="right", no_wrap=True)
    candidates = [study.decision, *study.decision.runner_ups]
    for candidate in candidates:
        table.add_row(*_row(candidate), style="green" if candidate is study.decision else "")
    yield table
    yield f"[green]{study.decision.shape}[/green] is chosen: {study.decision.reason}"
    for loser in study.decision.runner_ups:
        yield f"{loser.shape}: {loser.reason}"
    used = {device.instance for device in study.placement.devices.values()}
    idle = [i.name for i in study.instances if i.state is InstanceState.READY and i.name not in used]
    if idle:
        yield f"not needed: {', '.join(idle)}"


def instance_delta(study: Study) -> Iterator[str]:
    """What to request or to release for the load."""
    capacity = study.capacity
    if capacity is None:
        return
    target, offered = capacity.target, study.instances[0].type.name
    delta = []
    if capacity.request_spot:
        delta.append(
            f"request {capacity.request_spot} x {offered} as spot and {capacity.request_on_demand} on demand at once, "
            f"for {target.shape} on {target.instances} instances: {target.reason}"
        )
    if capacity.release:
        delta.append(f"release {', '.join(capacity.release)}")
    if capacity.spares:
        delta.append(f"keep {capacity.spares} as {'spare' if capacity.spares == 1 else 'spares'}")
    yield f"[bold]instance delta:[/bold] {'; '.join(delta) or 'none, all are in use and enough'}"


def _row(candidate: Candidate) -> list[str]:
    return [
        str(candidate.shape),
        str(candidate.batch),
        f"{candidate.rate:.3g}",
        f"{candidate.throughput:.3g}",
        _seconds(candidate.latency),
        _seconds(candidate.seconds),
        _seconds(candidate.percentile_seconds),
        f"{candidate.cost_per_hour:.2f}",
        f"{candidate.memory.total / 2**30:.1f}",
    ]


def _seconds(seconds: float) -> str:
    return "never" if seconds == inf else f"{seconds:.3g} s"


def mesh(study: Study) -> Table:
    """Which device serves which position, and how much of what it needs it has already."""
    placement = study.placement
    table = Table(title=f"mesh {placement.shape}: device, share of its bytes in place", title_justify="left")
    table.add_column("replica")
    for stage, (start, stop) in enumerate(placement.layers):
        table.add_column(f"stage {stage}: layers {start}-{stop - 1}")
    for data in range(placement.shape.data):
        cells = []
        for stage in range(placement.shape.stage):
            positions = [Position(data, stage, tensor) for tensor in range(placement.shape.tensor)]
            cells.append("\n".join(_cell(study, position) for position in positions))
        table.add_row(str(data), *cells)
    return table


def _cell(study: Study, position: Position) -> str:
    kept, needed = study.kept_bytes[position]
    share = kept / needed
    colour = "green" if share > 0.99 else "yellow" if share > 0 else "red"
    return f"{study.placement.devices[position]} [{colour}]{100 * share:.0f}%[/{colour}]"


def migration(study: Study) -> Iterator[RenderableType]:
    """What every instance gets from where, totals, and when links are busy."""
    plan = study.plan
    table = Table(title="migration", title_justify="left")
    for heading in ("instance", "before the stop", "after it", "from"):
        table.add_column(heading, justify="right" if heading.endswith(("stop", "it")) else "left")
    sizes: dict[str, dict[Phase, int]] = defaultdict(lambda: dict.fromkeys(Phase, 0))
    senders: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for transfer in plan.transfers:
        sizes[transfer.target.instance][transfer.phase] += transfer.bytes
        source = "checkpoint" if transfer.source is None else transfer.source.instance
        senders[transfer.target.instance][source] += transfer.bytes
    for instance in list(sizes)[:TARGETS_SHOWN]:
        most = sorted(senders[instance].items(), key=lambda item: (-item[1], item[0]))
        shown = ", ".join(f"{name} {shown_bytes(size)}" for name, size in most[:4])
        more = f" and {len(most) - 4} more" if len(most) > 4 else ""
        before, after = (shown_bytes(sizes[instance][phase]) for phase in Phase)
        table.add_row(instance, before, after, shown + more)
    if sizes:
        yield table
        yield from _timeline(study)
    yield (
        f"{shown_bytes(plan.bytes_in_place)} stay in place, {shown_bytes(plan.bytes_moved)} move, "
        f"{shown_bytes(plan.bytes_loaded)} come from the checkpoint; {study.kept} running sequences keep their KV, "
        f"{study.recomputed} compute it again"
    )
    bounds = plan.lower_bound_seconds
    yield (
        f"while decoding goes on {plan.seconds(Phase.PRECOPY):.3g} s (at least {bounds[Phase.PRECOPY]:.3g} s), "
        f"pause {plan.seconds(Phase.FINAL):.3g} s (at least {bounds[Phase.FINAL]:.3g} s)"
    )


def _timeline(study: Study) -> Iterator[RenderableType]:
    """Busy times of the links, both phases one after the other, and when stages are ready."""
    plan, timed = study.plan, timeline(study.plan, study.links)
    ends = {phase: max((entry.end for entry in entries), default=0.0) for phase, entries in timed.items()}
    total = sum(ends.values())
    start = {Phase.PRECOPY: 0.0, Phase.FINAL: ends[Phase.PRECOPY]}
    busy: dict[str, list[tuple[float, float, Phase]]] = defaultdict(list)
    for phase, entries in timed.items():
        for entry in entries:
            for link in study.links.between(entry.transfer.source, entry.transfer.target):
                name = f"{link.instance} {link.direction}"
                busy[name].append((start[phase] + entry.start, start[phase] + entry.end, phase))
    table = Table(title=f"timeline, {total:.3g} s", title_justify="left", show_lines=False)
    table.add_column("link")
    table.add_column("[cyan]parameters while decoding[/cyan], then [magenta]after the stop[/magenta]", no_wrap=True)
    longest = sorted(busy, key=lambda name: -sum(end - begin for begin, end, _ in busy[name]))
    for name in longest[:LINKS_SHOWN]:
        table.add_row(name, _bar(busy[name], total))
    yield table
    if len(longest) > LINKS_SHOWN:
        yield f"... and {len(longest) - LINKS_SHOWN} links that are less busy"
    if plan.seconds(Phase.FINAL):
        ready = stages_ready(timed, study.placement.devices)
        by_stage: dict[int, float] = defaultdict(float)
        for (_, stage), seconds in ready.items():
            by_stage[stage] = max(by_stage[stage], seconds)
        yield "ready after the stop: " + ", ".join(f"stage {s} {seconds:.3g} s" for s, seconds in by_stage.items())


def _bar(entries: list[tuple[float, float, Phase]], total: float) -> str:
    cells = [" "] * BAR
    for begin, end, phase in entries:
        colour = "cyan" if phase is Phase.PRECOPY else "magenta"
        for cell in range(int(begin / total * BAR), min(BAR, int(end / total * BAR) + 1)):
            cells[cell] = f"[{colour}]█[/{colour}]"
    return "".join(cells)
