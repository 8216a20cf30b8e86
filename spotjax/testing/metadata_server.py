"""Stand-ins for metadata services: over HTTP, as a process or in this one, and with what can go wrong on the way.

``POST /admin/orders/NAME`` with a JSON object calls what the stand-in calls NAME (what it says changes);
``POST /admin/faults`` with a list of faults (``kind``, ``seconds``, ``status``, ``retry_after``) spoils so many answers
to come; ``GET /admin/answered`` lists answers as path, status, body and Unix seconds, those that were written last.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from http import HTTPStatus
from typing import Any, Protocol
from urllib.parse import parse_qsl, urlsplit

import httpx

from spotjax.testing.metadata_faults import Fault, Kind, Reply, Request, spoilt

KEPT_ANSWERS = 1000


class Metadata(Protocol):
    """A metadata service without HTTP."""

    @property
    def orders(self) -> Mapping[str, Callable[..., Any]]:
        """What it can be told, by name."""
        ...

    async def answer(self, request: Request) -> Reply:
        """As the real one does."""
        ...


class Spoiling:
    """Answers as a service does, but for what goes wrong.

    Args:
      metadata: the service.
      fault: what goes wrong with a request now, if anything.
    """

    def __init__(self, metadata: Metadata, fault: Callable[[Request], Fault | None]) -> None:
        self._metadata, self._fault = metadata, fault
        self._last: dict[tuple[str, str, str], tuple[Reply, Reply | None]] = {}

    async def answer(self, request: Request) -> tuple[Reply | None, Fault | None]:
        """The answer, none if the connection is to end without, and what went wrong."""
        fault = self._fault(request)
        if fault is not None and fault.kind is Kind.REFUSE:
            return None, fault
        if fault is not None and fault.kind is Kind.HANG:
            await asyncio.sleep(fault.seconds)
            return None, fault
        reply = await self._metadata.answer(request)
        if fault is not None and fault.kind is Kind.SLOW:
            await asyncio.sleep(fault.seconds)
        key = (request.method, request.path, str(sorted(request.query.items())))
        now, before = self._last.get(key, (None, None))
        if now is None or now.body != reply.body or now.status != reply.status:
            before = now
            self._last[key] = reply, before
        return (reply if fault is None else spoilt(reply, fault, before)), fault


class MetadataTransport(httpx.AsyncBaseTransport):
    """For clients in the same process, without sockets, so that time may be virtual."""

    def __init__(self, metadata: Metadata, fault: Callable[[Request], Fault | None] = lambda request: None) -> None:
        self._spoiling = Spoiling(metadata, fault)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """As a connection would carry it."""
        headers = {name.lower(): value for name, value in request.headers.items()}
        asked = Request(
            request.method, request.url.path, dict(request.url.params), headers, await request.aread()
        )  # fmt: skip
        reply, fault = await self._spoiling.answer(asked)
        if reply is None:
            raise httpx.ReadError("the connection ended", request=request)
        stream = _Cut(reply.body) if fault is not None and fault.kind is Kind.CUT else httpx.ByteStream(reply.body)
        return httpx.Response(reply.status, headers=dict(reply.headers), stream=stream)


class _Cut(httpx.AsyncByteStream):
    """Half a body, then the end of the connection."""

    def __init__(self, body: bytes) -> None:
        self._body = body

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield self._body[: len(self._body) // 2]
        raise httpx.RemoteProtocolError("peer closed connection without sending complete message body")


class MetadataServer:
    """Over HTTP/1.1 at a port of this machine.

    Args:
      metadata: the service.
      fault: what goes wrong with a request now, if anything; by default what it was told to.
    """

    def __init__(self, metadata: Metadata, fault: Callable[[Request], Fault | None] | None = None) -> None:
        self._metadata, self._spoiling = metadata, Spoiling(metadata, fault or self._next_fault)
        self._faults: deque[Fault] = deque()
        self._answered: deque[dict[str, object]] = deque(maxlen=KEPT_ANSWERS)
        self._connections: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def serving(self, port: int = 0) -> AsyncIterator[str]:
        """Answers while the body runs; gives the base URL."""
        server = await asyncio.start_server(self._connected, "127.0.0.1", port)
        try:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        finally:
            server.close()
            for connection in self._connections:
                connection.cancel()
            await asyncio.gather(*self._connections, return_exceptions=True)

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._answer_all(reader, writer))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _answer_all(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._exchange(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # whoever asked is gone
        finally:
            writer.transport.abort()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request; whether the connection is of use for another one."""
        request = await _read(reader)
        if request.path.startswith("/admin/"):
            reply, fault = self._administer(request), None
        else:
            answered, fault = await self._spoiling.answer(request)
            if answered is None:
                return False
            reply = answered
        head = f"HTTP/1.1 {reply.status} {HTTPStatus(reply.status).phrase}\r\n"
        fields = {**reply.headers, "Content-Length": str(len(reply.body))}
        head += "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        cut = fault is not None and fault.kind is Kind.CUT
        when = time.time()  # whoever asked may act on it before we get on
        writer.write(head.encode() + b"\r\n" + reply.body[: len(reply.body) // 2 if cut else None])
        await writer.drain()
        if not request.path.startswith("/admin/"):  # else lists of answers were in lists of answers
            self._answered.append(
                {"path": request.path, "status": reply.status, "body": reply.body.decode(errors="replace"),
                 "time": when}
            )  # fmt: skip
        if cut:
            writer.close()
            await writer.wait_closed()
        return not cut

    def _administer(self, request: Request) -> Reply:
        if request.path == "/admin/answered":
            return Reply(json.dumps(list(self._answered)).encode())
        value = json.loads(request.body or b"{}")
        if request.path == "/admin/faults":
            self._faults.extend(Fault(**{**fault, "kind": Kind(fault["kind"])}) for fault in value)
            return Reply(b"null")
        order = self._metadata.orders.get(request.path.removeprefix("/admin/orders/"))
        return Reply(status=404) if order is None else Reply(json.dumps(order(**value)).encode())

    def _next_fault(self, request: Request) -> Fault | None:
        return self._faults.popleft() if self._faults else None


async def _read(reader: asyncio.StreamReader) -> Request:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    first, *lines = head.rstrip().split("\r\n")
    method, target, _ = first.split(" ")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    address = urlsplit(target)
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    return Request(method, address.path, dict(parse_qsl(address.query)), headers, body)


def run(metadata: Metadata, description: str) -> None:
    """The process: prints its base URL and answers until it is ended."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--port", type=int, default=0, help="to listen on; 0 takes a free one")
    port: int = parser.parse_args().port

    async def serve() -> None:
        async with MetadataServer(metadata).serving(port) as url:
            print(url, flush=True)
            await asyncio.Event().wait()

    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve())
