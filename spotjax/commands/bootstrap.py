"""``spotjax bootstrap``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import msgspec

from spotjax.bootstrap.options import FIELDS, PLATFORMS, BootstrapOptions
from spotjax.bootstrap.script import script
from spotjax.commands.arguments import add_command
from spotjax.config import TYPES
from spotjax.errors import ConfigError
from spotjax.settings import checked, flag_of, refuse_unknown, shown_value

if TYPE_CHECKING:
    from spotjax.commands.arguments import Commands

EXAMPLES = """\
  spotjax bootstrap gce --join 10.0.0.1:8470 --output worker.sh          the start-up script of an instance template
  spotjax bootstrap tpu --join 10.0.0.1:8470 --tls-certificate secret:projects/p/secrets/worker \\
      --tls-key secret:projects/p/secrets/worker-key --tls-authority secret:projects/p/secrets/authority
  spotjax bootstrap aws --join 10.0.0.1:8470 --grace-seconds 110         user data
  spotjax bootstrap k8s --join spotjax:8470 --image ghcr.io/me/spotjax:0.1.0-cuda | kubectl apply -f -
  spotjax bootstrap slurm --join 10.0.0.1:8470 --python /shared/spotjax/bin/python | sbatch --gpus 8
"""


def add_commands(commands: Commands) -> None:
    """Adds the command."""
    parser = add_command(
        commands, "bootstrap", run, "write the start-up script that makes a fresh machine a worker", EXAMPLES
    )
    parser.add_argument("platform", choices=PLATFORMS, help="what the machine is")
    for option in msgspec.structs.fields(BootstrapOptions):
        if option.name == "settings":
            continue
        kind, meta = get_args(FIELDS[option.name])
        flags: dict[str, Any] = {"dest": option.name, "default": None, "required": option.required}
        if kind is bool:
            flags["action"] = argparse.BooleanOptionalAction
        elif choices := get_args(kind):
            flags["choices"] = choices
        else:
            flags["metavar"] = kind.__name__.upper()
        shown = "" if option.required or option.default == "" else f" (default: {shown_value(option.default)})"
        parser.add_argument(flag_of(option.name), help=meta.description + shown, **flags)
    parser.add_argument(
        "--setting", metavar="NAME=VALUE", action="append", default=[],
        help="another setting of the worker, such as log_format=json; may be given several times",
    )  # fmt: skip
    parser.add_argument("--output", metavar="FILE", type=Path, help="write there instead of to standard output")


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    given = {
        option.name: getattr(arguments, option.name)
        for option in msgspec.structs.fields(BootstrapOptions)
        if option.name != "settings" and getattr(arguments, option.name) is not None
    }
    try:
        options = msgspec.convert(given | {"settings": _settings(arguments.setting)}, BootstrapOptions, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"bootstrap: {error}") from error
    text = script(arguments.platform, options)
    if arguments.output is None:
        print(text, end="")
        return 0
    try:
        arguments.output.write_text(text)
    except OSError as error:
        raise ConfigError(f"--output: cannot write {arguments.output}: {error.strerror}") from error
    return 0


def _settings(pairs: list[str]) -> dict[str, Any]:
    settings = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"--setting {pair}: must be NAME=VALUE")
        refuse_unknown([name], TYPES, "--setting")
        settings[name] = checked(name, value, f"--setting {name}")
    return settings
