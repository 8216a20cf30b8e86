"""``spotjax status``, ``events``, ``preempt``, ``drain`` and ``add``."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

from spotjax.commands.arguments import add_client_flags, add_command, client_of

if TYPE_CHECKING:
    from spotjax.commands.arguments import Commands


def add_commands(commands: Commands) -> None:
    """Adds the commands."""
    status = add_command(commands, "status", run_status, "show instances, mesh and requests")
    status.add_argument("--watch", action="store_true", help="keep showing, until Ctrl-C")
    status.add_argument("--interval", type=float, default=1.0, metavar="SECONDS", help="between updates (default: 1)")
    events = add_command(commands, "events", run_events, "show what happened to the fleet")
    events.add_argument("--follow", action="store_true", help="then show what happens, until the server stops")
    preempt = add_command(
        commands,
        "preempt",
        run_preempt,
        "take an instance away, for a drill",
        "  spotjax preempt instance-1 --grace 5      with five seconds' notice\n"
        "  spotjax preempt instance-1                at once, unannounced\n",
    )
    preempt.add_argument("instance", metavar="INSTANCE", help="its name, as spotjax status shows it")
    preempt.add_argument(
        "--grace", type=float, default=0.0, metavar="SECONDS", help="notice, 0 to 3600; 0 gives none (default: 0)"
    )
    drain = add_command(
        commands,
        "drain",
        run_drain,
        "let an instance leave: move the mesh off it, however long that takes",
        "  spotjax drain instance-1                  then it can be switched off\n",
    )
    drain.add_argument("instance", metavar="INSTANCE", help="its name, as spotjax status shows it")
    add = add_command(commands, "add", run_add, "let instances join")
    add.add_argument("count", metavar="COUNT", type=int, nargs="?", default=1, help="how many (default: 1)")
    for parser in (status, events, preempt, drain, add):
        add_client_flags(parser)


def run_status(arguments: argparse.Namespace) -> int:
    """Runs ``spotjax status``."""
    from rich.console import Console
    from rich.live import Live

    from spotjax.commands.output import print_json
    from spotjax.commands.views import status_view

    console = Console()
    with client_of(arguments) as client:
        if not arguments.watch:
            print_json(client.status()) if arguments.json else console.print(status_view(client.status()))
        elif arguments.json:
            while True:
                print_json(client.status())
                time.sleep(arguments.interval)
        else:
            with Live(status_view(client.status()), console=console, auto_refresh=False) as live:
                while True:
                    time.sleep(arguments.interval)
                    live.update(status_view(client.status()), refresh=True)
    return 0


def run_events(arguments: argparse.Namespace) -> int:
    """Runs ``spotjax events``."""
    from spotjax.commands.output import print_json
    from spotjax.commands.views import event_line

    with client_of(arguments) as client:
        for event in client.watch(arguments.follow):
            print_json(event) if arguments.json else print(event_line(event), flush=True)
    return 0


def run_preempt(arguments: argparse.Namespace) -> int:
    """Runs ``spotjax preempt``."""
    from spotjax.commands.output import print_json
    from spotjax.commands.views import reconfiguration_text

    with client_of(arguments) as client:
        report = client.preempt(arguments.instance, arguments.grace)
    print_json(report) if arguments.json else print(f"{arguments.instance} is gone\n{reconfiguration_text(report)}")
    return 0


def run_drain(arguments: argparse.Namespace) -> int:
    """Runs ``spotjax drain``."""
    from spotjax.commands.output import print_json
    from spotjax.commands.views import reconfiguration_text

    with client_of(arguments) as client:
        report = client.drain(arguments.instance)
    print_json(report) if arguments.json else print(f"{arguments.instance} has left\n{reconfiguration_text(report)}")
    return 0


def run_add(arguments: argparse.Namespace) -> int:
    """Runs ``spotjax add``."""
    from spotjax.commands.output import print_json
    from spotjax.commands.views import reconfiguration_text

    with client_of(arguments) as client:
        report = client.add(arguments.count)
    joined = f"{arguments.count} instance{'s' * (arguments.count != 1)} joined"
    print_json(report) if arguments.json else print(f"{joined}\n{reconfiguration_text(report)}")
    return 0
