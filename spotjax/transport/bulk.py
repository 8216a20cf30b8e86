"""Bulk reads on the wire, over blocking sockets in threads. Owns one connection's conversation, not the threads.

The reader asks with ``Read``; the provider answers with chunks, each with its checksum, or with ``Refused``. Blocking
sockets because the copy into the destination happens outside Python's lock, and the event loop's steps never wait for
it. Each wait on the socket ends after ``timeout`` seconds without a byte.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import time
from collections.abc import Iterator, Sequence

import msgspec
from xxhash import xxh3_64

from spotjax.errors import ConnectionLost, TransportError
from spotjax.transport.decoding import UNREADABLE
from spotjax.transport.framing import PREFIX, WELCOME, Limits, frame_start, read_prefix

CHUNK = 1 << 20
"""Bytes of payload between two checksums: what is sent again after a broken connection is less than this."""
PIECE = 256 << 10
"""Bytes received at a time, so that they are still in the processor's cache when their checksum is taken."""
LIMITS = Limits(header=1 << 20, payload=CHUNK)
MOST_VIEWS = 512
"""Buffers handed to one system call; Linux takes 1024."""


class Read(msgspec.Struct, frozen=True, tag="read"):
    """Asks for bytes ``offset .. length`` of the answer to ``what``, which has ``length`` bytes."""

    what: bytes
    offset: int
    length: int


class Chunk(msgspec.Struct, frozen=True, tag="chunk"):
    """The payload is the next part of the answer; ``checksum`` is its XXH3 (64 bits)."""

    checksum: int


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """There is no such answer."""

    message: str


encoder = msgspec.msgpack.Encoder()
decoder: msgspec.msgpack.Decoder[Read | Chunk | Refused] = msgspec.msgpack.Decoder(Read | Chunk | Refused)


def chunks(views: Sequence[memoryview], offset: int, size: int = CHUNK) -> Iterator[list[memoryview]]:
    """The bytes of ``views`` from ``offset`` on, in groups of ``size`` bytes; nothing is copied."""
    group: list[memoryview] = []
    room = size
    for view in views:
        skipped = min(offset, len(view))
        offset -= skipped
        rest = view[skipped:]
        while rest:
            group.append(rest[:room])
            room -= len(group[-1])
            rest = rest[len(group[-1]) :]
            if not room:
                yield group
                group, room = [], size
    if group:
        yield group


class BulkStream:
    """Framed reading and writing on one blocking socket.

    All methods raise ConnectionLost if the connection broke or nothing moved for ``timeout`` seconds, and
    TransportError if the peer sends what is no frame.

    Attributes:
      last_arrival: monotonic time of the last byte received.
    """

    def __init__(self, sock: socket.socket, timeout: float) -> None:
        self._socket = sock
        self.timeout = timeout
        self.last_arrival = time.monotonic()

    @property
    def timeout(self) -> float:
        """Seconds without a byte after which the peer is given up."""
        return self._timeout

    @timeout.setter
    def timeout(self, seconds: float) -> None:
        self._timeout = seconds
        self._socket.settimeout(seconds)

    def secure(self, context: ssl.SSLContext, *, server_side: bool) -> None:
        """Continues under TLS."""
        with self._failures():
            wrapped = context.wrap_socket(self._socket, server_side=server_side, do_handshake_on_connect=False)
            self._socket = wrapped  # from here on ``shutdown`` ends the handshake too
            wrapped.do_handshake()

    def welcome(self) -> None:
        """Tells the calling side that it is accepted."""
        self._write([memoryview(WELCOME)])

    def await_welcome(self) -> None:
        """Waits until the called side has accepted."""
        data = bytearray(len(WELCOME))
        self.read_into(memoryview(data))
        if data != WELCOME:
            raise TransportError(f"{data!r} is no welcome")

    def send(self, message: Read | Chunk | Refused, views: Sequence[memoryview] = ()) -> None:
        """Sends one frame."""
        start = frame_start(encoder.encode(message), sum(map(len, views)), LIMITS)
        self._write([memoryview(start), *views])

    def receive(self) -> tuple[Read | Chunk | Refused, int]:
        """The next message and the number of payload bytes that follow it, which the caller has to read."""
        prefix = bytearray(PREFIX.size)
        self.read_into(memoryview(prefix))
        size, payload = read_prefix(prefix, 0, LIMITS)
        header = bytearray(size)
        self.read_into(memoryview(header))
        try:
            return decoder.decode(header), payload
        except UNREADABLE as error:
            raise TransportError(f"a header cannot be understood: {error}") from error

    def read_into(self, view: memoryview) -> None:
        """Fills ``view``."""
        while view:
            view = view[self._receive_some(view) :]

    def read_hashed(self, view: memoryview) -> int:
        """Fills ``view`` and returns the XXH3 of what arrived."""
        checksum = xxh3_64()
        while view:
            count = self._receive_some(view[:PIECE])
            checksum.update(view[:count])
            view = view[count:]
        return checksum.intdigest()

    def _receive_some(self, view: memoryview) -> int:
        with self._failures():
            count = self._socket.recv_into(view)
        if not count:
            raise ConnectionLost("the peer closed the connection")
        self.last_arrival = time.monotonic()
        return count

    def _write(self, views: Sequence[memoryview]) -> None:
        with self._failures():
            if isinstance(self._socket, ssl.SSLSocket):
                for view in views:
                    while view:
                        view = view[self._socket.send(view) :]
                return
            waiting = list(views)
            while waiting:
                sent = self._socket.sendmsg(waiting[:MOST_VIEWS])
                done = 0
                while done < len(waiting) and sent >= len(waiting[done]):
                    sent -= len(waiting[done])
                    done += 1
                del waiting[:done]
                if waiting:
                    waiting[0] = waiting[0][sent:]

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except TimeoutError as error:
            raise ConnectionLost(f"nothing moved for {self._timeout:g} s") from error
        except OSError as error:
            raise ConnectionLost(f"the connection broke: {error}") from error

    def shutdown(self) -> None:
        """Ends whatever waits on the socket; from any thread."""
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)  # SSLSocket's own would drop the TLS state in use

    def close(self) -> None:
        """Closes the socket; from the thread that uses it."""
        self._socket.close()


def hashed(views: Sequence[memoryview]) -> int:
    """The XXH3 of the concatenated bytes."""
    checksum = xxh3_64()
    for view in views:
        checksum.update(view)
    return checksum.intdigest()
