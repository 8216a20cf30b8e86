"""TLS for clients without certificates of their own, over gRPC and HTTP; renewed certificates; garbage on TLS ports."""

from __future__ import annotations

import asyncio
import random
import shutil
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from certificates import Files, certificates
from cryptography import x509
from scripted_server import MODEL

from spotjax import cli
from spotjax.api.errors import Unavailable
from spotjax.api.http.app import application
from spotjax.api.http.server import HttpServer
from spotjax.api.server import ApiServer
from spotjax.async_client import AsyncSpotjaxClient
from spotjax.testing.scripted_service import ScriptedService
from spotjax.transport.credentials import channel_credentials, server_credentials
from spotjax.transport.security import renewing_context, server_context, verifying_context


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return certificates(tmp_path)


@pytest.fixture
async def ports(files: Files) -> AsyncIterator[tuple[int, int]]:
    """Of gRPC and HTTPS, which ask for no certificate."""
    service = ScriptedService()
    server = ApiServer(credentials=server_credentials(files.certificate, files.key))
    http = HttpServer(application(server.backend), renewing_context(files.certificate, files.key))
    grpc_port, http_port = await server.start("127.0.0.1:0"), await http.start("127.0.0.1:0")
    await server.attach(service, MODEL)
    yield grpc_port, http_port
    await service.stop()
    await asyncio.gather(server.stop(), http.stop())


async def shown(port: int, authority: str) -> int:
    """Serial number of the certificate that a port shows, which must be of the authority and for 127.0.0.1."""
    _, writer = await asyncio.open_connection(
        "127.0.0.1", port, ssl=verifying_context(authority), server_hostname="127.0.0.1"
    )
    content = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    return x509.load_der_x509_certificate(content).serial_number


async def test_clients_need_only_the_authority(
    ports: tuple[int, int], files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    address = f"127.0.0.1:{ports[0]}"
    credentials = channel_credentials(authority=files.authority)
    async with AsyncSpotjaxClient(address, credentials=credentials) as client:
        assert [delta async for delta in client.generate("x", max_tokens=2)]
    for stranger in (None, channel_credentials()):  # plaintext, and one that trusts the system's authorities
        async with AsyncSpotjaxClient(address, patience=0, credentials=stranger) as client:
            with pytest.raises(Unavailable):
                await client.status()
    command = ["status", "--server", address, "--tls-authority", files.authority]
    assert await asyncio.to_thread(cli.main, command) == 0
    assert "scripted" in capsys.readouterr().out
    assert cli.main([*command, "--tls-certificate", files.certificate]) == 2


async def test_https_answers_where_http_does_not(ports: tuple[int, int], files: Files) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", ports[1], ssl=verifying_context(files.authority))
    writer.write(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
    assert (await reader.read()).startswith(b"HTTP/1.1 200 OK")
    writer.close()
    reader, writer = await asyncio.open_connection("127.0.0.1", ports[1])
    writer.write(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    assert b"200" not in await reader.read()
    writer.close()


async def test_a_renewed_certificate_is_shown_from_the_next_connection_on_and_a_broken_one_is_not(
    ports: tuple[int, int], files: Files, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = {await shown(port, files.authority) for port in ports}
    (tmp_path / "new").mkdir()
    renewed = certificates(tmp_path / "new")
    for old, new in zip(files, renewed, strict=True):
        shutil.move(new, old)
    after = {await shown(port, files.authority) for port in ports}
    assert len(before) == len(after) == 1 and before != after
    Path(files.certificate).write_text("no certificate")
    assert {await shown(port, files.authority) for port in ports} == after
    assert caplog.text.count("the certificate stays as it was") == 2


def test_a_server_with_an_authority_wants_certificates(files: Files) -> None:
    assert server_context(*files).verify_mode is ssl.CERT_REQUIRED
    assert server_context(*files[:2]).verify_mode is ssl.CERT_NONE


async def test_garbage_on_tls_ports_ends_its_connection_and_nothing_else(ports: tuple[int, int], files: Files) -> None:
    draw = random.Random(9)
    first = [b"\x16\x03\x01", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"", b"\x00"]

    async def garbage(port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(draw.choice(first) + draw.randbytes(draw.randrange(400)))
            writer.write_eof()
            async with asyncio.timeout(15):
                await reader.read()
        except ConnectionError:
            pass
        finally:
            writer.close()

    for _ in range(8):
        await asyncio.gather(*(garbage(port) for port in ports for _ in range(8)))
    assert len({await shown(port, files.authority) for port in ports}) == 1
