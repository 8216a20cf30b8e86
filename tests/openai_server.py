"""A scripted server of OpenAI's dialect over real sockets, which knows to the microsecond when it wrote what."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from spotjax.bench.exchange import PlannedRequest

DONE = b"data: [DONE]\n\n"


@dataclass
class Answer:
    """What a server says to one request.

    Attributes:
      events: pieces of the body, each after its delay in seconds.
      status: of HTTP.
      kind: content type.
      whole: ends as HTTP wants it; else the connection is cut.
    """

    events: Sequence[tuple[float, bytes]]
    status: int = 200
    kind: str = "text/event-stream"
    whole: bool = True


@dataclass
class Seen:
    """One request as the server saw it; times are of ``time.perf_counter``."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    read: float
    written: list[float] = field(default_factory=list)


@dataclass
class ScriptedServer:
    """Answers every request as it is told to.

    Attributes:
      url: where it listens.
      seen: requests in the order that they came.
    """

    answer: Callable[[Seen], Answer]
    url: str = ""
    seen: list[Seen] = field(default_factory=list)
    _connections: set[asyncio.Task[None]] = field(default_factory=set)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
                while await self._one(reader, writer):
                    pass
        finally:
            self._connections.discard(task)
            writer.close()

    async def close(self) -> None:
        """Ends all connections."""
        for task in (left := list(self._connections)):
            task.cancel()
        await asyncio.gather(*left)

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        pairs = (line.split(": ", 1) for line in lines if line)
        headers = {name.lower(): value for name, value in pairs}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        seen = Seen(first.split()[1], headers, json.loads(body or b"{}"), time.perf_counter())
        self.seen.append(seen)
        answer = self.answer(seen)
        head = f"HTTP/1.1 {answer.status} Said\r\ncontent-type: {answer.kind}\r\ntransfer-encoding: chunked\r\n\r\n"
        writer.write(head.encode())
        for delay, data in answer.events:
            await asyncio.sleep(delay)
            seen.written.append(time.perf_counter())
            writer.write(b"%x\r\n%s\r\n" % (len(data), data))
        if answer.whole:
            writer.write(b"0\r\n\r\n")
        await writer.drain()
        return answer.whole


@contextlib.asynccontextmanager
async def scripted_server(
    answer: Callable[[Seen], Answer] | Answer, tls: ssl.SSLContext | None = None
) -> AsyncIterator[ScriptedServer]:
    """A server that gives one answer to all, or what is called says."""
    server = ScriptedServer(answer if callable(answer) else lambda seen: answer)
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0, ssl=tls)
    server.url = f"{'http' if tls is None else 'https'}://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    async with listening:
        yield server
        listening.close()
        await server.close()


def event(**fields: Any) -> bytes:
    """One event."""
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def completion(text: str, finish: str | None = None) -> bytes:
    """A piece of a completion."""
    return event(id="c", object="text_completion", choices=[{"index": 0, "text": text, "finish_reason": finish}])


def chat(finish: str | None = None, **delta: Any) -> bytes:
    """A piece of a chat's answer."""
    return event(object="chat.completion.chunk", choices=[{"index": 0, "delta": delta, "finish_reason": finish}])


def usage(prompt: int, output: int) -> bytes:
    """The event that counts."""
    counts = {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}
    return event(object="text_completion", choices=[], usage=counts)


def planned(arrival: float = 0.0, output: int = 4, prompt: str | tuple[int, ...] = "the way") -> PlannedRequest:
    """A request."""
    return PlannedRequest(arrival, prompt, 2, output, 0)
