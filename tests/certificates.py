"""Certificates of an authority of our own, for tests of mutual TLS between processes on this machine."""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

ADDRESS = ipaddress.ip_address("127.0.0.1")


class Files(NamedTuple):
    """PEM files."""

    certificate: str
    key: str
    authority: str

    @property
    def flags(self) -> tuple[str, ...]:
        """For ``spotjax serve``."""
        return ("--tls-certificate", self.certificate, "--tls-key", self.key, "--tls-authority", self.authority)


def certificates(directory: Path) -> Files:
    """One certificate for 127.0.0.1, its key, and the authority that signed it."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "authority of a test")])
    authority, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.now(datetime.UTC)

    def signed(subject: x509.Name, public: ec.EllipticCurvePublicKey, *, is_authority: bool) -> bytes:
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(name)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
        )
        if not is_authority:
            builder = builder.add_extension(x509.SubjectAlternativeName([x509.IPAddress(ADDRESS)]), critical=False)
        return builder.sign(authority, hashes.SHA256()).public_bytes(Encoding.PEM)

    files = Files(*(str(directory / name) for name in ("certificate.pem", "key.pem", "authority.pem")))
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a test")])
    Path(files.certificate).write_bytes(signed(subject, key.public_key(), is_authority=False))
    Path(files.key).write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    Path(files.authority).write_bytes(signed(name, authority.public_key(), is_authority=True))
    return files
