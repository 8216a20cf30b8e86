"""What a connection may take before there is a request: clients that send too much, too slowly, or no HTTP at all."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from http_cases import Web

from spotjax.api.http import connection, reading


async def answer_to(web: Web, *pieces: bytes, then_wait: bool = True) -> tuple[int, dict[str, Any]]:
    """Status and error that the server ends the connection with."""
    host, _, port = web.address.partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
        told = await asyncio.wait_for(reader.read(), 30)
    finally:
        writer.close()
    head, _, body = told.partition(b"\r\n\r\n")
    assert b"connection: close" in head.lower()
    return int(head.split()[1]), json.loads(body)["error"]


POST = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"


@pytest.mark.parametrize(
    "pieces",
    [
        [POST, b"x: " + b"a" * 100_000 + b"\r\n\r\n"],
        [POST, *([b"x: " + b"a" * 1000 + b"\r\n"] * 70)],
        [b"GET /" + b"a" * 100_000],
        [POST + b"x: " + b"a" * 70_000 + b"\r\n\r\n"],
    ],
    ids=["one header", "many headers", "the path", "all at once"],
)
async def test_a_head_that_is_too_large_is_refused(open_web: Web, pieces: list[bytes]) -> None:
    status, error = await answer_to(open_web, *pieces)
    assert (status, error["code"]) == (431, "headers_too_large") and "65536" in error["message"]


async def test_what_is_no_http_is_refused(open_web: Web) -> None:
    for garbage in (b"\x16\x03\x01\x02\x00" + b"\0" * 100, b"hello\r\n\r\n", b"GET / HTTP/1.1\r\nbad header\r\n\r\n"):
        status, error = await answer_to(open_web, garbage)
        assert (status, error["code"]) == (400, "bad_request")


async def test_who_says_nothing_or_not_enough_is_told_so(open_web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.1)
    health = b"GET /health HTTP/1.1\r\nhost: localhost\r\n"
    for pieces in ([], [health]):
        assert (await answer_to(open_web, *pieces))[0] == 408
    monkeypatch.setattr(reading, "BODY_SECONDS", 0.1)
    asked = POST + b"content-type: application/json\r\ncontent-length: 5\r\n\r\n{"
    status, error = await answer_to(open_web, asked)
    assert status == 408 and "body did not come" in error["message"]


async def test_a_connection_may_rest_between_requests_but_not_within_one(
    open_web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.1)
    host, _, port = open_web.address.partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    health = b"GET /health HTTP/1.1\r\nhost: localhost\r\n"
    for pause in (0.3, 0.0):
        writer.write(health + b"\r\n")
        assert (await reader.readuntil(b"}")).startswith(b"HTTP/1.1 200")
        await asyncio.sleep(pause)
    writer.write(health)
    assert (await reader.read()).startswith(b"HTTP/1.1 408")
    writer.close()


async def test_there_are_so_many_connections_at_most(open_web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "MAX_CONNECTIONS", 2)
    host, _, port = open_web.address.partition(":")
    held = [await asyncio.open_connection(host, int(port)) for _ in range(2)]
    status, error = await answer_to(open_web)
    assert (status, error["code"]) == (503, "too_many_connections")
    for _, writer in held:
        writer.close()
        await writer.wait_closed()
    assert (await open_web.client.get("/health")).status_code == 200
