"""Headers, an endpoint's inbox, a proxy that misbehaves, and certificates."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import functools
import itertools
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from spotjax.transport.connection import Connection
from spotjax.transport.endpoint import Endpoint
from spotjax.transport.security import Tls
from spotjax.transport.sockets import join_address, split_address


class Step(msgspec.Struct, tag=True, frozen=True):
    """A header."""

    number: int
    note: str = ""


class Result(msgspec.Struct, tag=True, frozen=True):
    """Another header."""

    tokens: list[int]


Header = Step | Result


class Inbox:
    """An endpoint and the frames that it gets."""

    endpoint: Endpoint

    def __init__(self) -> None:
        self.frames: asyncio.Queue[tuple[Connection, Header, memoryview]] = asyncio.Queue()

    def receive(self, connection: Connection, header: Header, payload: memoryview) -> None:
        self.frames.put_nowait((connection, header, payload))

    async def next(self) -> tuple[Connection, Header, memoryview]:
        """The next frame."""
        return await asyncio.wait_for(self.frames.get(), 5)


class Proxy:
    """Forwards connections to ``target``, in threads of its own.

    ``answer(connection, position, data)`` says what becomes of bytes that the target sends: connections count from 0,
    positions are bytes since the connection began; None cuts the connection, ``b""`` swallows.
    """

    def __init__(self, target: str, answer: Callable[[int, int, bytes], bytes | None]) -> None:
        self._target, self._answer = split_address(target), answer
        self.connections = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = join_address(self._listener.getsockname())
        self._sockets = [self._listener]
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    def _start(self, target: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                caller, _ = self._listener.accept()
                self._sockets.append(caller)
                called = socket.create_connection(self._target)
                self._sockets.append(called)
                answer = functools.partial(self._answer, self.connections)
                self.connections += 1
                self._start(self._pump, caller, called, lambda position, data: data)
                self._start(self._pump, called, caller, answer)

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket, change: Callable[[int, bytes], bytes | None]) -> None:
        position = 0
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                changed = change(position, data)
                position += len(data)
                if changed is None:
                    break
                sink.sendall(changed)
        for sock in (source, sink):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Cuts everything."""
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for sock in self._sockets:
            sock.close()


class Net:
    """Makes endpoints and proxies, and closes them."""

    def __init__(self) -> None:
        self.endpoints: list[Endpoint] = []
        self.proxies: list[Proxy] = []

    async def listening(self, **settings: Any) -> tuple[str, Inbox]:
        """An endpoint's address and what it gets."""
        inbox = self.endpoint(**settings)
        return f"127.0.0.1:{await inbox.endpoint.listen('127.0.0.1:0')}", inbox

    def endpoint(self, **settings: Any) -> Inbox:
        """An endpoint that keeps what it gets."""
        inbox = Inbox()
        inbox.endpoint = Endpoint(Header, settings.pop("receive", inbox.receive), **settings)
        self.endpoints.append(inbox.endpoint)
        return inbox

    def proxy(self, target: str, answer: Callable[[int, int, bytes], bytes | None]) -> Proxy:
        """A proxy before ``target``."""
        proxy = Proxy(target, answer)
        self.proxies.append(proxy)
        return proxy


class Authority:
    """Signs certificates for processes of a fleet."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._names = itertools.count()
        self._key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fleet authority")])
        certificate = self._certificate(name, name, self._key.public_key(), authority=True)
        self.file = directory / "authority.pem"
        self.file.write_bytes(certificate.public_bytes(Encoding.PEM))
        self._name = name

    def _certificate(
        self, subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, *, authority: bool, days: int = 1
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=3))
            .not_valid_after(now + datetime.timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .sign(self._key, hashes.SHA256())
        )

    def files(self, *, days: int = 1) -> tuple[Path, Path]:
        """A certificate that ends in ``days`` days, and its key."""
        number = next(self._names)
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"worker {number}")])
        certificate = self._certificate(subject, self._name, key.public_key(), authority=False, days=days)
        files = self._directory / f"{number}.pem", self._directory / f"{number}.key"
        files[0].write_bytes(certificate.public_bytes(Encoding.PEM))
        files[1].write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return files

    def tls(self, *, trusts: Authority | None = None, days: int = 1) -> Tls:
        """Contexts of a process with a certificate of this authority that trusts certificates of ``trusts``."""
        return Tls.from_files(*self.files(days=days), (trusts or self).file)
