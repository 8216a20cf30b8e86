"""The side of bulk reads that wants the bytes: idle connections, threads, and going on after a broken connection."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

from spotjax.errors import ChecksumMismatch, ConnectionLost, TransferRefused, TransportError
from spotjax.transport.bulk import BulkStream, Chunk, Read, Refused
from spotjax.transport.framing import Purpose, greeting
from spotjax.transport.join_token import JoinToken
from spotjax.transport.security import Tls
from spotjax.transport.sockets import dial

log = logging.getLogger(__name__)

READS = 16
"""Bulk reads at once; more wait."""
TRIES = 4
"""Connections in a row that may break without a whole chunk having arrived."""
PAUSE_SECONDS = 0.02
"""Before the second try; doubles with each further one."""
IDLE_SECONDS = 20.0
"""How long a connection is kept for the next read; less than the provider waits."""
IDLE_CONNECTIONS = 4
"""Kept for each peer, each of which keeps a thread of the peer waiting."""


class Transfer:
    """One bulk read. ``done`` bytes have arrived and are as they were sent."""

    def __init__(self, what: bytes, into: memoryview) -> None:
        self.what, self.into = what, into
        self.done = 0

    def run(self, stream: BulkStream) -> None:
        """Asks for what is missing and receives it. In a thread.

        Raises:
          TransferRefused, ChecksumMismatch, ConnectionLost, TransportError: see ``BulkReader.fetch``.
        """
        stream.send(Read(self.what, self.done, len(self.into)))
        while True:
            message, size = stream.receive()
            if isinstance(message, Refused):
                raise TransferRefused(message.message)
            left = len(self.into) - self.done
            if not isinstance(message, Chunk) or size > left or (not size and left):
                raise TransportError(f"{left} bytes are missing, got {message!r} with {size} bytes")
            if stream.read_hashed(self.into[self.done : self.done + size]) != message.checksum:
                raise ChecksumMismatch(f"bytes {self.done} to {self.done + size} differ from what was sent")
            self.done += size
            if self.done == len(self.into):
                return


class BulkReader:
    """Reads from all peers."""

    def __init__(self, tls: Tls | None, token: JoinToken | None) -> None:
        self._tls, self._token = tls, token
        self._threads = ThreadPoolExecutor(READS, thread_name_prefix="spotjax-fetch")
        self._room = asyncio.Semaphore(READS)
        self._idle: defaultdict[str, list[tuple[float, BulkStream]]] = defaultdict(list)
        self._busy: set[BulkStream] = set()
        self._closed = False
        self.received = 0
        """Bytes of answers."""

    async def fetch(self, address: str, what: bytes, into: memoryview, timeout: float) -> None:
        """Fills ``into`` with the peer's answer to ``what``.

        Raises:
          ConnectionLost: nothing arrived for ``timeout`` seconds, or connections kept breaking.
          TransferRefused: the peer's ``provide`` raised, or has another number of bytes.
          ChecksumMismatch: bytes kept arriving other than they were sent.
        """
        if into.readonly or not into.c_contiguous:
            raise ValueError("the destination of a bulk read has to be writable and C-contiguous")
        transfer = Transfer(what, into.cast("B") if into.nbytes else memoryview(bytearray()))
        async with self._room:
            await self._persist(address, transfer, timeout)

    async def _persist(self, address: str, transfer: Transfer, timeout: float) -> None:
        tries, arrival = 0, time.monotonic()
        while True:
            before = transfer.done
            stream = self._take(address)
            reused = stream is not None
            try:
                if stream is None:
                    stream = await self._dial(address, arrival + timeout - time.monotonic())
                stream.timeout = timeout
                await self._run(stream, transfer, reused)
            except TransportError as error:
                if stream is not None:
                    arrival = max(arrival, stream.last_arrival)
                    stream.close()
                self._forget(address)
                tries = 0 if transfer.done > before else tries + (not reused)
                silent = time.monotonic() - arrival >= timeout
                if isinstance(error, TransferRefused) or self._closed or silent or tries == TRIES:
                    raise self._named(error, address, transfer) from error
                log.info("reading from %s goes on at byte %d: %s", address, transfer.done, error)
                await asyncio.sleep(PAUSE_SECONDS * 2 ** (tries - 1) if tries else 0)
            except BaseException:
                if stream is not None:
                    stream.close()
                raise
            else:
                self._keep(address, stream)
                return
            finally:
                self.received += transfer.done - before

    @staticmethod
    def _named(error: TransportError, address: str, transfer: Transfer) -> TransportError:
        """The error as callers see it: one of three kinds, with address and position."""
        if isinstance(error, TransferRefused):
            return TransferRefused(f"{address}: {error}")
        kind = ChecksumMismatch if isinstance(error, ChecksumMismatch) else ConnectionLost
        return kind(f"{address}: {error} ({transfer.done} of {len(transfer.into)} bytes had arrived)")

    async def _run(self, stream: BulkStream, transfer: Transfer, reused: bool) -> None:
        """Runs the transfer in a thread; when this is cancelled, the thread has ended before it returns."""

        def converse() -> None:
            if not reused:
                if self._tls is not None:
                    stream.secure(self._tls.client, server_side=False)
                stream.await_welcome()
            transfer.run(stream)

        self._busy.add(stream)
        work = asyncio.get_running_loop().run_in_executor(self._threads, converse)
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError:
            stream.shutdown()
            await asyncio.wait({work})
            work.exception()  # seen: it is the broken connection
            raise
        finally:
            self._busy.discard(stream)

    async def _dial(self, address: str, timeout: float) -> BulkStream:
        if self._closed:
            raise ConnectionLost("this endpoint is closed")
        try:
            async with asyncio.timeout(timeout):
                first = greeting(Purpose.BULK, self._tls is not None, self._token is not None)
                sock = await dial(address, first, self._token)
        except TimeoutError as error:
            raise ConnectionLost(f"no connection within {timeout:g} s") from error
        return BulkStream(sock, timeout)

    def _take(self, address: str) -> BulkStream | None:
        """An idle connection, if there is one; connections that were idle for long are closed."""
        stale = time.monotonic() - IDLE_SECONDS
        for other, idle in list(self._idle.items()):
            for since, stream in idle:
                if since < stale:
                    stream.close()
            self._idle[other] = [(since, stream) for since, stream in idle if since >= stale]
            if not self._idle[other]:
                del self._idle[other]
        return self._idle[address].pop()[1] if self._idle.get(address) else None

    def _keep(self, address: str, stream: BulkStream) -> None:
        if self._closed or len(self._idle[address]) >= IDLE_CONNECTIONS:
            stream.close()
        else:
            self._idle[address].append((time.monotonic(), stream))

    def _forget(self, address: str) -> None:
        """Closes the idle connections with an address where one just broke."""
        for _, stream in self._idle.pop(address, ()):
            stream.close()

    async def close(self) -> None:
        """Ends all reads, with ConnectionLost."""
        self._closed = True
        for address in list(self._idle):
            self._forget(address)
        for stream in self._busy:
            stream.shutdown()
        self._threads.shutdown()
