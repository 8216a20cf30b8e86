"""Clients that read slowly, or not at all: they hold no memory, and lose nothing that they can come back for."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import re
import socket
import weakref
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import pytest
from http_cases import Web, chat_body, events_of
from scripted_server import until

from spotjax.api.http.event_stream import EventStream

LARGE = {"n": 16, "logprobs": True, "top_logprobs": 20, "stream": True, "seed": 7}
"""Megabytes: more than sockets hold."""
PIECE = 1 << 20
"""More than one delta of one choice comes to."""


@contextlib.asynccontextmanager
async def asked(web: Web, **headers: str) -> AsyncIterator[asyncio.StreamReader]:
    """A client that has asked for much, and reads only what is read here."""
    small = socket.socket()
    small.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    small.setblocking(False)
    host, _, port = web.address.partition(":")
    await asyncio.get_running_loop().sock_connect(small, (host, int(port)))
    reader, writer = await asyncio.open_connection(sock=small, limit=4096)
    body = json.dumps(chat_body(**LARGE)).encode()
    told = {"host": web.address, "content-type": "application/json", "content-length": str(len(body)), **headers}
    lines = [f"{name}: {value}" for name, value in told.items()]
    writer.write("\r\n".join(["POST /v1/chat/completions HTTP/1.1", *lines, "", ""]).encode() + body)
    try:
        yield reader
    finally:
        writer.close()


def held(web: Web) -> int:
    """Bytes that the server keeps for clients."""
    return sum(c.transport.get_write_buffer_size() for c in web.server._server.server_state.connections)


@pytest.mark.parametrize("key", [{}, {"idempotency-key": "mine"}])
async def test_a_client_that_reads_nothing_is_dropped_and_can_come_back_for_what_is_resumable(
    open_web: Web, monkeypatch: pytest.MonkeyPatch, key: dict[str, str]
) -> None:
    monkeypatch.setattr(EventStream, "stuck_seconds", 0.3)
    most = 0
    async with asked(open_web, **key):
        connections = open_web.server._server.server_state.connections
        await until(lambda: held(open_web))
        while connections:
            most = max(most, held(open_web))
            await asyncio.sleep(0.01)
    assert most < PIECE + (1 << 16)
    (request,) = open_web.service.requests.values()
    assert request.finished
    if key:
        async with open_web.client.stream(
            "POST", "/v1/chat/completions", json=chat_body(**LARGE), headers=key
        ) as response:
            events = [event async for event in events_of(response)]
        text = "".join(
            e.data["choices"][0]["delta"].get("content", "") for e in events[:-1] if e.data["choices"][0]["index"] == 3
        )
        assert text == request.script[3][1]


async def test_a_client_that_reads_slowly_gets_all_of_it(open_web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EventStream, "stuck_seconds", 0.5)
    got = bytearray()
    async with asked(open_web) as reader:
        await until(lambda: held(open_web))
        await asyncio.sleep(0.3)  # not long enough to be dropped
        while b"[DONE]" not in got[-100:]:
            piece = await reader.read(1 << 16)
            assert piece, "it was dropped"
            got += piece
    (request,) = open_web.service.requests.values()
    written = re.findall(rb'"index":3,"delta":{"content":"([a-z]+)"}', b"".join(got.split(b"\r\n")))
    assert b"".join(written).decode() == request.script[3][1]


async def test_a_stream_without_events_says_that_it_is_there(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EventStream, "quiet_seconds", 0.05)
    async with web.client.stream("POST", "/v1/completions", json={"prompt": "x", "stream": True}) as response:
        lines = response.aiter_lines()
        assert [await anext(lines) for _ in range(4)] == [": waiting", "", ": waiting", ""]
        web.steps.let_all()
        assert [line async for line in lines][-2:] == ["data: [DONE]", ""]


async def test_a_stream_that_is_quiet_for_long_keeps_nothing_of_its_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EventStream, "quiet_seconds", 0.001)
    senders: list[weakref.ref[Any]] = []
    enough = asyncio.Event()

    async def quiet() -> AsyncGenerator[bytes, None]:
        await enough.wait()
        yield b"data: 1\n\n"

    async def send(message: Any) -> None:
        senders.append(weakref.ref(asyncio.current_task()))
        if len(senders) == 20:
            enough.set()

    async def receive() -> Any:
        await asyncio.Event().wait()

    streaming = asyncio.create_task(EventStream(quiet(), {}, lambda: None)({"type": "http"}, receive, send))
    await enough.wait()
    gc.collect()
    assert len({id(task) for sender in senders if (task := sender()) is not None}) <= 3
    await streaming
