"""What the tests of HTTP share: a server with a scripted service behind it, and its events as clients see them."""

from __future__ import annotations

import json
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx
from scripted_server import Steps

from spotjax.api.backend import Backend
from spotjax.api.http.server import HttpServer
from spotjax.testing.scripted_generation import scripted_token
from spotjax.testing.scripted_service import ScriptedService

PLAIN = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""Knows no authorities, which takes a tenth of a second to read: nothing here is encrypted."""


RENDERED = b"user: Hi\nassistant: "


def expected(prompt: bytes, count: int, seed: int = 7, choice: int = 0, start: bool = False) -> str:
    """What the scripted service generates."""
    tokens = [256] * start + list(prompt)
    return "".join(chr(scripted_token(tokens, seed, choice, position)) for position in range(count))


@dataclass
class Web:
    """A server over HTTP; tokens come as ``steps`` lets them."""

    backend: Backend
    service: ScriptedService
    server: HttpServer
    steps: Steps
    address: str
    client: httpx.AsyncClient

    @property
    def url(self) -> str:
        return f"http://{self.address}/v1"

    async def chat(self, **body: Any) -> httpx.Response:
        """Asks for a chat completion."""
        return await self.client.post("/v1/chat/completions", json=chat_body(**body))

    async def complete(self, **body: Any) -> httpx.Response:
        """Asks for a completion."""
        return await self.client.post("/v1/completions", json={"prompt": "Hi", **body})


def chat_body(**body: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Hi"}], **body}


@dataclass(frozen=True)
class Event:
    """One event of a stream."""

    id: str
    data: Any


async def events_of(response: httpx.Response) -> AsyncIterator[Event]:
    """The events, ``[DONE]`` as text; the stream must end with it or with an error."""
    last, event_id = None, ""
    async for line in response.aiter_lines():
        if line.startswith("id: "):
            event_id = line[4:]
        elif line.startswith("data: "):
            data = line[6:]
            last = data if data == "[DONE]" else json.loads(data)
            yield Event(event_id, last)
    assert last == "[DONE]" or (isinstance(last, dict) and "error" in last), last


def error_of(response: httpx.Response) -> dict[str, Any]:
    """What the server refused; in OpenAI's schema."""
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and isinstance(error["message"], str)
    return error
