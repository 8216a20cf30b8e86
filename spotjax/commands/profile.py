"""``spotjax profile``: measures stages of a model on this machine's devices, for ``spotjax plan --profile``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from spotjax.commands.arguments import add_command

if TYPE_CHECKING:
    from spotjax.commands.arguments import Commands

EXAMPLES = """\
  spotjax profile --model tiny --out tiny.json
  spotjax profile --model llama-3-8b --layers 4 --tensor 1 2 4 --dtype bfloat16 --out h100.json

Parameters are random: only shapes matter. A few layers are enough, latencies of more are extrapolated.
"""


def add_commands(commands: Commands) -> None:
    """Adds the command."""
    parser = add_command(commands, "profile", run, "measure a model's latencies on this machine", EXAMPLES)
    add = parser.add_argument
    add("--model", required=True, metavar="MODEL", help="preset, or a model that spotjax serve takes")
    add("--out", required=True, type=Path, metavar="FILE.json", help="where to write the profile")
    add("--tensor", type=int, nargs="+", default=[1], metavar="M", help="tensor degrees to measure (default: 1)")
    add("--layers", type=int, default=4, metavar="COUNT", help="most layers of a measured stage (default: 4)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of parameters and KV (default: float32)")
    add("--quantization", choices=("none", "int8"), default="none", help="of matrices (default: none)")
    add("--repeats", type=int, default=7, metavar="COUNT", help="calls that the shortest is taken of (default: 7)")


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    from spotjax.commands.plan import model_spec
    from spotjax.tools.record_profile import record

    spec = model_spec(arguments.model, arguments.quantization)
    profile = record(
        arguments.model, spec, arguments.tensor, arguments.layers, arguments.dtype, arguments.repeats, print
    )
    arguments.out.write_text(profile.to_json())
    print(f"{len(profile.samples)} samples, median error of left-out ones {100 * profile.held_out_error():.1f}%")
    return 0
