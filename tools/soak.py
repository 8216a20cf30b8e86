"""Hundreds of events under load: ``python -m spotjax.tools.soak``.

Starts a controller and workers as processes on this machine, keeps requests of all kinds running, and kills, freezes,
cuts off, announces and brings back instances, drawn by seed. Every output is compared with the undisturbed one; at the
end nothing may be left: no KV page, file, socket, thread, process, and no growing memory. Exits 1 if a promise was
broken, after printing the seed and what happened. ``--embedded`` does what can be done to a server in one process.
``--controller`` also kills the controller, freezes it, fills its disk, and lets clients wait for it; ``--controller
only`` does nothing else to speak of. What the commit log has in the end is compared with what clients saw.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from spotjax.tools.chaos import STRIKES, Chaos, possible
from spotjax.tools.chaos_run import Report, run
from spotjax.tools.chaos_schedule import KINDS, Event, schedule
from spotjax.tools.load import Load
from spotjax.tools.local_fleet import EmbeddedService, LocalFleet
from spotjax.tools.namespaces import Network, NetworkUnavailable
from spotjax.tools.service import Service, running
from spotjax.tools.small_disk import DiskUnavailable, SmallDisk

console = Console(highlight=False)
PATIENCE_SECONDS = 120.0


def service_of(
    arguments: argparse.Namespace, directory: Path, network: Network | None, disk: SmallDisk | None
) -> Service:
    """The service that the arguments ask for, not started yet."""
    names = [f"instance-{number}" for number in range(arguments.instances)]
    machine = ("--devices-per-instance", str(arguments.devices_per_instance))
    if arguments.embedded:
        flags = ("--model", arguments.model, "--instances", str(arguments.instances), *machine)
        return EmbeddedService(directory, flags, names)
    patience = PATIENCE_SECONDS if arguments.controller else 0.0
    return LocalFleet(directory, names, ("--model", arguments.model), machine, network, patience=patience, disk=disk)


def events_of(arguments: argparse.Namespace, service: Service) -> Sequence[Event]:
    """As many events as are wanted, without end if only the time is bounded."""
    count = arguments.events if arguments.minutes is None else max(arguments.events, round(60 * arguments.minutes))
    kinds = possible(service)
    if arguments.controller == "only":
        kinds = [kind for kind in kinds if KINDS[kind].needs in STRIKES]
    return schedule(arguments.seed, count, service.names, kinds)


async def soak(arguments: argparse.Namespace) -> Report:
    """Runs it, with a progress bar."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    deadline = time.monotonic() + 60 * (arguments.minutes or float("inf"))
    with contextlib.ExitStack() as stack:
        directory = arguments.logs or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="spotjax-soak-")))
        network = None
        if not arguments.embedded:
            try:
                network = stack.enter_context(Network())
            except NetworkUnavailable as problem:
                console.print(f"[yellow]connections are not cut: {escape(str(problem))}[/yellow]")
        disk = None
        if arguments.controller:
            try:
                disk = stack.enter_context(SmallDisk(directory / "disk"))
            except DiskUnavailable as problem:
                console.print(f"[yellow]no disk is filled: {escape(str(problem))}[/yellow]")
        service = service_of(arguments, directory, network, disk)
        async with running(service):
            events = events_of(arguments, service)
            bar = stack.enter_context(Progress(*columns, console=console))
            task = bar.add_task("soak", total=len(events))

            def progress(load: Load, chaos: Chaos, event: Event) -> bool:
                bar.update(task, advance=1, description=f"{load.finished} requests, {load.tokens} tokens")
                bar.console.print(f"[dim]{escape(str(event))}[/dim]")
                return time.monotonic() < deadline

            report = await run(service, arguments.seed, events, arguments.clients, progress=progress)
            if arguments.logs:
                (directory / "history.txt").write_text(service.story(len(service.history)) + "\n")
            return report


def summary(report: Report) -> Table:
    """Events by kind and the pauses that they made."""
    table = Table(title=f"seed {report.seed}, median step {1e3 * report.step:.1f} ms")
    for heading in ("event", "count", "median pause s", "longest pause s"):
        table.add_column(heading, justify="left" if heading == "event" else "right")
    for kind in sorted({outcome.event.kind for outcome in report.outcomes}):
        gaps = sorted(outcome.gap for outcome in report.outcomes if outcome.event.kind == kind)
        table.add_row(kind, str(len(gaps)), f"{gaps[len(gaps) // 2]:.3f}", f"{gaps[-1]:.3f}")
    return table


def restarted(report: Report) -> Table:
    """How long clients of a controller that died waited, and whose KV was still there."""
    found = report.restarts
    told = [restart for restart in found if restart.sequences is not None]
    sequences = sum(restart.sequences or 0 for restart in told)
    kept = sum(restart.kept for restart in told)
    title = (
        f"{len(found)} outages, {sequences} sequences went on, {kept} of them with KV, {sequences - kept} computed anew"
    )
    table = Table(title=title)
    for heading in ("seconds to the first token", "median", "longest"):
        table.add_column(heading, justify="left" if heading.startswith("seconds") else "right")
    for name, seconds in (
        ("after the death", sorted(restart.after_death for restart in found)),
        ("after the start", sorted(restart.after_start for restart in found)),
    ):
        if seconds:
            table.add_row(name, f"{seconds[len(seconds) // 2]:.2f}", f"{seconds[-1]:.2f}")
    return table


def usage(report: Report) -> Table:
    """What processes held before and after."""
    table = Table(title="held before the first event and after the last request")
    for heading in ("process", "files", "sockets", "threads", "MiB"):
        table.add_column(heading, justify="left" if heading == "process" else "right")
    for name, (before, after) in report.usage.items():
        pairs = [(before.files, after.files), (before.sockets, after.sockets), (before.threads, after.threads)]
        shown = [*pairs, (before.memory >> 20, after.memory >> 20)]
        table.add_row(name, *(f"{a} -> {b}" for a, b in shown))
    return table


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--instances", type=int, default=4)
    parser.add_argument("--devices-per-instance", type=int, default=2)
    parser.add_argument("--events", type=int, default=300)
    parser.add_argument("--minutes", type=float, help="stop after so long, with as many events as fit")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clients", type=int, default=8, help="requests at once")
    parser.add_argument("--embedded", action="store_true", help="a server in one process instead")
    parser.add_argument(
        "--controller", nargs="?", const="too", choices=("too", "only"), help="kill the controller, too"
    )
    parser.add_argument("--logs", type=Path, help="directory to keep all logs in")
    arguments = parser.parse_args()
    report = asyncio.run(soak(arguments))
    console.print(summary(report), usage(report), *([restarted(report)] if report.restarts else []))
    console.print(escape(str(report)), style="bold red" if report.problems else "green")
    sys.exit(1 if report.problems else 0)


if __name__ == "__main__":
    main()
