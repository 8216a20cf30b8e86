"""Bulk reads arrive whole, go on after broken connections, and end in time when they cannot."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from transport_cases import Net, Step

from spotjax.errors import ChecksumMismatch, ConnectionLost, SliceUnavailable, TransferRefused
from spotjax.transport.bulk import CHUNK
from spotjax.transport.framing import Limits
from spotjax.transport.memory import aligned
from spotjax.transport.reader import READS, TRIES

SIZE = 5 * CHUNK + 12_345
DATA = np.random.default_rng(0).bytes(SIZE)


def provide(what: bytes) -> list[bytes]:
    """The first so many bytes, in pieces."""
    size = int(what)
    return [DATA[: min(1000, size)], DATA[1000 : min(2 * CHUNK, size)], b"", DATA[2 * CHUNK : size]]


async def fetched(net: Net, address: str, size: int = SIZE, timeout: float = 5) -> bytes:
    into = aligned(size)
    await net.endpoint().endpoint.fetch(address, str(size).encode(), into, timeout)
    return bytes(into)


@pytest.mark.parametrize("size", [0, 1, 1000, CHUNK - 1, CHUNK, CHUNK + 1, SIZE])
async def test_the_destination_holds_exactly_what_was_provided(net: Net, size: int) -> None:
    address, _ = await net.listening(provide=provide)
    assert await fetched(net, address, size) == DATA[:size]


async def test_both_sides_count_the_bytes(net: Net) -> None:
    address, inbox = await net.listening(provide=provide)
    reader = net.endpoint().endpoint
    for size in (SIZE, 1000):
        await reader.fetch(address, str(size).encode(), aligned(size), 5)
    assert reader.traffic == (0, SIZE + 1000)
    async with asyncio.timeout(5):
        while inbox.endpoint.traffic != (SIZE + 1000, 0):  # its thread is about to count
            await asyncio.sleep(0)


async def test_arrays_are_read_into_arrays(net: Net) -> None:
    array = np.arange(60_000, dtype=np.float32).reshape(200, 300)
    address, _ = await net.listening(provide=lambda what: [array[:50], array[50:]])
    into = np.zeros_like(array)
    await net.endpoint().endpoint.fetch(address, b"rows", memoryview(into), 5)
    assert (into == array).all()


async def test_many_reads_at_once_and_in_turn(net: Net) -> None:
    address, _ = await net.listening(provide=provide)
    client = net.endpoint().endpoint
    for _ in range(3):
        blocks = [aligned(10_000 + number) for number in range(3 * READS)]
        await asyncio.gather(*(client.fetch(address, str(len(block)).encode(), block, 5) for block in blocks))
        assert all(block == DATA[: len(block)] for block in blocks)


async def test_messages_pass_by_a_bulk_read_that_stands_still(net: Net) -> None:
    go = threading.Event()

    def slow(what: bytes) -> list[bytes]:
        go.wait(10)
        return [b"x"]

    address, server = await net.listening(provide=slow)
    client = net.endpoint().endpoint
    into = aligned(1)
    reads = [asyncio.ensure_future(client.fetch(address, b"", into, 10)) for _ in range(3)]
    try:
        (await client.connect(address, 5)).send(Step(1), b"step")
        assert (await server.next())[1] == Step(1)
        assert not any(read.done() for read in reads)
    finally:
        go.set()
    await asyncio.gather(*reads)


async def test_a_read_goes_on_where_it_stopped(net: Net) -> None:
    asked: list[bytes] = []

    def counted(what: bytes) -> list[bytes]:
        asked.append(what)
        return provide(what)

    address, _ = await net.listening(provide=counted)
    passed = 0

    def cut_after_two_chunks(connection: int, position: int, data: bytes) -> bytes | None:
        nonlocal passed
        passed += len(data)
        return None if position + len(data) > 2.5 * CHUNK else data

    proxy = net.proxy(address, cut_after_two_chunks)
    assert await fetched(net, proxy.address) == DATA
    assert len(asked) == proxy.connections == 3
    assert passed < SIZE + 3 * CHUNK, "at most the chunk that was cut is sent again"


@pytest.mark.parametrize("position", [0, 10, 16, 30, 60, 5000, CHUNK, CHUNK + 70, SIZE - 1])
async def test_a_connection_may_break_at_any_byte(net: Net, position: int) -> None:
    address, _ = await net.listening(provide=provide)

    def cut(connection: int, at: int, data: bytes) -> bytes | None:
        return None if connection == 0 and at + len(data) > position else data

    proxy = net.proxy(address, cut)
    assert await fetched(net, proxy.address) == DATA


async def test_connections_that_bring_nothing_end_the_read_after_bounded_tries(net: Net) -> None:
    address, _ = await net.listening(provide=provide)
    proxy = net.proxy(address, lambda connection, position, data: None)
    with pytest.raises(ConnectionLost, match=f"0 of {SIZE} bytes"):
        await fetched(net, proxy.address)
    assert proxy.connections == TRIES


def flip(data: bytes, index: int) -> bytes:
    return data[:index] + bytes([data[index] ^ 1]) + data[index + 1 :]


async def test_a_flipped_bit_is_read_again(net: Net) -> None:
    address, _ = await net.listening(provide=provide)

    def flip_once(connection: int, position: int, data: bytes) -> bytes:
        index = 2 * CHUNK + 5000 - position
        return flip(data, index) if connection == 0 and 0 <= index < len(data) else data

    proxy = net.proxy(address, flip_once)
    assert await fetched(net, proxy.address) == DATA
    assert proxy.connections == 2


async def test_bits_that_keep_flipping_are_an_error(net: Net) -> None:
    address, _ = await net.listening(provide=provide)

    def flip_always(connection: int, position: int, data: bytes) -> bytes:
        index = 5000 - position
        return flip(data, index) if 0 <= index < len(data) else data

    proxy = net.proxy(address, flip_always)
    with pytest.raises(ChecksumMismatch, match=f"{proxy.address}: bytes 0 to {CHUNK} differ"):
        await fetched(net, proxy.address)


def refuse(what: bytes) -> list[bytes]:
    raise SliceUnavailable("layer 3 is held by nobody")


def fail(what: bytes) -> list[bytes]:
    raise KeyError(what)


@pytest.mark.parametrize(
    ("provider", "message"),
    [
        (refuse, "layer 3 is held by nobody"),
        (fail, "KeyError"),
        (None, "provides nothing"),
        (lambda what: [b"12345"], "has 5 bytes, 10 were asked for"),
        (lambda what: [np.arange(10, dtype=np.int8)[::-1]], "contiguous"),
    ],
)
async def test_refusals_carry_their_reason_and_are_not_tried_again(
    net: Net, provider: Callable[[bytes], list[bytes]] | None, message: str
) -> None:
    address, _ = await net.listening(provide=provider)
    proxy = net.proxy(address, lambda connection, position, data: data)
    with pytest.raises(TransferRefused, match=message):
        await fetched(net, proxy.address, 10)
    assert proxy.connections == 1


@pytest.mark.parametrize("position", [0, 20, 3000, 3 * CHUNK])
async def test_a_peer_that_falls_silent_is_given_up_in_time(net: Net, position: int) -> None:
    address, _ = await net.listening(provide=provide)
    proxy = net.proxy(address, lambda connection, at, data: data if at < position else b"")
    start = time.monotonic()
    with pytest.raises(ConnectionLost, match=r"nothing moved for 0\.2 s"):
        await fetched(net, proxy.address, timeout=0.2)
    assert 0.2 <= time.monotonic() - start < 2
    assert proxy.connections == 1


async def test_a_slow_peer_is_not_a_silent_one(net: Net) -> None:
    address, _ = await net.listening(provide=provide)

    def slow(connection: int, position: int, data: bytes) -> bytes:
        time.sleep(0.004)  # in every 64 KiB: the whole takes longer than the timeout
        return data

    proxy = net.proxy(address, slow)
    into = aligned(SIZE)
    start = time.monotonic()
    client = net.endpoint().endpoint
    await client.fetch(proxy.address, str(SIZE).encode(), into, 0.25)
    assert into == DATA
    assert time.monotonic() - start > 0.25


STOPS_ITSELF = """
import asyncio, os, signal, threading
from spotjax.transport.endpoint import Endpoint
import msgspec

class Nothing(msgspec.Struct, tag=True): ...

def provide(what):
    if what == b"stop":
        os.kill(os.getpid(), signal.SIGSTOP)
        threading.Event().wait(1)  # the signal may take a moment
    if what == b"die":
        os.kill(os.getpid(), signal.SIGKILL)
    return [bytes(int(what))]

async def main():
    endpoint = Endpoint(Nothing, lambda *frame: None, provide=provide)
    print(await endpoint.listen("127.0.0.1:0"), flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.parametrize("what", [b"stop", b"die"])
async def test_a_process_that_is_stopped_or_killed_in_mid_transfer_is_lost(net: Net, what: bytes) -> None:
    with subprocess.Popen([sys.executable, "-c", STOPS_ITSELF], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            address = f"127.0.0.1:{process.stdout.readline().strip()}"
            client = net.endpoint().endpoint
            into = aligned(SIZE)
            await client.fetch(address, str(SIZE).encode(), into, 5)
            start = time.monotonic()
            with pytest.raises(ConnectionLost):
                await client.fetch(address, what, into, 0.5)
            assert time.monotonic() - start < 3
            if what == b"stop":
                with pytest.raises(ConnectionLost, match="nothing moved"):
                    await client.fetch(address, b"1", into[:1], 0.2)  # its kernel still takes connections
                os.kill(process.pid, signal.SIGCONT)
                await client.fetch(address, str(SIZE).encode(), into, 5)
        finally:
            process.kill()


async def test_a_connection_that_ended_while_idle_costs_no_try(net: Net) -> None:
    address, server = await net.listening(provide=provide)
    client = net.endpoint().endpoint
    into = aligned(100)
    await client.fetch(address, b"100", into, 5)
    await server.endpoint.close()
    again = net.endpoint(provide=provide)
    await again.endpoint.listen(address)
    await client.fetch(address, b"100", into, 5)
    assert into == DATA[:100]


async def test_a_reader_that_stops_frees_its_thread(net: Net) -> None:
    block = bytes(64 << 20)
    address, server = await net.listening(provide=lambda what: [block], limits=Limits(stall=0.1))
    began, loop = asyncio.Event(), asyncio.get_running_loop()

    def stop(connection: int, position: int, data: bytes) -> bytes:
        loop.call_soon_threadsafe(began.set)
        return data

    proxy = net.proxy(address, stop)
    client = net.endpoint().endpoint
    read = asyncio.ensure_future(client.fetch(proxy.address, b"", aligned(len(block)), 30))
    await began.wait()
    read.cancel()
    await asyncio.wait({read})
    assert read.cancelled()
    await asyncio.wait_for(server.endpoint.close(), 5)


async def test_a_cancelled_read_writes_no_more(net: Net) -> None:
    address, _ = await net.listening(provide=provide)
    began, loop = asyncio.Event(), asyncio.get_running_loop()

    def hold(connection: int, position: int, data: bytes) -> bytes:
        loop.call_soon_threadsafe(began.set)
        return data if position < CHUNK else b""

    proxy = net.proxy(address, hold)
    client = net.endpoint().endpoint
    into = aligned(SIZE)
    read = asyncio.ensure_future(client.fetch(proxy.address, str(SIZE).encode(), into, 30))
    await began.wait()
    read.cancel()
    with pytest.raises(asyncio.CancelledError):
        await read
    into[:] = bytes(SIZE)
    await client.fetch(address, b"10", aligned(10), 5)
    assert into == bytes(SIZE)


async def test_connections_beyond_the_limit_are_turned_away(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spotjax.transport.provider.CONNECTIONS", 2)
    go = threading.Event()

    def slow(what: bytes) -> list[bytes]:
        go.wait(10)
        return [b"x"]

    address, _ = await net.listening(provide=slow)
    client = net.endpoint().endpoint
    reads = [asyncio.ensure_future(client.fetch(address, b"", aligned(1), 10)) for _ in range(3)]
    try:
        done, served = await asyncio.wait(reads, return_when=asyncio.FIRST_COMPLETED)
        assert [type(read.exception()) for read in done] == [ConnectionLost]
    finally:
        go.set()
    await asyncio.gather(*served)


async def test_an_address_that_nobody_listens_at_is_given_up_long_before_the_timeout(net: Net) -> None:
    endpoint = net.endpoint().endpoint
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
    async with asyncio.timeout(60):
        with pytest.raises(ConnectionLost, match="cannot connect"):
            await endpoint.fetch(address, b"x", memoryview(bytearray(8)), 600)


async def test_a_read_only_destination_is_refused(net: Net) -> None:
    with pytest.raises(ValueError, match="writable"):
        await net.endpoint().endpoint.fetch("127.0.0.1:1", b"", memoryview(b"fixed"), 1)
