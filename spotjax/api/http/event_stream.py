"""Answers that go on: server-sent events to a client that may leave, or stop reading, at any time.

Nothing is queued for a client: while it does not read, its next event is not asked for, and what is sent then is all
that came meanwhile. One that does not read for long is dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from typing import Any, ClassVar, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from spotjax.api.http.errors import BUG, error_body
from spotjax.errors import SpotjaxError

log = logging.getLogger(__name__)

Result = TypeVar("Result")

ABORT = "spotjax.abort"
"""Among a scope's extensions: ends the connection at once, without waiting for what is unsent."""


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


async def on_client_gone(request: Request, error: Exception) -> Response:
    """For starlette: an answer that nobody gets."""
    return Response(status_code=499)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """What ``work`` comes to; it is cancelled when the client disconnects, whose request was read.

    Raises:
      ClientGone: it did.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(disconnected(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone
    finally:
        await ended(working, leaving)


async def disconnected(receive: Receive) -> None:
    """Returns when the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def ended(*tasks: asyncio.Future[Any]) -> None:
    """Cancels tasks and waits until they are done."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def event(event_id: str, data: bytes) -> bytes:
    """One event, as it is sent. ``data`` has no line breaks."""
    return b"id: %b\ndata: %b\n\n" % (event_id.encode(), data)


class EventStream(Response):
    """A response that sends events as they come.

    Args:
      events: pieces of the body, each one or several events; an error of ours that it raises becomes the last one.
      headers: besides those of event streams.
      leave: called at the end, however that comes.

    Attributes:
      stuck_seconds: for which a client may read nothing before it is dropped.
      quiet_seconds: after which a stream without events gets a comment, or somebody on the way may take it for dead.
    """

    media_type = "text/event-stream"
    stuck_seconds: ClassVar[float] = 30.0
    quiet_seconds: ClassVar[float] = 15.0

    def __init__(
        self, events: AsyncGenerator[bytes, None], headers: Mapping[str, str], leave: Callable[[], None]
    ) -> None:
        self.status_code, self.background = 200, None
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no", **headers})
        self._events, self._leave = events, leave
        self._sending = 0
        self._moved = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Streams until the end, or until nobody reads."""
        self._moved = time.monotonic()
        streaming = asyncio.ensure_future(self._stream(send))
        leaving = asyncio.ensure_future(disconnected(receive))
        commenting: list[asyncio.Future[None]] = []
        try:
            while not streaming.done() and not leaving.done():
                await asyncio.wait(
                    {streaming, leaving},
                    timeout=min(self.stuck_seconds, self.quiet_seconds) / 2,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                still = time.monotonic() - self._moved
                if self._sending and still > self.stuck_seconds:
                    log.info("a client that reads nothing is dropped", extra={"seconds": self.stuck_seconds})
                    scope.get("extensions", {}).get(ABORT, lambda: None)()
                    return
                if not self._sending and still > self.quiet_seconds and not streaming.done():
                    commenting = [asyncio.ensure_future(self._send(send, b": waiting\n\n"))]  # the last one is sent
        finally:
            await ended(streaming, leaving, *commenting)
            self._leave()

    async def _stream(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async with contextlib.aclosing(self._events) as events:
                async for piece in events:
                    await self._send(send, piece)
        except SpotjaxError as error:
            await self._send(send, b"data: %b\n\n" % error_body(error))
        except Exception:
            log.exception("a stream failed")
            await self._send(send, b"data: %b\n\n" % BUG)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, piece: bytes) -> None:
        self._sending += 1
        self._moved = time.monotonic()
        await send({"type": "http.response.body", "body": piece, "more_body": True})
        self._sending -= 1
        self._moved = time.monotonic()
