"""What the commands' arguments have in common."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

from spotjax.config import DEFAULT_LISTEN, TLS
from spotjax.errors import ConfigError

if TYPE_CHECKING:
    import grpc

    from spotjax.client import SpotjaxClient

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


def add_credential_flags(parser: argparse.ArgumentParser) -> None:
    """Adds who this client is and whom it trusts: a key, and files for TLS."""
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        help="for a server that wants one (default: SPOTJAX_API_KEY, which others cannot see)",
    )
    parser.add_argument(
        "--tls-authority", metavar="FILE", help="for a server with TLS: PEM file of its authority; system: any of those"
    )
    parser.add_argument(
        "--tls-certificate", metavar="FILE", help="for a server with mutual TLS: PEM file, with the rest"
    )
    parser.add_argument("--tls-key", metavar="FILE", help="PEM file with its private key")


def add_client_flags(parser: argparse.ArgumentParser) -> None:
    """Adds what ``client_of`` needs, and ``--json``."""
    parser.add_argument(
        "--server", metavar="HOST:PORT", default=DEFAULT_LISTEN, help=f"server to ask (default: {DEFAULT_LISTEN})"
    )
    add_credential_flags(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of text, one value a line")


def client_of(arguments: argparse.Namespace) -> SpotjaxClient:
    """A client of the server that the arguments name; as patient as ``patience`` says, where a command has it.

    Raises:
      ConfigError: the arguments for TLS are incomplete, or their files of no use; or patience is negative.
    """
    from spotjax.api.patience import DEFAULT_PATIENCE
    from spotjax.client import SpotjaxClient

    patience = getattr(arguments, "patience", DEFAULT_PATIENCE)
    return SpotjaxClient(arguments.server, patience, credentials_of(arguments), arguments.api_key)


def credentials_of(arguments: argparse.Namespace) -> grpc.ChannelCredentials | None:
    """What a gRPC client shows and trusts; None without TLS.

    Raises:
      ConfigError: the arguments for TLS are incomplete, or their files of no use.
    """
    certificate, key, authority = (getattr(arguments, name) or "" for name in TLS)
    if not (certificate or key or authority):
        return None
    if not authority or bool(certificate) != bool(key):
        raise ConfigError("TLS needs --tls-authority, and mutual TLS --tls-certificate and --tls-key as well")
    from spotjax.transport.credentials import channel_credentials

    return channel_credentials(certificate, key, "" if authority == "system" else authority)
