"""A process's place on the data plane: takes and makes connections, hands frames over, reads and provides in bulk.

Message connections live on the event loop that made the endpoint, bulk reads on connections and threads of their own,
so that a transfer does not delay a step.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import msgspec

from spotjax.errors import ConnectionLost, TransportError
from spotjax.transport.connection import Connection
from spotjax.transport.framing import GREETING, Limits, Purpose, greeting, read_greeting
from spotjax.transport.join_token import CalledHandshake, JoinToken
from spotjax.transport.provider import BulkProvider, Provide
from spotjax.transport.reader import BulkReader
from spotjax.transport.security import Tls
from spotjax.transport.sockets import dial, peer_of, receive_exactly, split_address, tune

log = logging.getLogger(__name__)

Receive = Callable[[Connection, Any, memoryview], None]
"""Called in the loop's thread with every whole frame: its header, and its payload in fresh memory that begins at a
multiple of 64 bytes and belongs to the receiver. If it raises, the connection is closed."""

GREETING_SECONDS = 10.0
"""For greeting, proofs and TLS handshake of a connection that somebody makes with us."""
CLOSE_SECONDS = 1.0
"""For what waits to be sent when the endpoint closes."""
ACCEPT_PAUSE_SECONDS = 0.2
"""After a connection could not be taken, most likely because there are no file descriptors left."""


class Endpoint:
    """All connections of one process. Made, used and closed on one event loop."""

    def __init__(
        self,
        headers: Any,
        receive: Receive,
        *,
        provide: Provide | None = None,
        tls: Tls | None = None,
        token: JoinToken | None = None,
        limits: Limits | None = None,
    ) -> None:
        """An endpoint whose frames have headers of type ``headers``: a tagged msgspec struct or a union of them.

        With a token it takes and makes no connection whose other side has not proved that it has the same.
        """
        self._decoder = msgspec.msgpack.Decoder(headers)
        self._receive, self._tls, self._token, self._limits = receive, tls, token, limits or Limits()
        self._provider = BulkProvider(provide, tls, self._limits.stall)
        self._reader = BulkReader(tls, token)
        self._connections: set[Connection] = set()
        self._past_traffic = (0, 0)
        self._outgoing: dict[str, Connection] = {}
        self._dialling: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._listeners: set[socket.socket] = set()
        self._greeting: set[asyncio.Task[None]] = set()
        self._closed = False

    @property
    def traffic(self) -> tuple[int, int]:
        """Bytes (sent, received) ever, without what TLS adds; of bulk reads their answers."""
        sent, received = self._past_traffic
        for connection in self._connections:
            sent, received = sent + connection.sent, received + connection.received
        return sent + self._provider.sent, received + self._reader.received

    async def listen(self, address: str) -> int:
        """Takes connections on ``HOST:PORT``, port 0 for a free one. Returns the port.

        Raises:
          OSError: the address cannot be listened on.
        """
        host, port = split_address(address)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=512)
        listener.setblocking(False)
        self._listeners.add(listener)
        self._watch(listener)
        return int(listener.getsockname()[1])

    async def connect(self, address: str, timeout: float) -> Connection:
        """The open connection to ``HOST:PORT``, made if there is none.

        Raises:
          ConnectionLost: nobody accepts there within ``timeout`` seconds.
        """
        if self._closed:
            raise ConnectionLost("this endpoint is closed")
        lock = self._dialling.setdefault(address, asyncio.Lock())
        try:
            async with asyncio.timeout(timeout), lock:
                connection = self._outgoing.get(address)
                if connection is None or not connection.open:
                    connection = await self._dial(address)
                return connection
        except TimeoutError as error:
            raise ConnectionLost(f"{address} did not accept a connection within {timeout:g} s") from error

    async def fetch(self, address: str, what: bytes, into: memoryview, timeout: float) -> None:
        """Reads in bulk: asks the peer's ``provide`` for ``what`` and receives its answer, which must be exactly as
        long, straight into ``into``. Checksummed; goes on where it stopped when a connection breaks.

        ``timeout`` is in seconds without progress, the peer's ``provide`` included. When cancelled, nothing is written
        into ``into`` any more.

        Raises:
          ConnectionLost: the peer is gone or silent, or connections kept breaking.
          TransferRefused: the peer's ``provide`` raised, or its answer has another size; its message.
          ChecksumMismatch: bytes kept arriving other than they were sent.
        """
        await self._reader.fetch(address, what, into, timeout)

    async def close(self) -> None:
        """Closes everything; may be repeated. Waits a second for what is being sent, and for a ``provide`` at work."""
        self._closed = True
        while self._listeners:
            listener = self._listeners.pop()
            asyncio.get_running_loop().remove_reader(listener)
            listener.close()
        for task in self._greeting:
            task.cancel()
        await asyncio.gather(*self._greeting, return_exceptions=True)
        for connection in self._connections:
            connection.close()
        await self._all_closed(CLOSE_SECONDS)
        for connection in self._connections:
            connection.abort("the endpoint closes")
        await self._all_closed(None)
        await self._reader.close()
        await self._provider.close()

    async def _all_closed(self, timeout: float | None) -> None:
        if self._connections:
            await asyncio.wait({connection.closed for connection in self._connections}, timeout=timeout)

    # -- connections that others make

    def _watch(self, listener: socket.socket) -> None:
        if not self._closed:
            asyncio.get_running_loop().add_reader(listener, self._accept, listener)

    def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        try:
            sock, _ = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return  # it hung up before we looked
        except OSError as error:
            log.warning("a connection could not be taken: %s", error)
            loop.remove_reader(listener)
            loop.call_later(ACCEPT_PAUSE_SECONDS, self._watch, listener)
            return
        sock.setblocking(False)
        task = loop.create_task(self._greeted(sock))
        self._greeting.add(task)
        task.add_done_callback(self._greeting.discard)
        task.add_done_callback(lambda task: sock.close() if task.cancelled() else None)

    async def _greeted(self, sock: socket.socket) -> None:
        """Finds out what a new connection is for and hands it on, or refuses it."""
        peer = peer_of(sock)
        try:
            async with asyncio.timeout(GREETING_SECONDS):
                tune(sock)
                purpose = await self._let_in(sock)
                if purpose is Purpose.BULK:
                    self._provider.serve(sock, peer)
                else:
                    await self._adopt(sock, peer, called=True)
        except TimeoutError:
            log.warning("connection from %s refused: nothing valid within %g s", peer, GREETING_SECONDS)
            sock.close()
        except (OSError, TransportError) as error:
            log.warning("connection from %s refused: %s", peer, error)
            sock.close()

    async def _let_in(self, sock: socket.socket) -> Purpose:
        """What a connection is for, if it is from one of ours. Raises TransportError for any other."""
        first = await receive_exactly(sock, GREETING.size)
        purpose, secure, proven = read_greeting(first)
        if secure != (self._tls is not None):
            speaks, wants = ("TLS", "plaintext") if secure else ("plaintext", "TLS")
            raise TransportError(f"it speaks {speaks}, this endpoint {wants}; set TLS on both sides or on none")
        if proven != (self._token is not None):
            has, wants = ("has a join token", "none") if proven else ("has no join token", "one")
            raise TransportError(f"it {has}, this endpoint wants {wants}; set join_token on both sides or on none")
        if self._token is not None:
            handshake = CalledHandshake(self._token, first)
            answer = handshake.answer(await receive_exactly(sock, handshake.HELLO))
            await asyncio.get_running_loop().sock_sendall(sock, answer)
            handshake.require(await receive_exactly(sock, handshake.PROOF))
        return purpose

    # -- both sides

    async def _dial(self, address: str) -> Connection:
        first = greeting(Purpose.MESSAGES, self._tls is not None, self._token is not None)
        sock = await dial(address, first, self._token)
        try:
            connection = await self._adopt(sock, address, called=False)
        except OSError as error:
            sock.close()
            raise ConnectionLost(f"{address} did not accept the connection: {error}") from error
        except BaseException:
            sock.close()
            raise
        try:
            if not await connection.welcomed:
                raise ConnectionLost(f"{address} closed the connection unaccepted; do both sides use TLS, or neither?")
            if self._closed:
                raise ConnectionLost("this endpoint is closed")
        except BaseException:
            connection.close()
            raise
        self._outgoing[address] = connection
        return connection

    async def _adopt(self, sock: socket.socket, peer: str, *, called: bool) -> Connection:
        """Turns a connected socket into a connection; TLS, if any, is established."""
        loop = asyncio.get_running_loop()
        connection = Connection(peer, self._decoder, self._receive, self._limits, called=called)
        if called:
            context = self._tls.server if self._tls else None
            wait = GREETING_SECONDS if context else None
            await loop.connect_accepted_socket(lambda: connection, sock, ssl=context, ssl_handshake_timeout=wait)
        else:
            context, host = (self._tls.client, split_address(peer)[0]) if self._tls else (None, None)
            await loop.create_connection(lambda: connection, sock=sock, ssl=context, server_hostname=host)
        self._connections.add(connection)
        connection.closed.add_done_callback(lambda _: self._gone(connection, peer))
        return connection

    def _gone(self, connection: Connection, peer: str) -> None:
        self._connections.discard(connection)
        sent, received = self._past_traffic
        self._past_traffic = sent + connection.sent, received + connection.received
        if self._outgoing.get(peer) is connection:
            del self._outgoing[peer]
