"""How frames look on the wire: a fixed prefix, a msgpack header, a raw payload. Pure: no sockets, no clocks.

Every connection begins with a greeting of four bytes in the clear, which says what the connection is for, whether both
sides prove next that they have the join token, and whether TLS follows; the side that was called answers with a
welcome, a frame without a header.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

from spotjax.errors import TransportError
from spotjax.transport.memory import aligned

if TYPE_CHECKING:
    from collections.abc import Buffer  # Python 3.12 has it at run time

PREFIX = struct.Struct("<4sIQ")
"""Mark, header bytes, payload bytes."""
MARK = b"SJX1"
GREETING = struct.Struct("<2sBB")
GREETING_MARK = b"SJ"
VERSION = 1
TLS_FLAG, TOKEN_FLAG = 0x80, 0x40
INTAKE = 64 * 1024
"""Bytes of the buffer in which headers, and payloads smaller than it, arrive."""


class Purpose(IntEnum):
    """What a connection carries."""

    MESSAGES = 1
    BULK = 2


class Greeting(NamedTuple):
    """What a connection is for, whether TLS follows, and whether proofs of the join token come before that."""

    purpose: Purpose
    secure: bool
    proven: bool


@dataclass(frozen=True, slots=True)
class Limits:
    """What a peer may make this side hold or wait for.

    Attributes:
      header: bytes of one frame's header.
      payload: bytes of one frame's payload.
      backlog: bytes that wait to be sent to one peer, beyond which it is given up.
      stall: seconds without progress in the middle of a frame, either way, after which a peer is given up.
    """

    header: int = 4 << 20
    payload: int = 1 << 30
    backlog: int = 2 << 30
    stall: float = 10.0


def greeting(purpose: Purpose, secure: bool, proven: bool = False) -> bytes:
    """The first bytes that the calling side sends."""
    flags = (TLS_FLAG if secure else 0) | (TOKEN_FLAG if proven else 0)
    return GREETING.pack(GREETING_MARK, VERSION, purpose | flags)


def read_greeting(data: bytes) -> Greeting:
    """What the calling side says.

    Raises:
      TransportError: these are not the first bytes of a Spotjax connection.
    """
    mark, version, flags = GREETING.unpack(data)
    if mark != GREETING_MARK:
        raise TransportError(f"greeting {data!r} is not that of a Spotjax process; is another program calling?")
    if version != VERSION:
        raise TransportError(f"the peer speaks version {version} of the transport, this process {VERSION}")
    try:
        return Greeting(Purpose(flags & ~TLS_FLAG & ~TOKEN_FLAG), bool(flags & TLS_FLAG), bool(flags & TOKEN_FLAG))
    except ValueError:
        raise TransportError(f"greeting {data!r} asks for an unknown kind of connection") from None


def frame_start(header: bytes, payload: int, limits: Limits) -> bytes:
    """Prefix and header of a frame whose payload has ``payload`` bytes.

    Raises:
      TransportError: header or payload exceed the limits.
    """
    check_sizes(len(header), payload, limits)
    return PREFIX.pack(MARK, len(header), payload) + header


WELCOME = PREFIX.pack(MARK, 0, 0)


def read_prefix(data: Buffer, start: int, limits: Limits) -> tuple[int, int]:
    """Bytes of header and payload that follow the prefix at ``start``.

    Raises:
      TransportError: no frame begins here, or it exceeds the limits.
    """
    mark, header, payload = PREFIX.unpack_from(data, start)
    if mark != MARK:
        raise TransportError(f"a frame begins with {MARK!r}, got {mark!r}; this is another protocol or a broken stream")
    check_sizes(header, payload, limits)
    return header, payload


def check_sizes(header: int, payload: int, limits: Limits) -> None:
    """Raises TransportError if a frame exceeds the limits."""
    if header > limits.header:
        raise TransportError(f"a header of {header} bytes exceeds the limit of {limits.header}")
    if payload > limits.payload:
        raise TransportError(f"a payload of {payload} bytes exceeds the limit of {limits.payload}; use a bulk read")


def byte_views(buffers: Sequence[Buffer]) -> list[memoryview]:
    """Flat byte views of C-contiguous buffers, empty ones left out.

    Raises:
      TransportError: a buffer is not C-contiguous.
    """
    views = []
    for buffer in buffers:
        view = memoryview(buffer)
        if not view.c_contiguous:
            raise TransportError(f"only C-contiguous buffers can be sent, got strides {view.strides} of {view.shape}")
        if view.nbytes:
            views.append(view.cast("B"))
    return views


class FrameReader:
    """Cuts a stream of bytes into frames, wherever it was split.

    Ask ``buffer`` where the next bytes should go, then ``advance`` by their number. What is larger than the intake
    buffer is received straight into the memory that ``deliver`` gets.
    """

    def __init__(self, deliver: Callable[[bytes, memoryview], None], limits: Limits) -> None:
        self._deliver, self._limits = deliver, limits
        self._intake = memoryview(bytearray(INTAKE))
        self._end = 0  # bytes in the intake; they always begin at 0
        self._header = b""
        self._payload: memoryview | None = None
        self._filled = 0

    @property
    def partial(self) -> bool:
        """Whether a frame has begun to arrive and is not complete."""
        return self._end > 0 or self._payload is not None

    def buffer(self) -> memoryview:
        """Where the next bytes go; never empty."""
        if self._payload is not None:
            return self._payload[self._filled :]
        return self._intake[self._end :]

    def advance(self, count: int) -> None:
        """Takes note of ``count`` bytes in ``buffer()`` and delivers what became complete.

        Raises:
          TransportError: the bytes are no frames, or exceed the limits. The reader is of no use afterwards.
        """
        if self._payload is None:
            self._end += count
            self._parse()
            return
        self._filled += count
        if self._filled == len(self._payload):
            payload, self._payload = self._payload, None
            self._deliver(self._header, payload)

    def _parse(self) -> None:
        """Takes all whole frames out of the intake, and the first part of an incomplete payload."""
        start = 0
        intake, end = self._intake, self._end
        while self._payload is None and end - start >= PREFIX.size:
            body = start + PREFIX.size
            header, size = read_prefix(intake, start, self._limits)
            if end - body < header:
                self._reserve(PREFIX.size + header)
                break
            start = body + header
            self._header = bytes(intake[body:start])
            payload = aligned(size)
            there = min(size, end - start)
            payload[:there] = intake[start : start + there]
            start += there
            if there == size:
                self._deliver(self._header, payload)
            else:
                self._payload, self._filled = payload, there
        self._keep(start, end)

    def _keep(self, start: int, end: int) -> None:
        """Moves what is left in the intake to its beginning."""
        self._end = end - start
        if self._end:
            self._intake[: self._end] = bytes(self._intake[start:end])
        elif len(self._intake) > INTAKE:
            self._intake = memoryview(bytearray(INTAKE))

    def _reserve(self, size: int) -> None:
        """Makes room for a header that is larger than the intake."""
        if size > len(self._intake):
            grown = memoryview(bytearray(size))
            grown[: self._end] = self._intake[: self._end]
            self._intake = grown
