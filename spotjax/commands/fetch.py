"""``spotjax fetch``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from spotjax.commands.arguments import add_command

if TYPE_CHECKING:
    from spotjax.commands.arguments import Commands


def add_commands(commands: Commands) -> None:
    """Adds the command."""
    parser = add_command(
        commands,
        "fetch",
        run,
        "download a model, check its hash and keep it in the cache",
        "  spotjax fetch smollm2-135m-instruct && spotjax serve --model smollm2-135m-instruct\n",
    )
    parser.add_argument("name", metavar="NAME", help="such as smollm2-135m-instruct")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    from rich.console import Console

    from spotjax.commands.output import print_json
    from spotjax.models import catalog

    with Console(stderr=True).status(f"looking for {arguments.name}") as progress:
        path = catalog.fetch(arguments.name, progress.update)
    if arguments.json:
        print_json({"name": arguments.name, "path": str(path)})
    else:
        print(f"{arguments.name} is at {path}")
    return 0
