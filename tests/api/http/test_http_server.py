"""The HTTP server beside gRPC: it listens, says how it is, and ends; what it refuses it refuses in OpenAI's schema."""

import asyncio
import socket
from collections.abc import AsyncIterator

import httpx
import pytest
from http_cases import PLAIN
from scripted_server import MODEL, Steps

from spotjax import __version__
from spotjax.api.backend import Backend
from spotjax.api.http.app import application
from spotjax.api.http.server import HttpServer
from spotjax.errors import ConfigError
from spotjax.testing.scripted_service import ScriptedService


@pytest.fixture
async def backend() -> AsyncIterator[Backend]:
    """Starting: there is no model yet."""
    backend = Backend()
    yield backend
    if isinstance(backend.service, ScriptedService):
        await backend.service.stop()


@pytest.fixture
async def client(backend: Backend) -> AsyncIterator[httpx.AsyncClient]:
    server = HttpServer(application(backend))
    port = await server.start("127.0.0.1:0")
    async with httpx.AsyncClient(verify=PLAIN, base_url=f"http://127.0.0.1:{port}") as client:
        yield client
    await server.stop()


def serve_scripted(backend: Backend) -> ScriptedService:
    """The model is there."""
    service = ScriptedService(delay=Steps())
    backend.service, backend.model = service, MODEL
    return service


async def test_a_server_that_starts_is_alive_not_ready_and_says_when_to_try_again(client: httpx.AsyncClient) -> None:
    alive, ready, version = [await client.get(path) for path in ("/health", "/ready", "/version")]
    assert (alive.status_code, alive.json()) == (200, {"status": "alive"})
    assert version.json() == {"version": __version__}
    assert (ready.status_code, ready.headers["retry-after"]) == (503, "1")
    assert ready.json()["error"] == {
        "message": "the server is starting, its model is still being loaded",
        "type": "service_unavailable_error", "param": None, "code": "unavailable",
    }  # fmt: skip


async def test_it_is_ready_while_it_takes_requests(client: httpx.AsyncClient, backend: Backend) -> None:
    service = serve_scripted(backend)
    assert (await client.get("/ready")).json() == {"status": "ready"}
    service.ready = False
    refused = await client.get("/ready")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
    service.ready, backend.draining = True, True
    refused = await client.get("/ready")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
    assert (await client.get("/health")).status_code == 200


async def test_what_does_not_exist_is_refused_in_openai_s_schema(client: httpx.AsyncClient) -> None:
    unknown, method, slash = await client.get("/v2"), await client.post("/health"), await client.get("/health/")
    assert (unknown.status_code, method.status_code, slash.status_code) == (404, 405, 404)
    assert unknown.json()["error"] == {
        "message": "GET /v2: Not Found", "type": "not_found_error", "param": None, "code": None,
    }  # fmt: skip
    assert set(method.headers["allow"].split(", ")) == {"GET", "HEAD"}


async def test_a_bug_is_logged_and_told_as_an_internal_error(
    client: httpx.AsyncClient, backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    backend.service = object()  # type: ignore[assignment]  # has no status
    broken = await client.get("/ready")
    assert (broken.status_code, broken.json()["error"]["type"]) == (500, "server_error")
    assert "GET /ready failed" in caplog.text and "has no attribute" in caplog.text
    assert "attribute" not in broken.text
    assert (await client.get("/health")).status_code == 200, "the connection is still of use"


async def test_a_taken_port_is_refused_with_what_to_do() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        server = HttpServer(application(Backend()))
        with pytest.raises(ConfigError, match=r"cannot serve HTTP on .*in use; give http another HOST:PORT, or off"):
            await server.start(f"127.0.0.1:{taken.getsockname()[1]}")
        await server.stop()
    with pytest.raises(ConfigError, match=r"cannot serve HTTP on no.such.host.invalid:1"):
        await HttpServer(application(Backend())).start("no.such.host.invalid:1")


async def test_the_port_is_free_again_once_the_server_stopped() -> None:
    first = HttpServer(application(Backend()))
    address = f"127.0.0.1:{await first.start('127.0.0.1:0')}"
    reader, writer = await asyncio.open_connection(*address.split(":"))  # idle: it does not hold the server up
    await first.stop(grace=60)
    assert await reader.read() == b""
    writer.close()
    second = HttpServer(application(Backend()))
    await second.start(address)
    await second.stop()


async def test_it_listens_on_ipv6() -> None:
    server = HttpServer(application(Backend()))
    port = await server.start("[::1]:0")
    async with httpx.AsyncClient(
        verify=PLAIN,
    ) as client:
        assert (await client.get(f"http://[::1]:{port}/health")).status_code == 200
    await server.stop()
