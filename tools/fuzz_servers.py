"""A server of each kind on free ports, and what is sent to them that nobody should send: raw bytes over sockets."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
import json
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random
from typing import Any

from spotjax.api.access.callers import Role
from spotjax.api.access.key_file import KeyRecord, hash_of, written
from spotjax.api.access.keyed_gate import KeyedGate
from spotjax.api.http.app import application
from spotjax.api.http.server import HttpServer
from spotjax.api.server import ApiServer
from spotjax.async_client import AsyncSpotjaxClient
from spotjax.protocol.beats import Beat
from spotjax.testing.scripted_service import ScriptedService
from spotjax.tools.fuzz_inputs import MODEL, damaged, frame
from spotjax.transport.credentials import server_credentials
from spotjax.transport.endpoint import Endpoint
from spotjax.transport.join_token import JoinToken
from spotjax.transport.security import renewing_context

ANSWER_SECONDS = 20.0
"""For a whole request to be answered."""
SILENCE_SECONDS = 0.05
"""For what is no whole request: whoever waits for the rest of it says nothing."""
KEY = "sjx-key-for-fuzzing"
LARGE_BYTES = 10 << 20


class Servers:
    """Everything that listens, with a service behind it that needs no devices.

    Attributes:
      ports: by name: ``grpc``, ``grpc-tls``, ``https``, ``data``, ``data-token``.
      http: the port of plain HTTP.
    """

    def __init__(self) -> None:
        self.ports: dict[str, int] = {}
        self.http = 0


@contextlib.asynccontextmanager
async def serving(directory: Path) -> AsyncIterator[Servers]:
    """Servers on 127.0.0.1, which end with the context; their files are in the directory."""
    certificate, key = self_signed(directory)
    keys = directory / "keys.toml"
    keys.write_text(written({"fuzz": KeyRecord(hash=hash_of(KEY), role=Role.ADMIN)}))
    clock = asyncio.get_running_loop().time
    servers, service = Servers(), ScriptedService()
    plain = ApiServer(gate=KeyedGate(keys, clock))
    secure = ApiServer(credentials=server_credentials(certificate, key), gate=KeyedGate(keys, clock))
    http = HttpServer(application(plain.backend, None))
    https = HttpServer(application(secure.backend, None), renewing_context(certificate, key))
    data = [Endpoint(Beat, lambda *frame: None, token=token) for token in (None, JoinToken("x" * 43))]
    servers.ports["grpc"] = await plain.start("127.0.0.1:0")
    servers.ports["grpc-tls"] = await secure.start("127.0.0.1:0")
    servers.http = await http.start("127.0.0.1:0")
    servers.ports["https"] = await https.start("127.0.0.1:0")
    for name, endpoint in zip(("data", "data-token"), data, strict=True):
        servers.ports[name] = await endpoint.listen("127.0.0.1:0")
    for server in (plain, secure):
        await server.attach(service, MODEL)
    try:
        yield servers
    finally:
        await service.stop()
        ending = (plain.stop(), secure.stop(), http.stop(), https.stop(), *(endpoint.close() for endpoint in data))
        await asyncio.gather(*ending)


def self_signed(directory: Path) -> tuple[str, str]:
    """Files of a certificate for 127.0.0.1 and its key. Needs ``cryptography``, of the extra ``test``."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "fuzz")])
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .sign(key, hashes.SHA256())
    )
    files = directory / "certificate.pem", directory / "key.pem"
    files[0].write_bytes(certificate.public_bytes(Encoding.PEM))
    files[1].write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return str(files[0]), str(files[1])


# -- any port

FIRST_BYTES = (
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00",
    b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n",
    b"SJ\x01\x01",
    b"SJ\x01\x41" + b"\0" * 64,
    b"SJ\x01\xc2",
)


async def try_port(servers: Servers, draw: Random) -> bool:
    """Garbage at some port, in a connection of its own. Returns whether anything came back."""
    port = draw.choice(list(servers.ports.values()))
    content = damaged(draw, draw.choice(FIRST_BYTES) + (frame(draw) if draw.random() < 0.3 else b""))
    return bool(await exchanged(port, content, SILENCE_SECONDS))


async def exchanged(port: int, content: bytes, seconds: float) -> bytes:
    """What comes back, until the head of an answer is there, the connection ends, or nothing came for long."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    got = b""
    try:
        writer.write(content)
        async with asyncio.timeout(seconds):
            await writer.drain()
            while b"\r\n\r\n" not in got and (more := await reader.read(65536)):
                got += more
    except (TimeoutError, ConnectionError):
        pass
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
    return got


# -- HTTP

VALUES: tuple[Any, ...] = (
    None, True, 0, 1, -1, 2**63, 2**70, 1e400, -0.0, 0.5, "", "x", "\0", "\U0001f600", [], [1], ["x"] * 20, {},
    {"a": 1}, [[1, 2]], {"type": "json_object"}, {"include_usage": True},
)  # fmt: skip
FIELDS = (
    "prompt", "messages", "model", "max_tokens", "max_completion_tokens", "temperature", "top_p", "n", "stop", "seed",
    "logprobs", "top_logprobs", "logit_bias", "presence_penalty", "frequency_penalty", "stream", "stream_options",
    "user", "tools", "tool_choice", "response_format", "echo", "best_of", "suffix", "unknown",
)  # fmt: skip
PATHS = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/models",
    "/fleet/preempt",
    "/health",
    "/metrics",
    "/../x",
    "/%00",
)
VERBS = ("POST", "POST", "POST", "GET", "PUT", "DELETE", "HEAD", "OPTIONS", "X")


def body(draw: Random) -> bytes:
    """JSON that is a request, nearly one, or deeper than anybody would nest it."""
    if draw.random() < 0.02:
        return b"[" * draw.choice((100, 5000, 100_000))
    asked: dict[str, Any] = {"model": "scripted", "prompt": "x", "max_tokens": 2}
    if draw.random() < 0.5:
        del asked["prompt"]
        asked["messages"] = draw.choice(([{"role": "user", "content": "x"}], *VALUES))
    for _ in range(draw.randrange(4)):
        asked[draw.choice(FIELDS)] = draw.choice(VALUES)
    content = json.dumps(asked).encode()
    return damaged(draw, content) if draw.random() < 0.3 else content


def http_request(draw: Random) -> tuple[bytes, bool]:
    """A request, and whether it is a whole one."""
    content = body(draw)
    headers = [
        b"Host: 127.0.0.1", b"Content-Type: " + draw.choice((b"application/json", b"application/json", b"text/plain")),
        b"Content-Length: %d" % len(content), b"Connection: close",
    ]  # fmt: skip
    if draw.random() < 0.9:
        headers.append(b"Authorization: Bearer " + draw.choice((KEY.encode(), KEY.encode(), b"wrong", b"\xff")))
    if draw.random() < 0.1:
        headers.append(b"Last-Event-ID: " + draw.choice((b"x", b"1:2", b"\xff" * 100)))
    if draw.random() < 0.1:
        headers.append(b"Idempotency-Key: " + draw.choice((b"x", b"a" * 5000)))
    line = f"{draw.choice(VERBS)} {draw.choice(PATHS)} HTTP/1.1".encode()
    whole = b"\r\n".join([line, *headers, b"", content])
    return (damaged(draw, whole), False) if draw.random() < 0.3 else (whole, True)


async def try_http(servers: Servers, draw: Random) -> bool:
    """A request over HTTP. Returns whether it was answered with success; an answer of 500 or more is a bug.

    503 says that the server cannot take it now, which is no answer to a bad request either.
    """
    content, whole = http_request(draw)
    got = await exchanged(servers.http, content, ANSWER_SECONDS if whole else SILENCE_SECONDS)
    status = status_of(got)
    if status is None and whole:
        raise AssertionError(f"a whole request was not answered: {got[:200]!r}")
    if status is not None and status >= 500:
        raise AssertionError(f"{status}: {got[:400]!r}")
    return status is not None and status < 300


async def try_large(servers: Servers) -> None:
    """A body of 10 MB, which is refused and not kept."""
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        b"Authorization: Bearer %b\r\nContent-Length: %d\r\n\r\n"
    )
    got = await exchanged(servers.http, head % (KEY.encode(), LARGE_BYTES) + b"x" * LARGE_BYTES, ANSWER_SECONDS)
    assert status_of(got) == 413, f"10 MB were answered with {got[:200]!r}"


async def require_well(servers: Servers) -> None:
    """Raises AssertionError unless all ports still take connections, and HTTP answers."""
    got = await exchanged(servers.http, b"GET /ready HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", ANSWER_SECONDS)
    assert status_of(got) == 200, f"the server is not well: {got[:200]!r}"
    for port in servers.ports.values():
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.close()
    async with AsyncSpotjaxClient(f"127.0.0.1:{servers.ports['grpc']}", patience=0, api_key=KEY) as client:
        assert [delta async for delta in client.generate("x", max_tokens=2)], "gRPC does not answer"


def status_of(answer: bytes) -> int | None:
    """Of the head of an answer over HTTP; None if it is none."""
    line = answer.partition(b"\r\n")[0].split()
    return int(line[1]) if len(line) > 1 and line[0].startswith(b"HTTP/") and line[1].isdigit() else None
