"""Messages arrive whole and in order; nothing that a peer does disturbs anybody else."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import numpy as np
import pytest
from transport_cases import Header, Inbox, Net, Result, Step

from spotjax.errors import ConnectionLost, TransportError
from spotjax.transport.connection import HIGH_WATER, Connection
from spotjax.transport.framing import Limits, Purpose, frame_start, greeting
from spotjax.transport.loop import run
from spotjax.transport.sockets import join_address, split_address

HELLO = greeting(Purpose.MESSAGES, False)
FRAME = frame_start(msgspec.msgpack.encode(Step(1)), 1000, Limits()) + bytes(1000)


@asynccontextmanager
async def caller(address: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A peer that speaks bytes, not frames."""
    reader, writer = await asyncio.open_connection(*split_address(address))
    try:
        yield reader, writer
    finally:
        writer.transport.abort()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def assert_serving(net: Net, address: str, inbox: Inbox) -> None:
    """A well-behaved peer is served."""
    connection = await net.endpoint().endpoint.connect(address, 5)
    connection.send(Step(7), b"still here")
    while (frame := await inbox.next())[1] != Step(7):
        pass
    assert bytes(frame[2]) == b"still here"


async def test_frames_go_both_ways_in_order(net: Net) -> None:
    address, server = await net.listening()
    client = net.endpoint()
    connection = await client.endpoint.connect(address, 5)
    array = np.arange(300_000, dtype=np.float32)
    for number in range(50):
        connection.send(Step(number), b"a", array if number % 10 == 0 else b"", b"z")
        await connection.drain()
    for number in range(50):
        back, header, payload = await server.next()
        assert header == Step(number)
        assert bytes(payload) == b"a" + (array.tobytes() if number % 10 == 0 else b"") + b"z"
        back.send(Result([number]))
    assert [(await client.next())[1] for _ in range(50)] == [Result([number]) for number in range(50)]


async def test_a_connection_is_used_again_and_made_once(net: Net) -> None:
    address, _ = await net.listening()
    client = net.endpoint().endpoint
    first, *others = await asyncio.gather(*(client.connect(address, 5) for _ in range(10)))
    assert all(other is first for other in others)
    first.close()
    await first.closed
    second = await client.connect(address, 5)
    assert second is not first and second.open
    with pytest.raises(ConnectionLost, match="closed"):
        first.send(Step(0))
    with pytest.raises(ConnectionLost, match="closed"):
        await first.drain()


async def test_what_was_sent_before_close_arrives(net: Net) -> None:
    address, server = await net.listening()
    connection = await net.endpoint().endpoint.connect(address, 5)
    connection.send(Step(1), bytes(8 << 20))
    connection.close()
    _, header, payload = await server.next()
    assert header == Step(1) and len(payload) == 8 << 20


async def test_both_sides_learn_at_once_that_a_connection_ended(net: Net) -> None:
    address, server = await net.listening()
    connection = await net.endpoint().endpoint.connect(address, 5)
    connection.send(Step(1))
    other = (await server.next())[0]
    assert other.peer.startswith("127.0.0.1:") and connection.peer == address
    other.close()
    await asyncio.wait_for(connection.closed, 5)
    await asyncio.wait_for(other.closed, 5)


async def test_nobody_there_is_an_error_in_time(net: Net) -> None:
    client = net.endpoint().endpoint
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and says nothing, as a stopped process does
        address = join_address(silent.getsockname())
        with pytest.raises(ConnectionLost, match=r"within 0\.1 s"):
            await client.connect(address, 0.1)
    with pytest.raises(ConnectionLost, match="cannot connect"):
        await client.connect(address, 5)


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"SJ\x09\x01",
        HELLO + b"\x16\x03\x01 this is not a frame",
        HELLO + frame_start(b"\xc1", 0, Limits()),
        HELLO + frame_start(msgspec.msgpack.encode({"type": "Unknown"}), 4, Limits()) + b"1234",
        HELLO + frame_start(b"", 0, Limits()),
        HELLO + b"SJX1" + b"\xff" * 12,
        greeting(Purpose.BULK, False) + b"\x00" * 64,
        greeting(Purpose.BULK, False) + frame_start(b"\xc1\xc1", 0, Limits()),
        greeting(Purpose.BULK, False)
        + frame_start(msgspec.msgpack.encode({"type": "chunk", "checksum": 1}), 0, Limits()),
    ],
)
async def test_garbage_ends_that_connection_with_a_log_line(
    net: Net, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    address, server = await net.listening()
    with caplog.at_level(logging.WARNING, "spotjax.transport"):
        async with caller(address) as (reader, writer):
            writer.write(data)
            with contextlib.suppress(ConnectionResetError):
                await asyncio.wait_for(reader.read(), 5)
    assert caplog.records
    assert server.frames.empty()
    await assert_serving(net, address, server)


async def test_a_peer_may_hang_up_at_any_byte(net: Net) -> None:
    address, server = await net.listening()
    data = HELLO + FRAME
    chance = random.Random(1)
    for length in [*range(0, 60, 4), *chance.sample(range(60, len(data)), 10)]:
        async with caller(address) as (_, writer):
            writer.write(data[:length])
            await writer.drain()
    await assert_serving(net, address, server)


async def test_random_bytes_do_no_harm(net: Net) -> None:
    address, server = await net.listening()
    chance = random.Random(2)
    for _ in range(20):
        async with caller(address) as (_, writer):
            start = chance.choice([b"", HELLO, HELLO + FRAME, greeting(Purpose.BULK, False)])
            writer.write(start + chance.randbytes(chance.randrange(500)))
            with contextlib.suppress(ConnectionResetError):
                await writer.drain()
    await assert_serving(net, address, server)


async def test_a_peer_that_stops_inside_a_frame_is_given_up(net: Net) -> None:
    address, server = await net.listening(limits=Limits(stall=0.1))
    async with caller(address) as (reader, writer):
        writer.write(HELLO + FRAME[:100])
        with contextlib.suppress(ConnectionResetError):
            await asyncio.wait_for(reader.read(), 5)
    await assert_serving(net, address, server)


async def test_an_idle_connection_stays(net: Net) -> None:
    address, server = await net.listening(limits=Limits(stall=0.02))
    connection = await net.endpoint(limits=Limits(stall=0.02)).endpoint.connect(address, 5)
    connection.send(Step(1), bytes(4 << 20))
    await server.next()
    await asyncio.wait({connection.closed}, timeout=0.2)
    connection.send(Step(2))
    assert (await server.next())[1] == Step(2)


async def test_drain_waits_for_a_slow_reader(net: Net) -> None:
    address, server = await net.listening()
    async with caller(address) as (reader, writer):
        writer.write(HELLO + FRAME)
        connection = (await server.next())[0]
        connection.send(Step(1), bytes(16 << 20))
        waiting = asyncio.ensure_future(connection.drain())
        await asyncio.wait({waiting}, timeout=0.05)
        assert not waiting.done()
        left = 16 << 20
        while left > 0:
            left -= len(await reader.read(HIGH_WATER))
        await asyncio.wait_for(waiting, 5)


async def test_a_reader_that_stops_is_given_up_and_nobody_waits_for_it(net: Net) -> None:
    address, server = await net.listening(limits=Limits(stall=0.1))
    async with caller(address) as (_, writer):
        writer.write(HELLO + FRAME)
        connection = (await server.next())[0]
        connection.send(Step(1), bytes(32 << 20))
        with pytest.raises(ConnectionLost):
            await asyncio.wait_for(connection.drain(), 5)
        assert connection.closed.done()
    await assert_serving(net, address, server)


async def test_a_reader_that_falls_too_far_behind_is_given_up(net: Net) -> None:
    address, server = await net.listening(limits=Limits(backlog=16 << 20))
    async with caller(address) as (_, writer):
        writer.write(HELLO + FRAME)
        connection = (await server.next())[0]
        block = bytes(8 << 20)
        with pytest.raises(ConnectionLost, match="too slowly"):
            for number in range(100):
                connection.send(Step(number), block)
        await asyncio.wait_for(connection.closed, 5)


async def test_a_frame_beyond_the_limits_is_an_error_of_its_sender(net: Net) -> None:
    address, server = await net.listening()
    connection = await net.endpoint(limits=Limits(header=100, payload=1000)).endpoint.connect(address, 5)
    for header, payload in ((Step(1, "x" * 200), b""), (Step(1), bytes(1001))):
        with pytest.raises(TransportError, match="exceeds the limit"):
            connection.send(header, payload)
    connection.send(Step(2), bytes(1000))
    assert (await server.next())[1] == Step(2)


async def test_a_receiver_that_raises_loses_only_that_connection(net: Net, caplog: pytest.LogCaptureFixture) -> None:
    inbox = Inbox()

    def receive(connection: Connection, header: Header, payload: memoryview) -> None:
        if header == Step(13):
            raise RuntimeError("unlucky")
        inbox.receive(connection, header, payload)

    address, _ = await net.listening(receive=receive)
    connection = await net.endpoint().endpoint.connect(address, 5)
    connection.send(Step(13))
    connection.send(Step(14))
    await asyncio.wait_for(connection.closed, 5)
    assert "unlucky" in caplog.text
    assert inbox.frames.empty()
    await assert_serving(net, address, inbox)


async def test_many_connections_at_once(net: Net) -> None:
    address, server = await net.listening()
    clients = [net.endpoint().endpoint for _ in range(60)]
    connections = await asyncio.gather(*(client.connect(address, 10) for client in clients))
    for number, connection in enumerate(connections):
        connection.send(Step(number), bytes(7500))
    assert {(await server.next())[1] for _ in connections} == {Step(number) for number in range(60)}


async def test_a_closed_endpoint_makes_no_connections(net: Net) -> None:
    address, _ = await net.listening()
    client = net.endpoint().endpoint
    connection = await client.connect(address, 5)
    await client.close()
    assert connection.closed.done()
    with pytest.raises(ConnectionLost, match="closed"):
        await client.connect(address, 5)
    with pytest.raises(ConnectionLost, match="closed"):
        await client.fetch(address, b"what", memoryview(bytearray(1)), 5)


async def test_closing_in_the_middle_of_everything_leaves_nothing(net: Net) -> None:
    address, server = await net.listening(provide=lambda what: [bytes(64 << 20)])
    client = net.endpoint().endpoint
    connection = await client.connect(address, 5)
    connection.send(Step(1), bytes(32 << 20))
    into = memoryview(bytearray(64 << 20))
    work = [
        asyncio.ensure_future(client.fetch(address, b"", into, 5)),
        asyncio.ensure_future(client.connect(address, 5)),
    ]
    async with caller(address) as (_, writer):
        writer.write(HELLO[:2])
        await asyncio.sleep(0)
        await server.endpoint.close()
        await client.close()
    for outcome in await asyncio.gather(*work, return_exceptions=True):
        assert isinstance(outcome, ConnectionLost | Connection)


@pytest.mark.parametrize("address", ["127.0.0.1:80", "[::1]:8470", "worker-3.internal:1"])
def test_addresses_are_read_and_written(address: str) -> None:
    assert join_address(split_address(address)) == address


@pytest.mark.parametrize("address", ["", "host", "host:", ":80", "host:http", "host:70000"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="not HOST:PORT"):
        split_address(address)


def test_the_fastest_loop_is_run_and_gives_the_result_back() -> None:
    async def where() -> str:
        return type(asyncio.get_running_loop()).__module__

    assert run(where()).startswith("uvloop")
