"""``spotjax bootstrap``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import msgspec

from spotjax.bootstrap.kubernetes.manifests import render
from spotjax.bootstrap.kubernetes.options import FIELDS as KUBERNETES
from spotjax.bootstrap.kubernetes.options import KubernetesOptions
from spotjax.bootstrap.options import FIELDS, BootstrapOptions, Platform
from spotjax.bootstrap.script import script
from spotjax.commands.arguments import add_command
from spotjax.config import TYPES
from spotjax.errors import ConfigError
from spotjax.settings import checked, flag_of, refuse_unknown, shown_value

if TYPE_CHECKING:
    from spotjax.commands.arguments import Commands

AnyOptions = TypeVar("AnyOptions", bound=msgspec.Struct)
PLATFORMS: dict[Platform, str] = {
    "gce": "the start-up script of an instance template for Compute Engine",
    "tpu": "the start-up script of TPU VMs",
    "aws": "user data for EC2",
    "slurm": "a batch script",
}

EXAMPLES = """\
  spotjax bootstrap gce --join 10.0.0.1:8470 --output worker.sh          the start-up script of an instance template
  spotjax bootstrap tpu --join 10.0.0.1:8470 --tls-certificate secret:projects/p/secrets/worker \\
      --tls-key secret:projects/p/secrets/worker-key --tls-authority secret:projects/p/secrets/authority
  spotjax bootstrap aws --join 10.0.0.1:8470 --grace-seconds 110         user data
  spotjax bootstrap k8s --cluster gke-gpu --accelerator nvidia-l4 --image ghcr.io/me/spotjax:0.1.0 | kubectl apply -f -
  spotjax bootstrap slurm --join 10.0.0.1:8470 --python /shared/spotjax/bin/python | sbatch --gpus 8
"""


def add_commands(commands: Commands) -> None:
    """Adds the command."""
    parser = add_command(commands, "bootstrap", run, "write what makes fresh machines workers", EXAMPLES)
    platforms = parser.add_subparsers(title="platforms", metavar="PLATFORM", dest="platform", required=True)
    for platform, what in PLATFORMS.items():
        _add_platform(platforms, platform, what, BootstrapOptions, FIELDS, "the worker")
    _add_platform(
        platforms,
        "k8s",
        "manifests of a controller and its workers",
        KubernetesOptions,
        KUBERNETES,
        "controller or workers",
    )


def _add_platform(
    platforms: Commands, name: str, what: str, kind: type[msgspec.Struct], fields: dict[str, Any], whose: str
) -> None:
    parser = add_command(platforms, name, run, f"write {what}")
    for option in msgspec.structs.fields(kind):
        if option.name == "settings":
            continue
        values, *metas = get_args(fields[option.name])
        flags: dict[str, Any] = {"dest": option.name, "default": None, "required": option.required}
        if values is bool:
            flags["action"] = argparse.BooleanOptionalAction
        elif choices := get_args(values):
            flags["choices"] = choices
        else:
            flags["metavar"] = values.__name__.upper()
        shown = "" if option.required or option.default == "" else f" (default: {shown_value(option.default)})"
        parser.add_argument(flag_of(option.name), help=metas[-1].description + shown, **flags)
    parser.add_argument(
        "--setting", metavar="NAME=VALUE", action="append", default=[],
        help=f"another setting of {whose}, such as log_format=json; may be given several times",
    )  # fmt: skip
    parser.add_argument("--output", metavar="FILE", type=Path, help="write there instead of to standard output")


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    if arguments.platform == "k8s":
        text = render(_options(arguments, KubernetesOptions))
    else:
        text = script(arguments.platform, _options(arguments, BootstrapOptions))
    if arguments.output is None:
        print(text, end="")
        return 0
    try:
        arguments.output.write_text(text)
    except OSError as error:
        raise ConfigError(f"--output: cannot write {arguments.output}: {error.strerror}") from error
    return 0


def _options(arguments: argparse.Namespace, kind: type[AnyOptions]) -> AnyOptions:
    given = {
        option.name: getattr(arguments, option.name)
        for option in msgspec.structs.fields(kind)
        if option.name != "settings" and getattr(arguments, option.name) is not None
    }
    try:
        return msgspec.convert(given | {"settings": _settings(arguments.setting)}, kind, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"bootstrap: {error}") from error


def _settings(pairs: list[str]) -> dict[str, Any]:
    settings = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"--setting {pair}: must be NAME=VALUE")
        refuse_unknown([name], TYPES, "--setting")
        settings[name] = checked(name, value, f"--setting {name}")
    return settings
