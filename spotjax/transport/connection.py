"""One framed TCP connection for messages. Knows neither who may connect nor what the frames mean."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import msgspec

from spotjax.errors import ConnectionLost, TransportError
from spotjax.transport.decoding import UNREADABLE
from spotjax.transport.framing import WELCOME, FrameReader, Limits, byte_views, frame_start

if TYPE_CHECKING:
    from collections.abc import Buffer

log = logging.getLogger(__name__)

COALESCE = 64 * 1024
"""Payload bytes up to which a frame is copied together and written at once: one system call, one packet."""
HIGH_WATER = 1 << 20
"""Bytes waiting to be sent from which on ``drain`` waits."""


class Connection(asyncio.BufferedProtocol):
    """One framed TCP connection, either side. To be used from its loop's thread only.

    Attributes:
      peer: ``HOST:PORT`` of the other side.
      closed: done when the connection is gone.
      sent, received: bytes ever, those handed to the transport and those it has given.
      welcomed: whether the other side accepted the connection, once known; the calling side waits for it.
    """

    def __init__(
        self,
        peer: str,
        decoder: msgspec.msgpack.Decoder[Any],
        receive: Callable[[Connection, Any, memoryview], None],
        limits: Limits,
        *,
        called: bool,
    ) -> None:
        """``called``: this is the side that was called, which sends the welcome instead of waiting for it."""
        loop = asyncio.get_running_loop()
        self.peer = peer
        self.closed: asyncio.Future[None] = loop.create_future()
        self.welcomed: asyncio.Future[bool] = loop.create_future()
        self._loop, self._decoder, self._receive, self._limits, self._called = loop, decoder, receive, limits, called
        self._encoder = msgspec.msgpack.Encoder()
        self._reader = FrameReader(self._frame, limits)
        self._transport: asyncio.Transport | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self.received = 0
        self.sent = 0
        self._watch: asyncio.TimerHandle | None = None
        self._watched: tuple[int | None, int | None] = (None, None)

    def send(self, header: msgspec.Struct, *payloads: Buffer) -> None:
        """Sends one frame; ``payloads`` arrive as one. Never blocks; await ``drain`` between large frames.

        Large payloads are not copied: they must not change until they are sent.

        Raises:
          ConnectionLost: the connection is closed, or the peer has fallen too far behind.
          TransportError: the frame exceeds the limits.
        """
        transport = self._open()
        views = byte_views(payloads)
        size = sum(map(len, views))
        start = frame_start(self._encoder.encode(header), size, self._limits)
        if transport.get_write_buffer_size() + size > self._limits.backlog:
            self.abort(f"more than {self._limits.backlog} bytes wait to be sent")
            raise ConnectionLost(f"{self.peer} reads too slowly: more than {self._limits.backlog} bytes wait for it")
        self.sent += len(start) + size
        if size <= COALESCE:
            transport.write(b"".join((start, *views)))
        else:
            transport.write(start)
            for view in views:
                transport.write(view)

    async def drain(self) -> None:
        """Waits until less than the high-water mark waits to be sent.

        Raises:
          ConnectionLost: the connection is closed.
        """
        self._open()
        await self._writable.wait()
        self._open()

    def close(self) -> None:
        """Sends what waits to be sent, then closes."""
        if self._transport is not None:
            self._transport.close()
            self._guard()

    def abort(self, reason: str) -> None:
        """Closes at once; ``reason`` is logged."""
        if self._transport is not None and not self.closed.done():
            log.warning("connection with %s given up: %s", self.peer, reason)
            self._transport.abort()

    @property
    def open(self) -> bool:
        """Whether frames can be sent."""
        return self._transport is not None and not self.closed.done() and not self._transport.is_closing()

    def _open(self) -> asyncio.Transport:
        if self._transport is None or not self.open:
            raise ConnectionLost(f"the connection with {self.peer} is closed")
        return self._transport

    # -- called by asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        self._transport.set_write_buffer_limits(high=HIGH_WATER)
        if self._called:
            self._transport.write(WELCOME)
            self.welcomed.set_result(True)

    def connection_lost(self, problem: Exception | None) -> None:
        log.debug("connection with %s ended: %s", self.peer, problem or "closed")
        if self._watch is not None:
            self._watch.cancel()
        self._writable.set()
        if not self.welcomed.done():
            self.welcomed.set_result(False)
        if not self.closed.done():
            self.closed.set_result(None)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._reader.buffer()

    def buffer_updated(self, count: int) -> None:
        self.received += count
        try:
            self._reader.advance(count)
        except TransportError as error:
            self.abort(str(error))
        except Exception:
            log.exception("a frame from %s could not be handled", self.peer)
            self.abort("a frame could not be handled")
        if self._reader.partial:
            self._guard()

    def eof_received(self) -> None:
        return None  # closes

    def pause_writing(self) -> None:
        self._writable.clear()
        self._guard()

    def resume_writing(self) -> None:
        self._writable.set()

    # -- frames

    def _frame(self, header: bytes, payload: memoryview) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        if not self.welcomed.done():
            if header or payload:
                raise TransportError("the peer sent a frame before its welcome")
            self.welcomed.set_result(True)
            return
        try:
            message = self._decoder.decode(header)
        except UNREADABLE as error:
            raise TransportError(f"a header cannot be understood: {error}") from error
        self._receive(self, message, payload)

    # -- a peer that stops in the middle of something

    def _progress(self) -> tuple[int | None, int | None]:
        """Bytes received if a frame is incomplete, bytes sent if somebody waits for that."""
        assert self._transport is not None
        waiting = not self._writable.is_set() or self._transport.is_closing()
        sent = self.sent - self._transport.get_write_buffer_size() if waiting else None
        return self.received if self._reader.partial else None, sent

    def _guard(self) -> None:
        """Gives the peer up unless there is progress within the limit."""
        if self._watch is None and not self.closed.done():
            self._watched = self._progress()
            self._watch = self._loop.call_later(self._limits.stall, self._check)

    def _check(self) -> None:
        self._watch = None
        if self.closed.done():
            return
        now = self._progress()
        for what, count, before in zip(("sent", "took"), now, self._watched, strict=True):
            if count is not None and count == before:
                self.abort(f"it {what} nothing for {self._limits.stall:g} s in the middle of a frame")
                return
        if now != (None, None):
            self._guard()
