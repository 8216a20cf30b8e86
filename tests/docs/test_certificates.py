"""The commands that make certificates, as docs/fleet.md shows them, make some that all connections take."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from pathlib import Path

import pytest
from documents import ROOT, blocks

from spotjax.api.server import ApiServer
from spotjax.api.validation import ServedModel
from spotjax.async_client import AsyncSpotjaxClient
from spotjax.protocol.beats import Beat
from spotjax.testing.scripted_service import ByteTokenizer, ScriptedService
from spotjax.transport.connection import Connection
from spotjax.transport.credentials import channel_credentials, server_credentials
from spotjax.transport.endpoint import Endpoint
from spotjax.transport.security import Tls

SHOWN = "10.0.0.1"


def files(directory: Path, name: str) -> tuple[str, str, str]:
    """Certificate, key and authority of one process."""
    return str(directory / f"{name}.pem"), str(directory / f"{name}-key.pem"), str(directory / "authority.pem")


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """Where the commands have been run, for a controller at 127.0.0.1."""
    openssl = shutil.which("openssl")
    said = subprocess.run([openssl, "version"], capture_output=True, text=True).stdout if openssl else "none"
    if not said.startswith("OpenSSL 3"):
        pytest.skip(f"the commands are for OpenSSL 3, here is {said.strip()}")
    (script,) = blocks((ROOT / "docs/fleet.md").read_text(), "sh")
    assert SHOWN in script
    script = f"set -e\n{script.replace(SHOWN, '127.0.0.1')}"
    subprocess.run(["bash", "-c", script], cwd=tmp_path, check=True, capture_output=True, timeout=60)
    return tmp_path


async def test_clients_with_the_certificates_are_served(made: Path) -> None:
    service, server = ScriptedService(), ApiServer(credentials=server_credentials(*files(made, "controller")))
    address = f"127.0.0.1:{await server.start('127.0.0.1:0')}"
    await server.attach(service, ServedModel("scripted", ByteTokenizer(), max_model_len=64))
    async with AsyncSpotjaxClient(address, credentials=channel_credentials(*files(made, "worker"))) as client:
        assert (await client.status()).model == "scripted"
    await service.stop()
    await server.stop()


async def test_workers_reach_the_data_plane_with_them(made: Path) -> None:
    arrived: asyncio.Future[Beat] = asyncio.get_running_loop().create_future()

    def receive(connection: Connection, header: Beat, payload: memoryview) -> None:
        arrived.set_result(header)

    controller = Endpoint(Beat, receive, tls=Tls.from_files(*files(made, "controller")))
    worker = Endpoint(Beat, receive, tls=Tls.from_files(*files(made, "worker")))
    try:
        connection = await worker.connect(f"127.0.0.1:{await controller.listen('127.0.0.1:0')}", 10)
        connection.send(Beat("spot-a", "1"))
        assert (await asyncio.wait_for(arrived, 10)).instance == "spot-a"
    finally:
        await worker.close()
        await controller.close()
