"""Headers, an endpoint's inbox, a proxy that misbehaves, and certificates."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import itertools
from collections.abc import Callable
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from spotjax.transport.connection import Connection
from spotjax.transport.endpoint import Endpoint
from spotjax.transport.security import Tls


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
    """Forwards connections to ``target``.

    ``answer(connection, position, data)`` says what becomes of bytes that the target sends: connections count from 0,
    positions are bytes since the connection began; None cuts the connection, ``b""`` swallows.
    """

    def __init__(self, target: str, answer: Callable[[int, int, bytes], bytes | None]) -> None:
        self.host, port = target.rsplit(":", 1)
        self.port = int(port)
        self.answer = answer
        self.connections = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def listen(self) -> str:
        """Starts; the address."""
        self._server = await asyncio.start_server(self._forward, "127.0.0.1", 0)
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        number, self.connections = self.connections, self.connections + 1
        there, back = await asyncio.open_connection(self.host, self.port)

        async def asks() -> None:
            while data := await reader.read(1 << 16):
                back.write(data)
                await back.drain()

        async def answers() -> None:
            position = 0
            while data := await there.read(1 << 16):
                changed = self.answer(number, position, data)
                position += len(data)
                if changed is None:
                    return
                writer.write(changed)
                await writer.drain()

        pumps = [asyncio.ensure_future(asks()), asyncio.ensure_future(answers())]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            for stream in (writer, back):
                stream.transport.abort()
                with contextlib.suppress(OSError):
                    await stream.wait_closed()
            self._tasks.discard(task)

    async def close(self) -> None:
        """Cuts everything."""
        assert self._server is not None
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()


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
