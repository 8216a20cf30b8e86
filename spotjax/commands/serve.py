"""``spotjax serve``."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from spotjax import config
from spotjax.commands.arguments import add_command

if TYPE_CHECKING:
    from spotjax.commands.arguments import Commands

EXAMPLES = """\
  spotjax serve
  spotjax serve --model smollm2-135m-instruct --listen 127.0.0.1:9000
  spotjax serve --instances 3 --devices-per-instance 2 --mesh 1x3x2
  SPOTJAX_KV_PAGES=512 spotjax serve --config spotjax.toml

Every setting is also a key of the TOML file, kv_pages, and a variable, SPOTJAX_KV_PAGES. A flag beats a variable, which
beats the file. SIGTERM or Ctrl-C drains: running requests finish, then the server exits; a second one stops it at once.
"""


def add_commands(commands: Commands) -> None:
    """Adds the command."""
    parser = add_command(commands, "serve", run, "serve a model until SIGTERM or Ctrl-C", EXAMPLES)
    config.add_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    settings = config.load(arguments, os.environ)
    from spotjax import serve

    return serve.run(settings)
