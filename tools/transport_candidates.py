"""Ways to move bytes between two processes: blocking sockets, asyncio, ZeroMQ and gRPC, each as small as it can be.

For each way a server, which echoes small messages and sends large blocks, and clients that time both. What is compared
with what is ``bench_transport``'s.
"""

from __future__ import annotations

import asyncio
import importlib
import socket
import struct
import time
from collections.abc import Callable, Coroutine
from typing import Any

import grpc
import grpc.aio
import numpy as np

from spotjax.transport.loop import loop_factory

SMALL = 7500
CHUNK = 4 << 20
REQUEST = struct.Struct("<cQ")
"""What a plain TCP client asks for: ``e`` echoes blocks of so many bytes, ``b`` sends so many bytes."""
LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop] | None] = {"asyncio": None, "uvloop": loop_factory}

Clock = Callable[[], float]
now: Clock = time.perf_counter


def source(size: int) -> memoryview:
    """Bytes to send."""
    return memoryview(np.arange(-(-size // 8), dtype=np.int64)).cast("B")[:size]


def run(loop: str, main: Coroutine[Any, Any, Any]) -> Any:
    """Runs ``main`` on the loop of that name."""
    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        return runner.run(main)


# -- blocking sockets: the reference


def receive_exactly(sock: socket.socket, view: memoryview) -> None:
    """Fills ``view``."""
    while view:
        count = sock.recv_into(view)
        if not count:
            raise ConnectionError("the other process hung up")
        view = view[count:]


def raw_serve(ready: Callable[[int], None], data: memoryview) -> None:
    """Answers one connection after the other."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ready(listener.getsockname()[1])
        while True:
            sock, _ = listener.accept()
            with sock:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                request = bytearray(REQUEST.size)
                receive_exactly(sock, memoryview(request))
                kind, size = REQUEST.unpack(request)
                if kind == b"b":
                    sock.sendall(data[:size])
                    continue
                block = memoryview(bytearray(size))
                try:
                    while True:
                        receive_exactly(sock, block)
                        sock.sendall(block)
                except ConnectionError:
                    pass


def raw_small(port: int, rounds: int) -> list[float]:
    """Seconds of each round trip."""
    block, back, seconds = bytes(SMALL), memoryview(bytearray(SMALL)), []
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.sendall(REQUEST.pack(b"e", SMALL))
        for _ in range(rounds):
            start = now()
            sock.sendall(block)
            receive_exactly(sock, back)
            seconds.append(now() - start)
    return seconds


def raw_bulk(port: int, into: memoryview) -> float:
    """Seconds to fill ``into``."""
    with socket.create_connection(("127.0.0.1", port)) as sock:
        start = now()
        sock.sendall(REQUEST.pack(b"b", len(into)))
        receive_exactly(sock, into)
        return now() - start


# -- BufferedProtocol, on either loop


class BufferedServer(asyncio.BufferedProtocol):
    """The same service as a protocol."""

    def __init__(self, data: memoryview) -> None:
        self.data, self.block, self.filled = data, memoryview(bytearray(REQUEST.size)), 0
        self.asked = False
        self.writable = asyncio.Event()
        self.task: asyncio.Task[None] | None = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.writable.set()

    def pause_writing(self) -> None:
        self.writable.clear()

    def resume_writing(self) -> None:
        self.writable.set()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self.block[self.filled :]

    def buffer_updated(self, count: int) -> None:
        self.filled += count
        if self.filled < len(self.block):
            return
        self.filled = 0
        if self.asked:
            self.transport.write(bytes(self.block))
            return
        self.asked = True
        kind, size = REQUEST.unpack(self.block)
        self.block = memoryview(bytearray(size if kind == b"e" else 1))
        if kind == b"b":
            self.task = asyncio.get_running_loop().create_task(self.pour(size))

    async def pour(self, size: int) -> None:
        """Sends in chunks: asyncio copies what cannot be sent at once."""
        for start in range(0, size, CHUNK):
            self.transport.write(self.data[start : min(start + CHUNK, size)])
            await self.writable.wait()


class BufferedClient(asyncio.BufferedProtocol):
    """Receives into ``into``, again and again."""

    def __init__(self, into: memoryview) -> None:
        self.into, self.filled = into, 0
        self.spare = memoryview(bytearray(1))  # uvloop asks once more before it returns
        self.full: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def get_buffer(self, sizehint: int) -> memoryview:
        return self.into[self.filled :] or self.spare

    def buffer_updated(self, count: int) -> None:
        self.filled += count
        if self.filled == len(self.into):
            self.full.set_result(None)

    async def ask(self, data: bytes) -> None:
        """Sends ``data`` and waits until ``into`` is full."""
        self.filled, self.full = 0, asyncio.get_running_loop().create_future()
        self.transport.write(data)
        await self.full


async def buffered_serve(ready: Callable[[int], None], data: memoryview) -> None:
    """Serves until the process ends."""
    server = await asyncio.get_running_loop().create_server(lambda: BufferedServer(data), "127.0.0.1", 0)
    ready(server.sockets[0].getsockname()[1])
    await server.serve_forever()


async def buffered_small(port: int, rounds: int) -> list[float]:
    """Seconds of each round trip."""
    loop, back, seconds = asyncio.get_running_loop(), memoryview(bytearray(SMALL)), []
    transport, client = await loop.create_connection(lambda: BufferedClient(back), "127.0.0.1", port)
    block = bytes(SMALL)
    transport.write(REQUEST.pack(b"e", SMALL))
    for _ in range(rounds):
        start = now()
        await client.ask(block)
        seconds.append(now() - start)
    transport.close()
    return seconds


async def buffered_bulk(port: int, into: memoryview) -> float:
    """Seconds to fill ``into``."""
    loop = asyncio.get_running_loop()
    transport, client = await loop.create_connection(lambda: BufferedClient(into), "127.0.0.1", port)
    start = now()
    await client.ask(REQUEST.pack(b"b", len(into)))
    seconds = now() - start
    transport.close()
    return seconds


# -- asyncio streams


async def streams_serve(ready: Callable[[int], None], data: memoryview) -> None:
    """Serves until the process ends."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        kind, size = REQUEST.unpack(await reader.readexactly(REQUEST.size))
        if kind == b"b":
            for start in range(0, size, CHUNK):
                writer.write(data[start : min(start + CHUNK, size)])
                await writer.drain()
        else:
            try:
                while True:
                    writer.write(await reader.readexactly(size))
            except asyncio.IncompleteReadError:
                pass
        writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0, limit=CHUNK)
    ready(server.sockets[0].getsockname()[1])
    await server.serve_forever()


async def streams_small(port: int, rounds: int) -> list[float]:
    """Seconds of each round trip."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    block, seconds = bytes(SMALL), []
    writer.write(REQUEST.pack(b"e", SMALL))
    for _ in range(rounds):
        start = now()
        writer.write(block)
        await reader.readexactly(SMALL)
        seconds.append(now() - start)
    writer.close()
    return seconds


async def streams_bulk(port: int, into: memoryview) -> float:
    """Seconds to fill ``into``."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=CHUNK)
    start = now()
    writer.write(REQUEST.pack(b"b", len(into)))
    filled = 0
    while filled < len(into):
        part = await reader.read(CHUNK)
        into[filled : filled + len(part)] = part
        filled += len(part)
    seconds = now() - start
    writer.close()
    return seconds


# -- ZeroMQ and gRPC


def zmq_serve(ready: Callable[[int], None], data: memoryview) -> None:
    """Serves until the process ends."""
    zmq: Any = importlib.import_module("zmq")
    router = zmq.Context.instance().socket(zmq.ROUTER)
    router.sndhwm = 0
    ready(router.bind_to_random_port("tcp://127.0.0.1"))
    while True:
        who, request = router.recv_multipart()
        if len(request) != REQUEST.size:
            router.send_multipart([who, request])
            continue
        _, size = REQUEST.unpack(request)
        for start in range(0, size, CHUNK):
            router.send_multipart([who, data[start : min(start + CHUNK, size)]], copy=False)


def zmq_dealer(port: int) -> Any:
    """A connected socket."""
    zmq: Any = importlib.import_module("zmq")
    dealer = zmq.Context.instance().socket(zmq.DEALER)
    dealer.rcvhwm = 8
    dealer.connect(f"tcp://127.0.0.1:{port}")
    return dealer


def zmq_small(port: int, rounds: int) -> list[float]:
    """Seconds of each round trip."""
    block, seconds = bytes(SMALL), []
    with zmq_dealer(port) as dealer:
        for _ in range(rounds):
            start = now()
            dealer.send(block)
            dealer.recv()
            seconds.append(now() - start)
    return seconds


def zmq_bulk(port: int, into: memoryview) -> float:
    """Seconds to fill ``into``."""
    with zmq_dealer(port) as dealer:
        start = now()
        dealer.send(REQUEST.pack(b"b", len(into)))
        filled = 0
        while filled < len(into):
            part = dealer.recv(copy=False).buffer
            into[filled : filled + len(part)] = part
            filled += len(part)
        return now() - start


async def grpc_serve(ready: Callable[[int], None], data: memoryview) -> None:
    """Serves until the process ends."""

    async def echo(request: bytes, context: Any) -> bytes:
        return request

    server = grpc.aio.server()
    handler = grpc.method_handlers_generic_handler("bench", {"Echo": grpc.unary_unary_rpc_method_handler(echo)})
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    ready(port)
    await server.wait_for_termination()


async def grpc_small(port: int, rounds: int) -> list[float]:
    """Seconds of each round trip."""
    block, seconds = bytes(SMALL), []
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        echo: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/bench/Echo")
        for _ in range(rounds):
            start = now()
            await echo(block)
            seconds.append(now() - start)
    return seconds
