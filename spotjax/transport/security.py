"""Contexts of TLS. On the data plane it is mutual: both sides show a certificate of the same authority.

Certificates say who belongs to the fleet, not which machine it is: addresses of spot machines come and go, so host
names are not compared.
"""

from __future__ import annotations

import logging
import os
import ssl
from dataclasses import dataclass
from pathlib import Path

from spotjax.errors import ConfigError

log = logging.getLogger(__name__)


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
            context = new_context(purpose)
            context.check_hostname = False
            context.verify_mode = ssl.CERT_REQUIRED
            show(context, certificate, key)
            trust(context, authority)
            contexts.append(context)
        return Tls(server=contexts[0], client=contexts[1])


def server_context(certificate: str | Path, key: str | Path, authority: str | Path = "") -> ssl.SSLContext:
    """What a server shows its clients; with an authority they must show a certificate of it.

    Raises:
      ConfigError: a file cannot be read, or certificate and key do not belong together.
    """
    context = new_context(ssl.PROTOCOL_TLS_SERVER)
    show(context, certificate, key)
    if authority:
        trust(context, authority)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def renewing_context(certificate: str, key: str, authority: str = "") -> ssl.SSLContext:
    """The same for a server that runs for long: when its files are others, the next connection is shown those.

    Files that cannot be used then are logged, and the certificate stays.
    """
    first = current = server_context(certificate, key, authority)
    seen = stamps(certificate, key)

    def choose(connection: ssl.SSLSocket | ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        nonlocal current, seen
        if (now := stamps(certificate, key)) != seen:
            seen = now
            try:
                current = server_context(certificate, key, authority)
            except ConfigError as problem:
                log.error("the certificate stays as it was: %s", problem)
        connection.context = current

    first.sni_callback = choose
    return first


def stamps(*files: str) -> list[tuple[int, int] | None]:
    """What differs between versions of files; None for one that is not there."""
    return [stamp_of(file) for file in files if file]


def stamp_of(file: str) -> tuple[int, int] | None:
    """Of one file."""
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino


def verifying_context(authority: str | Path) -> ssl.SSLContext:
    """For clients that show no certificate. Raises ConfigError if the authority cannot be used."""
    context = new_context(ssl.PROTOCOL_TLS_CLIENT)
    trust(context, authority)
    return context


def new_context(purpose: int) -> ssl.SSLContext:
    """TLS 1.3 alone."""
    context = ssl.SSLContext(purpose)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context


def show(context: ssl.SSLContext, certificate: str | Path, key: str | Path) -> None:
    """Gives a context its own certificate; one that has one gets another. Raises ConfigError if it cannot be used."""
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"certificate {certificate} with key {key} cannot be used: {error}") from error


def trust(context: ssl.SSLContext, authority: str | Path) -> None:
    """Has a context believe in certificates of an authority. Raises ConfigError if it cannot be used."""
    try:
        context.load_verify_locations(authority)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"authority {authority} cannot be used: {error}") from error
