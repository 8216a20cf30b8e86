"""A live server with a scripted service behind it, for the commands to talk to."""

from collections.abc import AsyncIterator

import pytest
from command_line import CommandLine

from spotjax.api.server import ApiServer
from spotjax.api.validation import ServedModel
from spotjax.testing.scripted_service import ByteTokenizer, ScriptedService, ScriptedStructures


@pytest.fixture
async def command_line(capsys: pytest.CaptureFixture[str]) -> AsyncIterator[CommandLine]:
    service = ScriptedService()
    server = ApiServer()
    port = await server.start("127.0.0.1:0")
    await server.attach(service, ServedModel("scripted", ByteTokenizer(), 512, ScriptedStructures()))
    command_line = CommandLine(service, server, f"127.0.0.1:{port}", capsys)
    yield command_line
    await service.stop()
    await command_line.server.stop()
