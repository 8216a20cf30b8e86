"""TLS on gRPC. Mutual, if there is an authority: both sides show a certificate that it signed."""

from __future__ import annotations

import logging
from pathlib import Path

import grpc

from spotjax.errors import ConfigError
from spotjax.transport.security import Tls, server_context, stamps, verifying_context

log = logging.getLogger(__name__)


def server_credentials(certificate: str, key: str, authority: str = "") -> grpc.ServerCredentials:
    """Credentials of a server that refuses clients without a certificate of the authority, if one is given.

    Arguments are PEM files. Those of the server's own certificate are read again when they change: a renewed one is
    shown from the next connection on.

    Raises:
      ConfigError: a file cannot be read or is none of these.
    """
    server_context(certificate, key, authority)  # says clearly what is wrong with them, which gRPC does not
    files = Renewed(certificate, key, authority)
    return grpc.dynamic_ssl_server_credentials(
        files.read(),
        files.changed,  # type: ignore[arg-type]  # None says that nothing has changed, which the stubs do not know
        require_client_authentication=bool(authority),
    )


class Renewed:
    """Files of a server's certificate, which may be renewed while it runs."""

    def __init__(self, certificate: str, key: str, authority: str) -> None:
        self._files = (certificate, key, authority)
        self._stamp = stamps(*self._files)

    def read(self) -> grpc.ServerCertificateConfiguration:
        """What gRPC shows to clients. Raises OSError if a file cannot be read."""
        certificate, key, authority = self._files
        pair = (Path(key).read_bytes(), Path(certificate).read_bytes())
        return grpc.ssl_server_certificate_configuration([pair], Path(authority).read_bytes() if authority else None)

    def changed(self) -> grpc.ServerCertificateConfiguration | None:
        """The same if the files are others now, None if not; gRPC asks before every handshake, in threads of its own.

        Files that cannot be used are logged, and the certificate stays.
        """
        stamp = stamps(*self._files)
        if stamp == self._stamp:
            return None
        self._stamp = stamp
        try:
            server_context(*self._files)
            return self.read()
        except (ConfigError, OSError) as problem:
            log.error("the certificate stays as it was: %s", problem)
            return None


def channel_credentials(certificate: str = "", key: str = "", authority: str = "") -> grpc.ChannelCredentials:
    """Credentials of a client; the server's certificate must be of the authority and name the host that is dialled.

    Arguments are PEM files. Without a certificate the client shows none; without an authority the server's must be one
    of those that the system trusts.

    Raises:
      ConfigError: a file cannot be read or is none of these.
    """
    if certificate:
        Tls.from_files(certificate, key, authority)
    elif authority:
        verifying_context(authority)
    return grpc.ssl_channel_credentials(
        *(Path(file).read_bytes() if file else None for file in (authority, key, certificate))
    )
