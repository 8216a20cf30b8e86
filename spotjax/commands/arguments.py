"""What the commands' arguments have in common."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def add_command(
    commands: Commands, name: str, run: Callable[[argparse.Namespace], int], help: str, examples: str = ""
) -> argparse.ArgumentParser:
    """Adds a command; ``run`` gets the parsed arguments and returns the exit code."""
    parser = commands.add_parser(
        name,
        help=help,
        description=help[0].upper() + help[1:] + ".",
        epilog=f"examples:\n{examples}" if examples else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def add_client_flags(parser: argparse.ArgumentParser) -> None:
    """Adds ``--server`` and ``--json``."""
    parser.add_argument(
        "--server", metavar="HOST:PORT", default="127.0.0.1:8470", help="server to ask (default: 127.0.0.1:8470)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text, one value a line")
