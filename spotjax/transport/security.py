"""Mutual TLS for the data plane: both sides show a certificate of the same authority.

Certificates say who belongs to the fleet, not which machine it is: addresses of spot machines come and go, so host
names are not compared.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

from spotjax.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Tls:
    """The contexts of one process: ``server`` for connections it takes, ``client`` for those it makes."""

    server: ssl.SSLContext
    client: ssl.SSLContext

    @staticmethod
    def from_files(certificate: str | Path, key: str | Path, authority: str | Path) -> Tls:
        """Contexts from PEM files: this process's certificate and key, and the authority's certificate.

        TLS 1.3, and a certificate of the authority required from the other side, whoever called.

        Raises:
          ConfigError: a file cannot be read, or certificate and key do not belong together.
        """
        contexts = []
        for purpose in (ssl.PROTOCOL_TLS_SERVER, ssl.PROTOCOL_TLS_CLIENT):
            context = ssl.SSLContext(purpose)
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            context.check_hostname = False
            context.verify_mode = ssl.CERT_REQUIRED
            try:
                context.load_cert_chain(certificate, key)
            except (OSError, ssl.SSLError) as error:
                raise ConfigError(f"certificate {certificate} with key {key} cannot be used: {error}") from error
            try:
                context.load_verify_locations(authority)
            except (OSError, ssl.SSLError) as error:
                raise ConfigError(f"authority {authority} cannot be used: {error}") from error
            contexts.append(context)
        return Tls(server=contexts[0], client=contexts[1])
