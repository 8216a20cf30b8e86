"""A checkpoint with a limit: the same content, not sooner than the limit allows."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from checkpoint_cases import MANY_CHUNKS, random_model

from spotjax.meshes.slices import ArraySlice, whole
from spotjax.models.checkpoint import Checkpoint
from spotjax.models.paced import PacedCheckpoint

BANDWIDTH = 1e6


class Time:
    """Sleeping makes time go by."""

    def __init__(self) -> None:
        self.now = 0.0

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def paced() -> tuple[Checkpoint, PacedCheckpoint, Time]:
    time, checkpoint = Time(), random_model(MANY_CHUNKS).checkpoint
    return checkpoint, PacedCheckpoint(checkpoint, BANDWIDTH, time.clock, time.sleep), time


def test_what_is_read_is_the_same_and_takes_as_long_as_its_bytes_do() -> None:
    checkpoint, slow, time = paced()
    read = 0
    for array in checkpoint.spec.parameters:
        index = whole(array.shape)
        np.testing.assert_array_equal(slow.read(array.name, index), checkpoint.read(array.name, index))
        read += array.size * checkpoint.spec.dtype_bytes
        assert time.now == pytest.approx(read / BANDWIDTH)
    assert slow.spec == checkpoint.spec


def test_many_slices_at_once_wait_once() -> None:
    checkpoint, slow, time = paced()
    arrays = checkpoint.spec.parameters[:3]
    wanted = [(ArraySlice(array.name, whole(array.shape)), np.empty(array.shape, np.float32)) for array in arrays]
    slow.read_into(wanted)
    for (name, index), content in wanted:
        np.testing.assert_array_equal(content, checkpoint.read(name, index))
    assert time.now == pytest.approx(sum(array.size for array in arrays) * checkpoint.spec.dtype_bytes / BANDWIDTH)


def test_time_without_reading_earns_nothing() -> None:
    checkpoint, slow, time = paced()
    array = checkpoint.spec.parameters[0]
    time.now = 1000.0
    slow.read(array.name, whole(array.shape))
    assert time.now == pytest.approx(1000 + array.size * checkpoint.spec.dtype_bytes / BANDWIDTH)


def test_threads_share_the_limit() -> None:
    checkpoint, slow, _ = paced()
    array = checkpoint.spec.parameters[0]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: slow.read(array.name, whole(array.shape)), range(8)))
    assert slow._free_at == pytest.approx(8 * array.size * checkpoint.spec.dtype_bytes / BANDWIDTH)
