"""A server over HTTP on a free port, in the test's own event loop."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest
from http_cases import PLAIN, Web
from scripted_server import MODEL, Steps

from spotjax.api.backend import Backend
from spotjax.api.http.app import application
from spotjax.api.http.server import HttpServer
from spotjax.testing.scripted_service import ScriptedService


@pytest.fixture
async def web() -> AsyncIterator[Web]:
    """Tokens come only as ``steps`` lets them."""
    steps, backend = Steps(), Backend()
    service = ScriptedService(delay=steps)
    backend.attach(service, MODEL)
    server = HttpServer(application(backend))
    address = f"127.0.0.1:{await server.start('127.0.0.1:0')}"
    async with httpx.AsyncClient(base_url=f"http://{address}", timeout=60, verify=PLAIN) as client:
        yield Web(backend, service, server, steps, address, client)
    await service.stop()
    await server.stop()


@pytest.fixture
async def open_web(web: Web) -> Web:
    """Tokens come as fast as they can."""
    web.steps.let_all()
    return web
