"""Mutual TLS on gRPC: both sides show a certificate that one authority signed. Plaintext peers cannot connect."""

from __future__ import annotations

from pathlib import Path

import grpc

from spotjax.errors import ConfigError


def server_credentials(certificate: str, key: str, authority: str) -> grpc.ServerCredentials:
    """Credentials of a server that refuses clients without a certificate of the authority; arguments are PEM files.

    Raises:
      ConfigError: a file cannot be read.
    """
    pair = (_read(key), _read(certificate))
    return grpc.ssl_server_credentials([pair], _read(authority), require_client_auth=True)


def channel_credentials(certificate: str, key: str, authority: str) -> grpc.ChannelCredentials:
    """Credentials of a client; the server's certificate must be of the authority and name the host that is dialled.

    Raises:
      ConfigError: a file cannot be read.
    """
    return grpc.ssl_channel_credentials(_read(authority), _read(key), _read(certificate))


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path} for TLS: {error.strerror}") from error
