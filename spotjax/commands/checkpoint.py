"""``spotjax checkpoint save`` and ``spotjax checkpoint show``."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from spotjax.commands.arguments import add_client_flags, add_command, client_of

if TYPE_CHECKING:
    from spotjax.checkpoint.contents import Contents
    from spotjax.commands.arguments import Commands
    from spotjax.fleet.status import Saved


def add_commands(commands: Commands) -> None:
    """Adds the commands."""
    group = commands.add_parser(
        "checkpoint", help="save what is served, or show what was saved", description="Save what is served, or show it."
    )
    actions = group.add_subparsers(title="commands", metavar="COMMAND", required=True)
    save = add_command(
        actions,
        "save",
        run_save,
        "have a running service write a checkpoint, while it goes on serving",
        "  spotjax checkpoint save /checkpoints/llama            parameters, for --model /checkpoints/llama\n"
        "  spotjax checkpoint save /checkpoints/llama --state    and requests with their KV, to go on with\n"
        "  spotjax checkpoint save /checkpoints/llama --state --no-parameters --seconds 10\n",
    )
    save.add_argument(
        "directory", metavar="DIRECTORY", help="path or bucket URL that the server and all its instances write to"
    )
    save.add_argument(
        "--parameters",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="save what the model consists of (default); refused where a complete checkpoint is",
    )
    save.add_argument(
        "--state",
        action="store_true",
        help="save requests with their tokens, in a fleet also KV of unfinished ones",
    )
    save.add_argument(
        "--seconds",
        type=float,
        default=60.0,
        metavar="S",
        help="for KV; what does not fit is left out (default: 60)",
    )
    add_client_flags(save)
    show = add_command(actions, "show", run_show, "show what a checkpoint directory has")
    show.add_argument("directory", metavar="DIRECTORY", help="path or bucket URL")
    show.add_argument("--json", action="store_true", help="print JSON instead of text")


def run_save(arguments: argparse.Namespace) -> int:
    """Runs ``spotjax checkpoint save``."""
    from spotjax.commands.output import print_json

    directory = arguments.directory if "://" in arguments.directory else os.path.abspath(arguments.directory)
    with client_of(arguments) as client:
        saved = client.save(
            directory, parameters=arguments.parameters, state=arguments.state, seconds=arguments.seconds
        )
    print_json(saved) if arguments.json else print(saved_text(saved, arguments.state))
    return 0


def run_show(arguments: argparse.Namespace) -> int:
    """Runs ``spotjax checkpoint show``."""
    from spotjax.checkpoint.contents import contents_of
    from spotjax.commands.output import print_json

    contents = contents_of(arguments.directory)
    print_json(contents) if arguments.json else print(contents_text(contents))
    return 0


def saved_text(saved: Saved, state: bool) -> str:
    """What was saved, a line each."""
    from spotjax.commands.output import shown_bytes

    lines = [f"saved to {saved.directory} in {saved.seconds:.1f} s"]
    if saved.parameter_bytes:
        lines.append(f"parameters: {shown_bytes(saved.parameter_bytes)}")
    if state:
        lines.append(f"requests: {saved.requests}")
        if saved.sequences or saved.kv_bytes or saved.left_out:
            kv = f"{shown_bytes(saved.kv_bytes)} for {saved.sequences} sequences of {saved.positions} positions"
        else:
            kv = "none; it will be computed again"
        missing = f"; not all that {', '.join(saved.left_out)} had" if saved.left_out else ""
        lines.append(f"KV: {kv}{missing}")
    return "\n".join(lines)


def contents_text(contents: Contents) -> str:
    """What there is, a line each."""
    from spotjax.commands.output import shown_bytes

    stored, lines = contents.parameters, [contents.directory]
    if stored is None:
        lines.append("parameters: none")
    elif not stored.complete:
        lines.append("parameters: incomplete; the save was cut off, or goes on")
    else:
        lines.append(
            f"parameters: {stored.parameters} as {stored.dtype}, {shown_bytes(stored.bytes)} in {stored.parts} parts"
        )
    for save in contents.saves:
        kv = {"complete": f"KV of {save.sequences} sequences, at most {save.positions} positions, epoch {save.epoch}",
              "cut off": "KV that was cut off and is not used", "none": "no KV"}[save.kv]  # fmt: skip
        generation = ", requests with their tokens" if save.generation else ""
        lines.append(f"save {save.number} of service {save.service}: {kv}{generation}")
    return "\n".join(lines)
