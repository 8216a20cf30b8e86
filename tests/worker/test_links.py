"""Frames to other workers by name: what is lost with a link is told once, and only of whom steps are sent to."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import numpy as np
import pytest

from spotjax.errors import ConnectionLost, TransportError
from spotjax.worker.executor import CONTROLLER
from spotjax.worker.links import Links


class Frame(msgspec.Struct, tag=True):
    number: int


class Connection:
    def __init__(self) -> None:
        self.sent: list[tuple[Any, ...]] = []
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.problem: Exception | None = None

    def send(self, header: msgspec.Struct, *payloads: memoryview) -> None:
        if self.problem is not None:
            raise self.problem
        self.sent.append((header, *(bytes(payload) for payload in payloads)))

    async def drain(self) -> None:
        """There is room."""


class Endpoint:
    def __init__(self) -> None:
        self.connections: dict[str, Connection] = {}

    async def connect(self, address: str, timeout: float) -> Connection:
        connection = self.connections.get(address)
        if connection is None or connection.closed.done():
            connection = self.connections[address] = Connection()
        return connection


class Net:
    """Links to a and b, and what they tell."""

    def __init__(self) -> None:
        self.broken: list[tuple[str, str]] = []
        self.endpoint = Endpoint()
        self.links = Links(self.endpoint, lambda *what: self.broken.append(what))  # type: ignore[arg-type]
        self.links.addresses = {"a": "a:1", "b": "b:1", CONTROLLER: "c:1"}

    async def send(self, instance: str, number: int = 0) -> None:
        await asyncio.to_thread(self.links.send, instance, Frame(number), (memoryview(b"abc"),))
        await asyncio.sleep(0)


async def test_frames_are_sent_from_any_thread_in_order() -> None:
    net = Net()
    await net.links.connect("a")
    for number in range(3):
        await net.send("a", number)
    assert net.endpoint.connections["a:1"].sent == [(Frame(number), b"abc") for number in range(3)]
    pushed = net.links.push("a", Frame(3), np.frombuffer(b"de", np.uint8))
    await asyncio.wrap_future(pushed)
    assert net.endpoint.connections["a:1"].sent[3] == (Frame(3), b"de")
    assert not net.broken


@pytest.mark.parametrize("problem", [ConnectionLost("it is closed"), TransportError("it is too large")])
async def test_a_step_that_cannot_be_sent_is_told(problem: Exception) -> None:
    net = Net()
    await net.links.connect("a")
    net.endpoint.connections["a:1"].problem = problem
    await net.send("a")
    await net.send("b")
    assert net.broken == [("a", str(problem)), ("b", "there is no connection")]


async def test_who_is_not_known_cannot_be_connected_to_or_pushed_to() -> None:
    net = Net()
    with pytest.raises(ConnectionLost, match="nobody"):
        await net.links.connect("nobody")
    with pytest.raises(ConnectionLost, match="nobody"):
        await asyncio.wrap_future(net.links.push("nobody", Frame(0), np.zeros(1, np.uint8)))
    assert not net.broken, "copies are not steps"


async def test_a_link_that_closes_is_told_once_and_only_if_steps_go_there() -> None:
    net = Net()
    for instance in ("a", "b", CONTROLLER):
        await net.links.connect(instance)
        await net.links.connect(instance)
    net.links.onward = {"a", CONTROLLER}
    for connection in net.endpoint.connections.values():
        connection.closed.set_result(None)
    await asyncio.sleep(0)
    assert net.broken == [("a", "the connection closed"), (CONTROLLER, "the connection closed")]


async def test_the_end_of_a_link_that_was_replaced_is_no_news() -> None:
    net = Net()
    net.links.onward = {"a"}
    await net.links.connect("a")
    old = net.endpoint.connections.pop("a:1")
    net.links.addresses = {"a": "a:2"}  # it started anew
    await net.links.connect("a")
    old.closed.set_result(None)
    await asyncio.sleep(0)
    assert not net.broken
    await net.send("a", 5)
    assert net.endpoint.connections["a:2"].sent == [(Frame(5), b"abc")]
