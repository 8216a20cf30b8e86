"""``spotjax serve``."""

from __future__ import annotations

import argparse
import os
import signal
from typing import TYPE_CHECKING, NoReturn

from spotjax import settings
from spotjax.commands.arguments import add_command

if TYPE_CHECKING:
    from spotjax.commands.arguments import Commands

EXAMPLES = """\
  spotjax serve                                     everything in one process: embedded mode
  spotjax serve --instances 3 --devices-per-instance 2 --mesh 1x3x2 --listen 127.0.0.1:9000
  spotjax serve --workers 4                         fleet mode on one machine: a controller and four workers
  spotjax serve --listen 10.0.0.1:8470 --data-listen 10.0.0.1:0        fleet mode: the controller, on a stable machine
  spotjax serve --join 10.0.0.1:8470 --data-listen 10.0.0.2:0          fleet mode: a worker, on every spot machine
  SPOTJAX_KV_PAGES=512 spotjax serve --config spotjax.toml

A worker takes model and mesh from its controller. Every setting is also a key of the TOML file, kv_pages, and a
variable, SPOTJAX_KV_PAGES. A flag beats a variable, which beats the file. SIGTERM or Ctrl-C drains: running requests
finish, then the server exits; a second one stops it at once. A worker leaves the fleet on it.
"""


def add_commands(commands: Commands) -> None:
    """Adds the command."""
    parser = add_command(commands, "serve", run, "serve a model until SIGTERM or Ctrl-C", EXAMPLES)
    settings.add_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    if os.getpid() == 1:
        signal.signal(signal.SIGTERM, end_at_once)
    config = settings.load(arguments, os.environ)
    from spotjax import serve

    return serve.run(config)


def end_at_once(number: int, frame: object) -> NoReturn:
    """What SIGTERM does before there is anything to drain: process 1 of a container, it would do nothing by itself."""
    os._exit(128 + number)
