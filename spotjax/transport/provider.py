"""The side of bulk reads that has the bytes: a thread for each connection, so that ``provide`` may block."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from spotjax.errors import ConnectionLost, SpotjaxError, TransferRefused, TransportError
from spotjax.transport.bulk import BulkStream, Chunk, Read, Refused, chunks, hashed
from spotjax.transport.framing import byte_views
from spotjax.transport.security import Tls

if TYPE_CHECKING:
    from collections.abc import Buffer

log = logging.getLogger(__name__)

Provide = Callable[[bytes], "Sequence[Buffer]"]
"""Called in a thread; returns buffers whose bytes, concatenated, are the answer. Asked again for the rest of an answer
whose connection broke, it has to give the same bytes. What it raises refuses the read, with the error's text."""

CONNECTIONS = 512
"""Bulk connections at once, idle ones included; more are turned away."""
IDLE_SECONDS = 60.0
MESSAGE_LIMIT = 4096
"""Characters of an error's text that are carried over."""


class BulkProvider:
    """Answers the bulk reads of all peers."""

    def __init__(self, provide: Provide | None, tls: Tls | None, stall: float) -> None:
        """``stall``: seconds without progress after which a reader is given up."""
        self._provide, self._tls, self._stall = provide, tls, stall
        self._threads = ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="spotjax-provide")
        self.sent, self._counting = 0, threading.Lock()
        """Bytes of answers."""
        self._streams: dict[BulkStream, asyncio.Future[None]] = {}

    def serve(self, sock: socket.socket, peer: str) -> None:
        """Talks with ``peer`` in a thread until it hangs up; takes the socket over."""
        if len(self._streams) >= CONNECTIONS:
            log.warning("bulk connection from %s turned away: there are %d already", peer, CONNECTIONS)
            sock.close()
            return
        stream = BulkStream(sock, self._stall)
        future = asyncio.get_running_loop().run_in_executor(self._threads, self._converse, stream, peer)
        self._streams[stream] = future
        future.add_done_callback(lambda _: self._streams.pop(stream))

    async def close(self) -> None:
        """Ends all conversations; waits for a ``provide`` that is at work."""
        for stream in self._streams:
            stream.shutdown()
        await asyncio.gather(*self._streams.values(), return_exceptions=True)
        self._threads.shutdown()

    def _converse(self, stream: BulkStream, peer: str) -> None:
        try:
            if self._tls is not None and not self._secured(stream, self._tls, peer):
                return
            stream.welcome()
            while True:
                stream.timeout = IDLE_SECONDS
                message, size = stream.receive()
                stream.timeout = self._stall
                if not isinstance(message, Read) or size:
                    raise TransportError(f"expected a request, got {message!r} with {size} bytes")
                self._answer(stream, message, peer)
        except ConnectionLost as error:
            log.debug("bulk connection with %s ended: %s", peer, error)
        except TransportError as error:
            log.warning("bulk connection with %s given up: %s", peer, error)
        finally:
            stream.close()

    def _secured(self, stream: BulkStream, tls: Tls, peer: str) -> bool:
        try:
            stream.secure(tls.server, server_side=True)
        except ConnectionLost as error:
            log.warning("bulk connection from %s refused, no valid certificate: %s", peer, error)
            return False
        return True

    def _answer(self, stream: BulkStream, read: Read, peer: str) -> None:
        try:
            views = self._provided(read)
        except SpotjaxError as error:
            stream.send(Refused(str(error)[:MESSAGE_LIMIT]))
            return
        except Exception as error:
            log.exception("a bulk read of %s could not be answered", peer)
            stream.send(Refused(f"{type(error).__name__}: {error}"[:MESSAGE_LIMIT]))
            return
        if not views:
            stream.send(Chunk(hashed(())))
        for group in chunks(views, read.offset):
            stream.send(Chunk(hashed(group)), group)
        with self._counting:
            self.sent += read.length - read.offset

    def _provided(self, read: Read) -> list[memoryview]:
        if self._provide is None:
            raise TransferRefused("this process provides nothing")
        views = byte_views(self._provide(read.what))
        size = sum(map(len, views))
        if size != read.length:
            raise TransferRefused(f"the answer has {size} bytes, {read.length} were asked for")
        if not 0 <= read.offset <= size:
            raise TransferRefused(f"byte {read.offset} is not one of {size}")
        return views
