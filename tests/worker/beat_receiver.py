"""A controller as far as heartbeats go: a plain socket server that keeps leases."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable

import msgspec

from spotjax.fleet.leases import Leases
from spotjax.protocol.beats import Beat
from spotjax.transport.framing import GREETING, WELCOME, FrameReader, Limits, Purpose, read_greeting
from spotjax.transport.security import Tls

DEADLINE = 30.0
"""Seconds after which what a test waits for counts as never happening."""


class Beats:
    """One connection as the controller reads it: a greeting, then frames."""

    def __init__(self, connection: socket.socket, tls: Tls | None) -> None:
        """Raises: OSError when the caller is gone before its greeting, or does not trust us."""
        first = connection.recv(GREETING.size, socket.MSG_WAITALL)
        if len(first) < GREETING.size:
            raise ConnectionResetError("the caller hung up before its greeting")
        assert read_greeting(first) == (Purpose.MESSAGES, tls is not None, False)
        if tls is not None:
            connection = tls.server.wrap_socket(connection, server_side=True)
        connection.sendall(WELCOME)
        self.connection = connection
        self._beats: list[Beat] = []
        self._frames = FrameReader(self._frame, Limits())

    def receive(self) -> list[Beat] | None:
        """Beats that arrived; None at the end."""
        try:
            count = self.connection.recv_into(self._frames.buffer())
        except ConnectionResetError:
            return None
        self._frames.advance(count)
        beats, self._beats = self._beats, []
        return beats if count else None

    def _frame(self, header: bytes, payload: memoryview) -> None:
        assert not payload
        self._beats.append(msgspec.msgpack.decode(header, type=Beat))


class Receiver:
    """Listens for beats like a controller: the first beat of an instance grants its lease, silence takes it away."""

    def __init__(self, lease: float, port: int = 0, tls: Tls | None = None) -> None:
        self._tls = tls
        self.leases = Leases(lease)
        self.heard: Counter[tuple[str, str]] = Counter()
        self.lost: list[str] = []
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port = self._listener.getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def until(self, happened: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(happened, DEADLINE), f"heard {self.heard}, lost {self.lost}"

    def hears(self, beats: int, instance: str = "one", incarnation: str = "a") -> None:
        """Waits for that many further beats."""
        wanted = self.heard[instance, incarnation] + beats
        self.until(lambda: self.heard[instance, incarnation] >= wanted)

    def close(self) -> None:
        self._closing = True
        self._thread.join()

    def _run(self) -> None:
        tick = self.leases.seconds / 16
        with selectors.DefaultSelector() as selector, contextlib.ExitStack() as open_sockets:
            selector.register(open_sockets.enter_context(self._listener), selectors.EVENT_READ)
            while not self._closing:
                due = time.monotonic() + tick
                ready = selector.select(tick)
                now = time.monotonic()
                with self._changed:
                    if now - due > 2 * tick:  # more than a beat's interval
                        self.leases.stalled(now - due, now)
                    for key, _ in ready:
                        if isinstance(key.data, Beats):
                            self._hear(selector, key.data, now)
                        else:
                            accepted = open_sockets.enter_context(self._listener.accept()[0])
                            with contextlib.suppress(OSError):
                                beats = Beats(accepted, self._tls)
                                open_sockets.enter_context(beats.connection)
                                selector.register(beats.connection, selectors.EVENT_READ, beats)
                    for name in self.leases.expired(now):
                        self.leases.revoke(name)
                        self.lost.append(name)
                    self._changed.notify_all()

    def _hear(self, selector: selectors.BaseSelector, connection: Beats, now: float) -> None:
        beats = connection.receive()
        if beats is None:
            selector.unregister(connection.connection)
            return
        for beat in beats:
            self.heard[beat.instance, beat.incarnation] += 1
            if not self.leases.beat(beat.instance, beat.incarnation, now):
                self.leases.grant(beat.instance, beat.incarnation, now)
