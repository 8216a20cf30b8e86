"""``spotjax health``: whether the server, or worker, with these settings is well. For probes of containers."""

from __future__ import annotations

import argparse
import os
import socket
from typing import TYPE_CHECKING

from spotjax import settings
from spotjax.commands.arguments import add_command
from spotjax.config import ServeConfig, is_any, mode
from spotjax.errors import ConfigError
from spotjax.meshes.instance import InstanceState

if TYPE_CHECKING:
    from spotjax.client import SpotjaxClient
    from spotjax.commands.arguments import Commands

IN_FLEET = (InstanceState.READY, InstanceState.NOTICED, InstanceState.DRAINING)

EXAMPLES = """\
  spotjax health --config controller.toml           exit code 0 while it takes requests
  spotjax health --config controller.toml --alive   exit code 0 while it answers, with a model or without
  spotjax health --config worker.toml --name spot-a exit code 0 while that worker is in the fleet

It takes the settings of spotjax serve, from flags, variables and file, so a probe says what its container says. With
TLS, the certificate of a server that listens on all addresses must name localhost.
"""


def add_commands(commands: Commands) -> None:
    """Adds the command."""
    parser = add_command(
        commands, "health", run, "exit with 0 if the server or worker with these settings is well", EXAMPLES
    )
    parser.add_argument("--alive", action="store_true", help="a server need only answer, and take no requests yet")
    settings.add_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns 0 for a server or worker that is well, and 1 for one that is not.

    Raises:
      ConfigError: the settings are wrong, or ask whether a worker answers, which serves nothing that does.
      Unavailable: the server, or the worker's controller, does not answer.
    """
    config = settings.load(arguments, os.environ)
    worker = mode(config) == "worker"
    if worker and arguments.alive:
        raise ConfigError("alive is for servers: whether a worker lives, its controller's lease and its watchdog say")
    with client_of(config) as client:
        if worker:
            name = config.name or socket.gethostname()
            state = next((i.state for i in client.status().instances if i.name == name), "unknown")
            well, shown = state in IN_FLEET, f"{name} is {state}"
        else:
            ready = client.ready()
            well, shown = ready or arguments.alive, "ready" if ready else "not ready"
    print(shown)
    return 0 if well else 1


def client_of(config: ServeConfig) -> SpotjaxClient:
    """A client that asks once: of the server with these settings, or of a worker's controller."""
    from spotjax.client import SpotjaxClient
    from spotjax.transport.credentials import channel_credentials

    address = config.join or config.address
    if is_any(address):
        address = f"localhost:{address.rpartition(':')[2]}"
    files = (config.tls_certificate, config.tls_key, config.tls_authority)
    if config.tls_certificate and not config.tls_authority:
        files = ("", "", config.tls_certificate)  # its own certificate is the one to expect
    credentials = channel_credentials(*files) if config.tls_certificate else None
    return SpotjaxClient(address, patience=0, credentials=credentials, api_key=watching_key(config))


def watching_key(config: ServeConfig) -> str | None:
    """The key by which a worker may ask its controller for the fleet's status: it follows from the join token."""
    if mode(config) != "worker" or not config.join_token:
        return None
    from spotjax.transport.join_token import STATUS_KEY, JoinToken

    return JoinToken.from_file(config.join_token).key_for(STATUS_KEY)
