"""One connection over HTTP, and what it may take before there is a request that anybody could answer.

uvicorn reads heads of requests of any length for as long as they take; here they are limited in both.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from spotjax.api.http.errors import JSON, RETRY_SECONDS, Kind, body_of
from spotjax.api.http.event_stream import ABORT

MAX_HEAD_BYTES = 64 * 1024
"""Of the first line and the headers; what was read at once may be more before it is looked at."""
HEAD_SECONDS = 20.0
"""From the connection, or from the first byte of a later request, to the end of its head."""
MAX_CONNECTIONS = 4096
LINGER_SECONDS = 1.0
"""For the answer of a refusal to be read by a client that is still sending."""

BAD = Kind(400, "invalid_request_error", "bad_request")
LATE = Kind(408, "invalid_request_error", "request_timeout")
LARGE = Kind(431, "invalid_request_error", "headers_too_large")
CROWDED = Kind(503, "service_unavailable_error", "too_many_connections")


class HeadTooLarge(Exception):
    """Ends the parsing of a request."""


class LimitedConnection(HttpToolsProtocol):
    """uvicorn's, within limits. Scopes have ``ABORT`` among their extensions."""

    _waiting: asyncio.TimerHandle | None = None
    """For the end of a head."""
    _read = 0
    """Bytes of it."""
    _too_large = _refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """Somebody is there."""
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            self._refuse(CROWDED, f"{MAX_CONNECTIONS} connections are open; try again later")
        else:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nobody is there any more."""
        self._wait_no_more()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Something came."""
        if self._refused:
            return  # closing with something unread would take the answer from the client
        super().data_received(data)
        if self._waiting is not None:
            self._read += len(data)
            if self._read > MAX_HEAD_BYTES:
                self._refuse_large()

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self.scope["extensions"] = {ABORT: self.transport.abort}  # type: ignore[dict-item]  # not one of ASGI's
        if self._waiting is None:
            self._wait()

    def on_headers_complete(self) -> None:
        """Its head is there."""
        self._wait_no_more()
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > MAX_HEAD_BYTES:
            self._too_large = True
            raise HeadTooLarge
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """It is no HTTP, or more than is taken."""
        if self._too_large:
            self._refuse_large()
        else:
            self._refuse(BAD, "this is not a request of HTTP/1.1")

    def _wait(self) -> None:
        self._read = 0
        self._waiting = self.loop.call_later(HEAD_SECONDS, self._refuse, LATE, "the request did not come to its end")

    def _wait_no_more(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _refuse_large(self) -> None:
        self._refuse(LARGE, f"the first line and the headers must be at most {MAX_HEAD_BYTES} bytes")

    def _refuse(self, kind: Kind, message: str) -> None:
        """Answers and ends the connection; without an answer if another one is on its way."""
        self._wait_no_more()
        if self.cycle is not None and not self.cycle.response_complete:
            self.transport.abort()
            return
        body = body_of(message, kind)
        headers = {"content-type": JSON, "content-length": len(body), "connection": "close"}
        if kind.status == 503:
            headers["retry-after"] = RETRY_SECONDS
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self.transport.write(STATUS_LINE[kind.status] + lines.encode() + b"\r\n" + body)
        self._refused = True
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(LINGER_SECONDS, self.transport.close)
