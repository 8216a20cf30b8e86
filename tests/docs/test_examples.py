"""The Python examples of the documents run as they stand, against a server with a scripted service."""

from __future__ import annotations

import asyncio
import contextlib
import io
from collections.abc import AsyncIterator

import pytest
from documents import DOCUMENTS, blocks

from spotjax.api.http.app import application
from spotjax.api.http.server import HttpServer
from spotjax.api.server import ApiServer
from spotjax.api.validation import ServedModel
from spotjax.testing.scripted_service import ByteTokenizer, ScriptedService, ScriptedStructures

SHOWN = "127.0.0.1:8470"
SHOWN_HTTP = "127.0.0.1:8471"
EXAMPLES = [(path.name, code) for path in DOCUMENTS for code in blocks(path.read_text(), "python")]


@pytest.fixture
async def addresses() -> AsyncIterator[dict[str, str]]:
    """Where the server is, by where documents have it."""
    service = ScriptedService()
    server = ApiServer()
    port = await server.start("127.0.0.1:0")
    await server.attach(service, ServedModel("tiny", ByteTokenizer(), 512, ScriptedStructures()))
    http = HttpServer(application(server.backend))
    yield {SHOWN: f"127.0.0.1:{port}", SHOWN_HTTP: f"127.0.0.1:{await http.start('127.0.0.1:0')}"}
    await service.stop()
    await http.stop()
    await server.stop()


@pytest.mark.parametrize("number", range(len(EXAMPLES)), ids=lambda number: f"{EXAMPLES[number][0]}-{number}")
async def test_the_example_runs_and_prints_something_unless_it_asserts(addresses: dict[str, str], number: int) -> None:
    _, code = EXAMPLES[number]
    assert SHOWN in code or SHOWN_HTTP in code
    for shown, real in addresses.items():
        code = code.replace(shown, real)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        await asyncio.to_thread(exec, code, {"__name__": "__main__"})
    assert printed.getvalue() or "assert " in code
