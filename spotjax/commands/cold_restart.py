"""``spotjax cold-restart``: starts a service again from its commit log, and moves it to other machines."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from spotjax import settings
from spotjax.commands.arguments import add_command
from spotjax.config import ServeConfig, mode
from spotjax.errors import CommitLogError, ConfigError

if TYPE_CHECKING:
    from spotjax.commands.arguments import Commands
    from spotjax.models.catalog import Model

EXAMPLES = """\
  spotjax cold-restart --commit-log ./log --checkpoint /checkpoints/llama --workers 4 --dry-run
  spotjax cold-restart --commit-log ./log --checkpoint /nfs/llama --listen 10.0.0.1:8470 --data-listen 10.0.0.1:0
  spotjax cold-restart --commit-log ./log --instances 3                in one process; KV is computed again
  spotjax cold-restart --commit-log ./log --checkpoint ./checkpoint --export service.tar --with-parameters
  spotjax cold-restart --import service.tar --commit-log ./log --checkpoint ./checkpoint --workers 4

Without --dry-run and --export it then serves, as spotjax serve with the same settings. The model is the checkpoint's
unless --model names one. Before a service moves, stop the old one: two that go on with the same requests both answer.
"""


@dataclass(frozen=True)
class Place:
    """Where everything is.

    Attributes:
      config: what is served, with the model that is meant.
      named: whether the model was named, or is the checkpoint's, so that it must be the log's.
      log: directory of the commit log.
      checkpoint: path or URL, empty if there is none.
    """

    config: ServeConfig
    named: bool
    log: Path
    checkpoint: str


def add_commands(commands: Commands) -> None:
    """Adds the command."""
    parser = add_command(
        commands, "cold-restart", run, "start a service again from its commit log, or move it elsewhere", EXAMPLES
    )
    group = parser.add_argument_group("cold restart")
    add = group.add_argument
    add("--dry-run", action="store_true", help="show what would be restored, and stop; writes nothing but imports")
    add("--salvage", action="store_true", help="go on with what is intact of a damaged log; the damaged file is kept")
    add("--assume", metavar="COUNTxTYPE,...", default="", help="show the mesh for such instances, as spotjax plan does")
    either = group.add_mutually_exclusive_group()
    either.add_argument("--export", metavar="FILE.tar", type=Path, help="write the service into a bundle, and stop")
    either.add_argument("--import", metavar="FILE.tar", dest="bundle", type=Path, help="unpack a bundle first")
    add("--with-parameters", action="store_true", help="put the checkpoint's parameters into the bundle, too")
    add("--json", action="store_true", help="print JSON instead of text; for --dry-run and --export")
    settings.add_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    started = time.monotonic()
    place = place_of(arguments, os.environ)
    if arguments.export is not None:
        return export(arguments, place)
    if arguments.bundle is not None:
        import_bundle(arguments, place)
        place = place_of(arguments, os.environ)  # the checkpoint may have parameters now
    if arguments.dry_run:
        return show(arguments, place)
    return restart(arguments, place, started)


def place_of(arguments: argparse.Namespace, environment: Mapping[str, str]) -> Place:
    """What the arguments come to.

    Raises:
      ConfigError: they do not go together.
    """
    from etils import epath

    from spotjax.engine.log_directory import default_directory
    from spotjax.models.orbax_checkpoint import is_checkpoint
    from spotjax.models.orbax_manifest import is_url

    if arguments.with_parameters and arguments.export is None:
        raise ConfigError("--with-parameters has no meaning without --export")
    if arguments.export is not None and (arguments.dry_run or arguments.salvage):
        raise ConfigError("--export writes a bundle and stops; give --dry-run or --salvage without it")
    if arguments.json and not (arguments.dry_run or arguments.export):
        raise ConfigError("--json is for --dry-run and --export")
    named = arguments.model is not None or "SPOTJAX_MODEL" in environment
    named = named or (arguments.config is not None and "model" in settings.from_file(arguments.config))
    others = argparse.Namespace(**vars(arguments) | {"checkpoint": None})  # which is of use here in every mode
    config = settings.load(others, environment)
    if mode(config) == "worker":
        raise ConfigError(f"join ({config.join}) starts a worker; a cold restart is the controller's")
    if config.durability == "none":
        raise ConfigError("durability none keeps no commit log to restart from")
    checkpoint = arguments.checkpoint or config.checkpoint
    if checkpoint and not is_url(checkpoint):
        checkpoint = str(Path(checkpoint).expanduser().absolute())
    if mode(config) == "controller":
        config = msgspec.structs.replace(config, checkpoint=checkpoint)
    if checkpoint and not named and is_checkpoint(epath.Path(checkpoint)):
        config, named = msgspec.structs.replace(config, model=checkpoint), True
    log = Path(config.commit_log).expanduser() if config.commit_log else default_directory(config.address)
    return Place(config, named, log, checkpoint)


def show(arguments: argparse.Namespace, place: Place) -> int:
    """Shows what would be restored, and says what is in the way."""
    from rich.console import Console

    from spotjax.checkpoint.saves import newest
    from spotjax.commands.cold_restart_views import restoration_view
    from spotjax.commands.output import print_json
    from spotjax.engine.log_directory import user_of
    from spotjax.engine.log_inspection import inspect_log
    from spotjax.tools.cold_restart import plan_mesh, restoration

    summary = inspect_log(place.log)
    model = model_of(place, summary.model)
    save = None
    if place.checkpoint and mode(place.config) == "controller":  # an embedded server reads none
        save = newest(place.checkpoint, summary.identity)
    mesh = plan_mesh(place.config, model.checkpoint.spec, arguments.assume, summary.epoch + 1)
    found = restoration(summary, model.name, user_of(place.log), save, mesh)
    if arguments.json:
        print_json(found)
    else:
        Console().print(restoration_view(found))
    if summary.damage and not arguments.salvage:
        raise CommitLogError(damaged(place.log, summary.damage, len(summary.requests)))
    return 0


def restart(arguments: argparse.Namespace, place: Place, started: float) -> int:
    """Serves, and says when every request goes on."""
    from functools import partial

    from spotjax import serve
    from spotjax.engine.log_directory import user_of
    from spotjax.engine.log_inspection import inspect_log
    from spotjax.tools.cold_restart import follow, salvage

    if user := user_of(place.log):
        raise CommitLogError(f"the commit log {place.log} is in use by process {user}; its service still runs")
    summary = inspect_log(place.log)
    if summary.damage:
        if not arguments.salvage:
            raise CommitLogError(damaged(place.log, summary.damage, len(summary.requests)))
        for line in salvage(place.log, summary.model or fingerprint_of(model_of(place, ""))):
            say(f"salvaged: {line}")
        summary = inspect_log(place.log)
    say(f"to be restored: {len(summary.going_on)} unfinished requests of service {summary.identity}")
    return serve.run(place.config, partial(follow, unfinished=summary.going_on, started=started, say=say))


def export(arguments: argparse.Namespace, place: Place) -> int:
    """Writes a bundle."""
    from spotjax.checkpoint.bundle import pack
    from spotjax.commands.cold_restart_views import bundle_text
    from spotjax.commands.output import print_json
    from spotjax.engine.log_directory import user_of
    from spotjax.engine.log_inspection import inspect_log

    user = user_of(place.log)
    name = name_of_model(place, inspect_log(place.log).model)
    bundle = pack(arguments.export, place.log, place.checkpoint, name, parameters=arguments.with_parameters)
    if arguments.json:
        print_json({"file": str(arguments.export), "in_use_by": user, **msgspec.to_builtins(bundle)})
    else:
        say(f"{arguments.export}: {bundle_text(bundle)}")
        if user:
            say(
                f"warning: process {user} goes on with these requests; stop it before the bundle is imported, or two "
                "services answer them, and export again, or what it does until then is done again"
            )
    return 0


def import_bundle(arguments: argparse.Namespace, place: Place) -> None:
    """Unpacks a bundle into the commit log and the checkpoint."""
    import sys

    from spotjax.checkpoint.unpacking import unpack
    from spotjax.commands.cold_restart_views import bundle_text

    unpacked = unpack(arguments.bundle, place.log, place.checkpoint)
    out = sys.stderr if arguments.json else sys.stdout
    print(f"imported {bundle_text(unpacked.bundle)}", file=out, flush=True)
    for line in unpacked.left_out:
        print(f"left out: {line}", file=out, flush=True)


def model_of(place: Place, expected: str) -> Model:
    """The model that will be served.

    Raises:
      CheckpointError: it cannot be opened.
      CommitLogError: the log is of a model with another fingerprint.
    """
    from spotjax.models.catalog import open_model

    model = open_model(place.config.model, place.config.quantization)
    if expected and fingerprint_of(model) != expected:
        raise CommitLogError(
            f"the commit log {place.log} is of a model with fingerprint {expected[:16]}, {model.name} has "
            f"{fingerprint_of(model)[:16]}; name the one that its requests were begun with (--model, --checkpoint)"
        )
    return model


def name_of_model(place: Place, expected: str) -> str:
    """What the log's model is called; empty if none was named and it is not the default one."""
    try:
        return model_of(place, expected).name
    except CommitLogError:
        if place.named:
            raise
        return ""


def fingerprint_of(model: Model) -> str:
    """What a commit log knows a model by."""
    import numpy as np

    from spotjax.models.fingerprint import fingerprint

    return fingerprint(model.checkpoint, np.dtype(np.float32))


def damaged(log: Path, damage: tuple[str, ...], intact: int) -> str:
    """What to say of a damaged log."""
    more = f" (and {len(damage) - 1} more)" if len(damage) > 1 else ""
    return (
        f"the commit log {log} is damaged: {damage[0]}{more}; --salvage goes on with the {intact} requests that are "
        "left, each as far as it is intact"
    )


def say(line: str) -> None:
    """Prints a line at once."""
    print(line, flush=True)
