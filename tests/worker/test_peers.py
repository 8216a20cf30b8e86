"""Reads from other workers over real connections, by threads: exact contents, and an end to all when told so."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import numpy as np
import pytest

from spotjax.errors import PeerUnreachable, SliceUnavailable
from spotjax.meshes.instance import DeviceRef
from spotjax.meshes.slices import ArraySlice
from spotjax.protocol import reads
from spotjax.transport.endpoint import Endpoint
from spotjax.worker.backup_store import BackupStore
from spotjax.worker.copies import Copies
from spotjax.worker.peers import RemotePeers

SECONDS = 0.5
"""Without progress, until a peer counts as unreachable."""
WANTED = ArraySlice("embed", ((2, 5), (0, 4)))
CONTENT = np.arange(12, dtype=np.float32).reshape(3, 4)
SOURCE = DeviceRef("b", 1)


class Pair:
    """A worker that reads, and one that is read from."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.answer: Callable[[Any], np.ndarray] = lambda what: CONTENT
        self.endpoints = [
            Endpoint(reads.ReadSlice, self._ignore),
            Endpoint(reads.ReadSlice, self._ignore, provide=self._provide),
        ]
        self.backups = BackupStore()
        self.peers = RemotePeers("a", Copies(self.backups), self.endpoints[0], asyncio.get_running_loop(), SECONDS)

    def _ignore(self, *frame: Any) -> None:
        raise AssertionError("no frames are sent here")

    def _provide(self, what: bytes) -> Sequence[memoryview]:
        self.asked.append(reads.decode(what))
        return [self.answer(self.asked[-1]).reshape(-1).view(np.uint8).data]

    async def read(self, into: np.ndarray, source: DeviceRef = SOURCE) -> None:
        await asyncio.to_thread(self.peers.read_slice, source, WANTED, into)


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    pair = Pair()
    port = await pair.endpoints[1].listen("127.0.0.1:0")
    pair.peers.addresses = {"b": f"127.0.0.1:{port}"}
    yield pair
    for endpoint in pair.endpoints:
        await endpoint.close()
    assert not pair.peers._reading


async def test_a_slice_arrives_where_it_is_wanted(pair: Pair) -> None:
    into = np.zeros((3, 4), np.float32)
    await pair.read(into)
    np.testing.assert_array_equal(into, CONTENT)
    assert pair.asked == [reads.ReadSlice(1, "embed", WANTED.index)]


async def test_pages_are_asked_for_with_the_epoch_that_they_are_of(pair: Pair) -> None:
    pair.peers.epoch = 7
    into = np.zeros(48, np.uint8)
    await asyncio.to_thread(pair.peers.read_pages, "b", 2, (1, 3), [4, 9], into)
    np.testing.assert_array_equal(into.view(np.float32).reshape(3, 4), CONTENT)
    assert pair.asked == [reads.ReadPages(7, 2, (1, 3), (4, 9))]


async def test_nothing_is_asked_for_nothing(pair: Pair) -> None:
    await pair.read(np.zeros((0, 4), np.float32), DeviceRef("nobody", 0))
    assert not pair.asked


async def test_who_refuses_who_is_unknown_and_who_is_gone_cannot_be_reached(pair: Pair) -> None:
    def refuse(what: Any) -> np.ndarray:
        raise SliceUnavailable("it is not here any more")

    into = np.zeros((3, 4), np.float32)
    pair.answer = refuse
    with pytest.raises(PeerUnreachable, match="not here any more") as failed:
        await pair.read(into)
    assert failed.value.instance == "b"
    with pytest.raises(PeerUnreachable, match="address is not known") as failed:
        await pair.read(into, DeviceRef("c", 0))
    assert failed.value.instance == "c"
    pair.peers.addresses = {"b": "127.0.0.1:1"}
    with pytest.raises(PeerUnreachable) as failed:
        await pair.read(into)
    assert failed.value.instance == "b"


async def test_an_answer_of_another_size_is_refused(pair: Pair) -> None:
    pair.answer = lambda what: CONTENT[:2]
    with pytest.raises(PeerUnreachable):
        await pair.read(np.zeros((3, 4), np.float32))


async def test_superseding_ends_reads_under_way_and_those_that_begin_until_others_are_wanted(pair: Pair) -> None:
    entered, leave = threading.Event(), threading.Event()

    def slow(what: Any) -> np.ndarray:
        entered.set()
        assert leave.wait(30)
        return CONTENT

    pair.answer = slow
    into = np.zeros((3, 4), np.float32)
    reading = asyncio.create_task(pair.read(into))
    await asyncio.to_thread(entered.wait, 30)
    pair.peers.supersede()
    with pytest.raises(PeerUnreachable, match="superseded") as failed:
        await reading
    assert failed.value.instance == "", "nobody is at fault"
    with pytest.raises(PeerUnreachable, match="superseded"):
        await pair.read(into)
    leave.set()
    pair.answer = lambda what: CONTENT
    pair.peers.begin()
    await pair.read(into)
    np.testing.assert_array_equal(into, CONTENT)


async def test_a_read_that_begins_just_when_it_is_superseded_ends_too(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit = asyncio.run_coroutine_threadsafe
    never = threading.Event()

    def superseded_meanwhile(*arguments: Any) -> Any:
        pair.peers.supersede()  # it was looked for before, and is not under way yet
        return submit(*arguments)

    def slow(what: Any) -> np.ndarray:
        assert never.wait(30)
        return CONTENT

    pair.answer = slow
    monkeypatch.setattr(asyncio, "run_coroutine_threadsafe", superseded_meanwhile)
    with pytest.raises(PeerUnreachable, match="superseded"):
        await pair.read(np.zeros((3, 4), np.float32))
    never.set()
