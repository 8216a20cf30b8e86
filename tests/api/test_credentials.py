"""Mutual TLS on gRPC, and services besides our own on the same port."""

import asyncio
import datetime
import ipaddress
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from scripted_server import MODEL

from spotjax import cli
from spotjax.api.errors import Unavailable
from spotjax.api.server import ApiServer
from spotjax.async_client import AsyncSpotjaxClient
from spotjax.errors import ConfigError
from spotjax.testing.scripted_service import ScriptedService
from spotjax.transport.credentials import channel_credentials, server_credentials


class Files(NamedTuple):
    """PEM files, in the order of the arguments."""

    certificate: str
    key: str
    authority: str

    @property
    def flags(self) -> list[str]:
        return [f"--tls-{name}={file}" for name, file in self._asdict().items()]


def issue(directory: Path) -> Files:
    """A new authority and a certificate of it for 127.0.0.1."""
    directory.mkdir()
    now = datetime.datetime.now(datetime.UTC)
    authority_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    authority = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, f"authority of {directory.name}")])

    def signed(subject: x509.Name, public: ec.EllipticCurvePublicKey, extension: x509.ExtensionType) -> bytes:
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(authority).public_key(public)
        builder = builder.serial_number(x509.random_serial_number()).add_extension(extension, critical=True)
        builder = builder.not_valid_before(now - datetime.timedelta(hours=1))
        builder = builder.not_valid_after(now + datetime.timedelta(hours=1))
        return builder.sign(authority_key, hashes.SHA256()).public_bytes(Encoding.PEM)

    member = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "member")])
    here = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    contents = Files(
        certificate=signed(member, key.public_key(), here).decode(),
        key=key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode(),
        authority=signed(authority, authority_key.public_key(), x509.BasicConstraints(True, None)).decode(),
    )
    for name, content in contents._asdict().items():
        (directory / name).write_text(content)
    return Files(*(str(directory / name) for name in Files._fields))


@pytest.fixture
def ours(tmp_path: Path) -> Files:
    return issue(tmp_path / "ours")


@pytest.fixture
async def address(ours: Files) -> AsyncIterator[str]:
    """Where a server with TLS is."""
    service = ScriptedService()
    server = ApiServer(credentials=server_credentials(*ours))
    port = await server.start("127.0.0.1:0")
    await server.attach(service, MODEL)
    yield f"127.0.0.1:{port}"
    await service.stop()
    await server.stop()


async def test_members_of_the_fleet_talk_and_nobody_else_does(address: str, ours: Files, tmp_path: Path) -> None:
    async with AsyncSpotjaxClient(address, credentials=channel_credentials(*ours)) as client:
        assert "".join([d.text async for d in client.generate("x", max_tokens=4)])
    theirs = issue(tmp_path / "theirs")
    impostor = Files(theirs.certificate, theirs.key, ours.authority)
    anonymous = grpc.ssl_channel_credentials(Path(ours.authority).read_bytes())
    for credentials in (None, channel_credentials(*theirs), channel_credentials(*impostor), anonymous):
        async with AsyncSpotjaxClient(address, patience=0, credentials=credentials) as client:
            with pytest.raises(Unavailable):
                await client.status()


async def test_commands_take_certificates(
    address: str, ours: Files, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert await asyncio.to_thread(cli.main, ["status", "--server", address, *ours.flags]) == 0
    assert "scripted" in capsys.readouterr().out
    for command in (["status"], ["generate", "x"], ["drain", "i-0"]):
        assert await asyncio.to_thread(cli.main, [*command, "--server", address]) == 1
        assert "no Spotjax server answers" in capsys.readouterr().err
    assert cli.main(["status", "--server", address, *ours.flags[:2]]) == 2
    assert "--tls-authority" in capsys.readouterr().err


def test_files_of_no_use_are_refused_by_name(ours: Files, tmp_path: Path) -> None:
    broken = tmp_path / "broken.pem"
    broken.write_text("no certificate")
    for files in (ours._replace(certificate=str(broken)), ours._replace(authority=str(broken))):
        for make in (server_credentials, channel_credentials):
            with pytest.raises(ConfigError, match=r"broken\.pem"):
                make(*files)
    with pytest.raises(ConfigError, match="absent"):
        server_credentials(*ours._replace(key="absent"))


def echo(service: str) -> grpc.GenericRpcHandler:
    async def answer(request: bytes, context: Any) -> bytes:
        return request

    return grpc.method_handlers_generic_handler(service, {"Echo": grpc.unary_unary_rpc_method_handler(answer)})


async def test_other_services_are_served_next_to_ours_from_the_start_or_later() -> None:
    server = ApiServer(handlers=[echo("a.A")])
    port = await server.start("127.0.0.1:0")
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        assert await channel.unary_unary("/a.A/Echo")(b"hello") == b"hello"
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await channel.unary_unary("/b.B/Echo")(b"hello")
        assert failure.value.code() is grpc.StatusCode.UNIMPLEMENTED
        server.add_handlers([echo("b.B")])
        assert await channel.unary_unary("/b.B/Echo")(b"hello") == b"hello"
    await server.stop()
