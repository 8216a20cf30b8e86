"""Parameters are put together where a later process finds them, and in plain memory where there is no room for them."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from spotjax.meshes.instance import DeviceRef
from spotjax.meshes.slices import ArraySlice, whole
from spotjax.reshard import parameter_store
from spotjax.reshard.parameter_store import ParameterStore
from spotjax.reshard.shards import Shard, ShardStore
from spotjax.reshard.store_directory import store_files, store_path
from spotjax.worker.memory import StoreMemory
from spotjax.worker.worker import attach

FLOAT32 = np.dtype(np.float32)
DEVICE = DeviceRef("worker", 1)
SHAPE = (3, 5)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ParameterStore]:
    store = ParameterStore.open(tmp_path, "worker", "print")
    yield store
    store.close()


def wanted(name: str, shape: tuple[int, ...] = SHAPE) -> ArraySlice:
    return ArraySlice(name, whole(shape))


def content(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=SHAPE).astype(np.float32)


def bring(memory: StoreMemory, name: str, seed: int, device: DeviceRef = DEVICE) -> np.ndarray:
    buffer = memory.allocate(device, wanted(name), SHAPE, FLOAT32)
    assert buffer.shape == SHAPE and buffer.dtype == FLOAT32 and not buffer.any()
    assert buffer.ctypes.data % 64 == 0
    buffer[...] = content(seed)
    memory.complete(device, wanted(name))
    memory.settle()
    return buffer


def stored(store: ParameterStore) -> dict[str, np.ndarray]:
    return {shard.key[1]: shard.content.copy() for shard in store.attached()}


def files(tmp_path: Path) -> int:
    return len(store_files(store_path(tmp_path, "worker")))


def test_what_was_completed_is_there_for_the_next_process_on_the_same_device(tmp_path: Path) -> None:
    first = ParameterStore.open(tmp_path, "worker", "print")
    memory = StoreMemory(first)
    assert memory.shared
    bring(memory, "embed", 1)
    bring(memory, "norm", 2, DeviceRef("worker", 0))
    memory.allocate(DEVICE, wanted("unfinished"), SHAPE, FLOAT32)[...] = 7
    first.close()
    second = ParameterStore.open(tmp_path, "worker", "print")
    devices = tuple(jax.devices()[:2])
    held = attach(second, "worker", devices)
    assert set(held.devices()) == {DeviceRef("worker", 0), DEVICE}
    for device, name, seed in ((DEVICE, "embed", 1), (DeviceRef("worker", 0), "norm", 2)):
        (found,) = held.at(device).items()
        assert found[0] == name and found[1].index == whole(SHAPE)
        assert found[1].buffer.devices() == {devices[device.index]}
        np.testing.assert_array_equal(np.asarray(found[1].buffer), content(seed))
    assert set(attach(second, "worker", devices[:1]).devices()) == {DeviceRef("worker", 0)}, "it has fewer devices now"
    second.close()


def test_there_may_be_nothing_to_attach_to(store: ParameterStore) -> None:
    assert not list(attach(store, "worker", tuple(jax.devices()[:2])).devices())


def test_without_room_in_the_store_parameters_are_put_together_in_plain_memory(
    store: ParameterStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    memory = StoreMemory(store)
    bring(memory, "embed", 1)

    def full(descriptor: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(parameter_store, "reserve", full)
        fallen_back = bring(memory, "norm", 2)
    assert "no room in the parameter store" in caplog.text
    np.testing.assert_array_equal(fallen_back, content(2))
    bring(memory, "last", 3)
    assert stored(store).keys() == {"embed", "last"}
    memory.keep({DEVICE: {name: whole(SHAPE) for name in ("embed", "norm", "last")}})
    memory.settle()
    assert stored(store).keys() == {"embed", "last"}
    assert files(tmp_path) == 2


def test_only_what_is_held_is_kept(store: ParameterStore, tmp_path: Path) -> None:
    memory = StoreMemory(store)
    for seed, name in enumerate(("embed", "norm", "old")):
        bring(memory, name, seed)
    bring(memory, "norm", 9, DeviceRef("worker", 0))
    memory.allocate(DEVICE, wanted("unfinished"), SHAPE, FLOAT32)
    memory.keep({DEVICE: {"embed": whole(SHAPE), "norm": whole(SHAPE)}})
    memory.settle()
    assert {shard.key[:2] for shard in store.attached()} == {(1, "embed"), (1, "norm")}
    assert files(tmp_path) == 2
    memory.complete(DEVICE, wanted("unfinished"))  # comes late, and is of no use
    assert files(tmp_path) == 2


def test_a_shard_that_is_begun_again_leaves_nothing_of_the_first_time(store: ParameterStore, tmp_path: Path) -> None:
    memory = StoreMemory(store)
    for _ in range(3):  # plans that were cut short
        memory.allocate(DEVICE, wanted("embed"), SHAPE, FLOAT32)[...] = 7
    assert files(tmp_path) == 1
    bring(memory, "embed", 1)
    assert files(tmp_path) == 1
    np.testing.assert_array_equal(stored(store)["embed"], content(1))


def test_a_shard_that_is_in_use_stays_valid_when_it_is_replaced_or_dropped(store: ParameterStore) -> None:
    memory = StoreMemory(store)
    used = jax.device_put(bring(memory, "embed", 1), jax.devices()[1])
    held = ShardStore({DEVICE: {"embed": Shard(whole(SHAPE), used)}})
    bring(memory, "embed", 2)
    memory.keep({})
    memory.settle()
    np.testing.assert_array_equal(held.read(DEVICE, wanted("embed")), content(1))
    assert not stored(store)


def test_shards_are_brought_by_several_threads_at_once(store: ParameterStore) -> None:
    memory, problems = StoreMemory(store), []

    def work(thread: int) -> None:
        try:
            for number in range(10):
                bring(memory, f"{thread}-{number}", 10 * thread + number)
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    found = stored(store)
    assert len(found) == 40
    for name, array in found.items():
        thread, number = map(int, name.split("-"))
        np.testing.assert_array_equal(array, content(10 * thread + number))
