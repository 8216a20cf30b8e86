"""``spotjax convert``."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from spotjax.commands.arguments import add_command

if TYPE_CHECKING:
    from spotjax.commands.arguments import Commands


def add_commands(commands: Commands) -> None:
    """Adds the command."""
    parser = add_command(
        commands,
        "convert",
        run,
        "write a model as a checkpoint that workers boot from slice by slice",
        "  spotjax convert ./Llama-3.1-8B-Instruct /checkpoints/llama --dtype bfloat16\n"
        "  spotjax serve --model /checkpoints/llama\n",
    )
    parser.add_argument("source", metavar="MODEL", help="any model that `spotjax serve --model` takes")
    parser.add_argument("directory", metavar="DIRECTORY", help="to write; goes on with an interrupted conversion there")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="what to store: float32 (default) keeps every weight exactly, bfloat16 takes half as much and keeps those "
        "that are published so",
    )
    parser.add_argument(
        "--quantization", choices=("none", "int8"), default="none", help="what to store matrices as (default: none)"
    )
    parser.add_argument("--no-verify", action="store_true", help="do not read back and compare what was written")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # Orbax starts jax, which would take hold of accelerators

    import dataclasses

    from rich import progress as bars
    from rich.console import Console

    from spotjax.checkpoint.convert import convert, stored_bytes
    from spotjax.commands.output import print_json, shown_bytes
    from spotjax.models.catalog import open_model

    model = open_model(arguments.source, arguments.quantization)
    columns = (
        bars.TextColumn("{task.description:>10}"),
        bars.BarColumn(),
        bars.DownloadColumn(),
        bars.TransferSpeedColumn(),
        bars.TimeElapsedColumn(),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=stored_bytes(model, arguments.dtype))
        done = convert(
            model,
            arguments.directory,
            arguments.dtype,
            verify=not arguments.no_verify,
            progress=lambda part, count: progress.update(task, advance=count, description=part),
        )
    if arguments.json:
        print_json({"directory": arguments.directory, **dataclasses.asdict(done)})
    else:
        kept = f", {done.kept} of them from an interrupted conversion" if done.kept else ""
        print(f"{arguments.source} is at {arguments.directory}: {done.parts} parts, {shown_bytes(done.bytes)}{kept}")
    return 0
