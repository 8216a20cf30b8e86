"""A server on a free port with a scripted service behind it, in the test's own event loop."""

from collections.abc import AsyncIterator

import grpc
import pytest
from scripted_server import MODEL, Running, Steps

from spotjax.api.server import ApiServer
from spotjax.testing.scripted_service import ScriptedService


@pytest.fixture
async def running() -> AsyncIterator[Running]:
    """Tokens come only as ``steps`` lets them."""
    steps = Steps()
    service = ScriptedService(delay=steps)
    server = ApiServer(readiness_interval=0.01)
    port = await server.start("127.0.0.1:0")
    await server.attach(service, MODEL)
    channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
    running = Running(service, server, steps, port, channel)
    yield running
    await channel.close()
    await service.stop()
    await running.server.stop()


@pytest.fixture
async def open_server(running: Running) -> Running:
    """Tokens come as fast as they can."""
    running.steps.let_all()
    return running
