"""Mutual TLS on gRPC: both sides show a certificate that one authority signed. Plaintext peers cannot connect."""

from __future__ import annotations

from pathlib import Path

import grpc

from spotjax.transport.security import Tls


def server_credentials(certificate: str, key: str, authority: str) -> grpc.ServerCredentials:
    """Credentials of a server that refuses clients without a certificate of the authority; arguments are PEM files.

    Raises:
      ConfigError: a file cannot be read or is none of these.
    """
    Tls.from_files(certificate, key, authority)  # says clearly what is wrong with them, which gRPC does not
    pair = (Path(key).read_bytes(), Path(certificate).read_bytes())
    return grpc.ssl_server_credentials([pair], Path(authority).read_bytes(), require_client_auth=True)


def channel_credentials(certificate: str, key: str, authority: str) -> grpc.ChannelCredentials:
    """Credentials of a client; the server's certificate must be of the authority and name the host that is dialled.

    Raises:
      ConfigError: a file cannot be read or is none of these.
    """
    Tls.from_files(certificate, key, authority)
    return grpc.ssl_channel_credentials(*(Path(file).read_bytes() for file in (authority, key, certificate)))
