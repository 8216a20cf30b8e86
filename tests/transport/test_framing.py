"""Frames come out as they were put in, wherever the stream was split; garbage does not."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotjax.errors import TransportError
from spotjax.transport.bulk import chunks
from spotjax.transport.framing import (
    INTAKE,
    PREFIX,
    FrameReader,
    Limits,
    Purpose,
    byte_views,
    frame_start,
    greeting,
    read_greeting,
)
from spotjax.transport.memory import ALIGNMENT

LIMITS = Limits(header=3 * INTAKE, payload=8 * INTAKE)
sizes = st.one_of(st.integers(0, 300), st.sampled_from([INTAKE - 17, INTAKE, INTAKE + 1, 2 * INTAKE + 3]))


def feed(reader: FrameReader, data: bytes, steps: list[int]) -> None:
    """Gives the reader ``data`` in pieces of at most ``steps`` bytes, over and over."""
    position, turn = 0, 0
    while position < len(data):
        room = reader.buffer()
        assert room, "a loop that gets no buffer gives the connection up"
        count = min(len(room), steps[turn % len(steps)], len(data) - position)
        room[:count] = data[position : position + count]
        reader.advance(count)
        position, turn = position + count, turn + 1


def content(size: int, seed: int) -> bytes:
    return np.random.default_rng(seed).bytes(size)


@given(st.lists(st.tuples(sizes, sizes), max_size=5), st.lists(st.integers(1, 3 * INTAKE), min_size=1, max_size=5))
def test_frames_survive_any_split(lengths: list[tuple[int, int]], steps: list[int]) -> None:
    frames = [(content(header, i), content(payload, -i - 1 & 0xFF)) for i, (header, payload) in enumerate(lengths)]
    got: list[tuple[bytes, memoryview]] = []
    reader = FrameReader(lambda header, payload: got.append((header, payload)), LIMITS)
    stream = b"".join(frame_start(header, len(payload), LIMITS) + payload for header, payload in frames)
    feed(reader, stream, [*steps, 10_000])
    assert [(header, bytes(payload)) for header, payload in got] == frames
    assert not reader.partial


@given(st.integers(1, PREFIX.size + 199))
def test_an_incomplete_frame_is_not_delivered(length: int) -> None:
    def unexpected(header: bytes, payload: memoryview) -> None:
        raise AssertionError("delivered too early")

    reader = FrameReader(unexpected, LIMITS)
    feed(reader, (frame_start(b"h" * 100, 100, LIMITS) + b"p" * 100)[:length], [7])
    assert reader.partial


@pytest.mark.parametrize("size", [1, 64, 7500, INTAKE, 5 * INTAKE])
def test_payloads_begin_at_aligned_addresses_in_memory_of_their_own(size: int) -> None:
    got: list[memoryview] = []
    reader = FrameReader(lambda header, payload: got.append(payload), LIMITS)
    for fill in (b"a", b"b"):
        feed(reader, frame_start(b"h", size, LIMITS) + fill * size, [50_000])
    assert [bytes(payload) for payload in got] == [b"a" * size, b"b" * size]
    arrays = [np.frombuffer(payload, np.uint8) for payload in got]
    assert all(array.ctypes.data % ALIGNMENT == 0 for array in arrays)
    assert not np.shares_memory(*arrays)


@given(st.binary(min_size=PREFIX.size, max_size=200).filter(lambda data: not data.startswith(b"SJX1")))
def test_garbage_is_refused(data: bytes) -> None:
    reader = FrameReader(lambda header, payload: None, LIMITS)
    with pytest.raises(TransportError, match="another protocol"):
        feed(reader, data, [11])


@pytest.mark.parametrize(
    ("header", "payload", "message"),
    [(LIMITS.header + 1, 0, "a header of"), (1, LIMITS.payload + 1, "a payload of"), (2**32 - 1, 2**64 - 1, "header")],
)
def test_what_exceeds_the_limits_is_refused_before_memory_is_taken(header: int, payload: int, message: str) -> None:
    reader = FrameReader(lambda header, payload: None, LIMITS)
    with pytest.raises(TransportError, match=message):
        feed(reader, PREFIX.pack(b"SJX1", header, payload), [100])


def test_too_large_frames_are_refused_by_the_sender() -> None:
    with pytest.raises(TransportError, match="use a bulk read"):
        frame_start(b"h", LIMITS.payload + 1, LIMITS)


@pytest.mark.parametrize("purpose", Purpose)
@pytest.mark.parametrize("secure", [False, True])
def test_greetings_say_what_a_connection_is_for(purpose: Purpose, secure: bool) -> None:
    for proven in (False, True):
        assert read_greeting(greeting(purpose, secure, proven)) == (purpose, secure, proven)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"GET ", "another program"),
        (b"SJ\x02\x01", "version 2"),
        (b"SJ\x01\x7f", "unknown kind"),
        (b"SJ\x01\x00", "kind"),
    ],
)
def test_foreign_greetings_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(TransportError, match=message):
        read_greeting(data)


@given(st.lists(st.binary(max_size=40), max_size=8), st.integers(1, 30), st.data())
def test_chunks_are_the_bytes_from_the_offset_on(buffers: list[bytes], size: int, data: st.DataObject) -> None:
    whole = b"".join(buffers)
    offset = data.draw(st.integers(0, len(whole)))
    groups = [b"".join(group) for group in chunks(byte_views(buffers), offset, size)]
    assert b"".join(groups) == whole[offset:]
    assert all(len(group) == size for group in groups[:-1])
    assert all(groups)


def test_only_contiguous_buffers_can_be_sent() -> None:
    array = np.arange(12, dtype=np.int16).reshape(3, 4)
    assert b"".join(byte_views([array, b"", array[:0], b"x"])) == array.tobytes() + b"x"
    with pytest.raises(TransportError, match="contiguous"):
        byte_views([array[:, 1:]])
