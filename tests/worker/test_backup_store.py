"""KV backed up by others: what comes out is what was put in, and the watermark never promises what is not there."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotjax.errors import SliceUnavailable
from spotjax.protocol.backup import BackedUpPage, BackupHeader
from spotjax.worker.backup_store import BackupStore

PAGE_BYTES = 6
PAGE_SIZE = 4


def content(layers: tuple[int, int], pages: list[BackedUpPage], mark: int = 0) -> np.ndarray:
    """Bytes that tell layer, sequence and page number apart, as ``host_pages`` lays them out."""
    cells = [
        [[[(layer * 7 + page.sequence * 3 + page.number + part + mark) % 256] * PAGE_BYTES for page in pages]
         for part in range(2)]
        for layer in range(*layers)
    ]  # fmt: skip
    return np.array(cells, np.uint8).reshape(-1)


def put(
    store: BackupStore,
    layers: tuple[int, int],
    pages: list[BackedUpPage],
    mark: int = 0,
    source: str = "a",
    epoch: int = 1,
    service: str = "",
) -> None:
    store.put(BackupHeader(layers, tuple(pages), source, epoch, service), content(layers, pages, mark))


def pages_of(sequence: int, positions: int) -> list[BackedUpPage]:
    count = -(-positions // PAGE_SIZE)
    return [BackedUpPage(sequence, n, min(positions, (n + 1) * PAGE_SIZE)) for n in range(count)]


@given(
    progress=st.dictionaries(st.integers(0, 5), st.integers(1, 20), min_size=1),
    split=st.integers(1, 3),
    asked=st.lists(st.integers(0, 5), unique=True, min_size=1),
)
def test_what_was_put_in_comes_out_whatever_frames_it_came_in(
    progress: dict[int, int], split: int, asked: list[int]
) -> None:
    store, layers = BackupStore(), (2, 5)
    pages = [page for sequence, positions in progress.items() for page in pages_of(sequence, positions)]
    for first in (2, 4):
        part = (first, min(first + 2, 5))
        for start in range(0, len(pages), split):
            put(store, part, pages[start : start + split])
    assert store.positions(layers, asked) == tuple(progress.get(sequence, 0) for sequence in asked)
    owners = [page for page in pages if page.sequence in asked]
    if owners:
        read = store.read(layers, [(page.sequence, page.number) for page in owners])
        np.testing.assert_array_equal(read, content(layers, owners))


def test_the_watermark_is_that_of_the_layer_that_is_furthest_behind() -> None:
    store = BackupStore()
    put(store, (0, 2), pages_of(1, 9))
    put(store, (2, 3), pages_of(1, 5))
    assert store.positions((0, 2), (1,)) == (9,)
    assert store.positions((0, 3), (1,)) == (5,)
    assert store.positions((0, 4), (1,)) == (0,), "of layer 3 nothing is here"


def test_a_page_that_comes_again_replaces_what_it_was() -> None:
    store, last = BackupStore(), [BackedUpPage(1, 1, 6)]
    put(store, (0, 1), pages_of(1, 5))
    put(store, (0, 1), last, mark=9)
    np.testing.assert_array_equal(store.read((0, 1), [(1, 1)]), content((0, 1), last, mark=9))
    assert store.positions((0, 1), (1,)) == (6,)


def test_a_sequence_that_began_anew_counts_from_its_new_beginning() -> None:
    store = BackupStore()
    put(store, (0, 1), pages_of(1, 12))
    put(store, (0, 1), pages_of(1, 3), mark=5)
    assert store.positions((0, 1), (1,)) == (3,)


def test_what_has_ended_takes_no_memory() -> None:
    store = BackupStore()
    put(store, (0, 2), [*pages_of(1, 4), *pages_of(2, 4)])
    assert store.nbytes == 2 * 2 * 2 * PAGE_BYTES
    store.forget([1, 7])
    assert store.nbytes == 2 * 2 * PAGE_BYTES
    with pytest.raises(SliceUnavailable):
        store.read((0, 2), [(1, 0)])
    store.clear()
    assert store.nbytes == 0


def test_a_frame_of_the_wrong_size_is_refused() -> None:
    with pytest.raises(ValueError):
        BackupStore().put(BackupHeader((0, 2), tuple(pages_of(1, 4))), np.zeros(7, np.uint8))


def test_late_frames_of_a_worker_that_was_lost_leave_no_hole_behind_the_watermark() -> None:
    store, late = BackupStore(), [BackedUpPage(1, 1, 6)]
    put(store, (0, 1), pages_of(1, 6), source="lost", epoch=1)
    put(store, (0, 1), pages_of(1, 9), mark=5, source="its successor", epoch=2)
    put(store, (0, 1), late, source="lost", epoch=1)  # was on its way when the network was cut
    put(store, (0, 1), [BackedUpPage(1, 2, 10)], mark=5, source="its successor", epoch=3)
    assert store.positions((0, 1), (1,)) == (10,)
    everything = pages_of(1, 10)
    read = store.read((0, 1), [(1, page.number) for page in everything])
    np.testing.assert_array_equal(read, content((0, 1), everything, mark=5))


def test_a_new_source_begins_anew() -> None:
    store = BackupStore()
    put(store, (0, 1), pages_of(1, 12), source="a", epoch=1)
    put(store, (0, 1), pages_of(1, 3), mark=5, source="b", epoch=2)
    assert store.positions((0, 1), (1,)) == (3,)
    with pytest.raises(SliceUnavailable):
        store.read((0, 1), [(1, 2)])


def test_pages_whose_predecessors_were_lost_on_the_way_are_not_counted() -> None:
    store = BackupStore()
    put(store, (0, 1), [BackedUpPage(1, 2, 12)])
    assert store.positions((0, 1), (1,)) == (0,)


def test_frames_of_another_controller_are_dropped() -> None:
    store = BackupStore()
    store.service = "new"
    put(store, (0, 1), pages_of(1, 4), service="old", epoch=99)
    assert store.nbytes == 0
    put(store, (0, 1), pages_of(1, 4), service="new")
    assert store.positions((0, 1), (1,)) == (4,)


def test_only_what_is_certain_is_kept() -> None:
    store = BackupStore()
    put(store, (0, 2), [*pages_of(1, 10), *pages_of(2, 4), *pages_of(3, 3)])
    store.keep({1: 6, 3: 9, 7: 2}, 0)
    assert store.positions((0, 2), (1, 2, 3, 7)) == (6, 0, 3, 0)
    with pytest.raises(SliceUnavailable):
        store.read((0, 2), [(2, 0)])
    wanted = pages_of(1, 6)
    np.testing.assert_array_equal(store.read((0, 2), [(1, 0), (1, 1)]), content((0, 2), wanted))


@given(
    frames=st.lists(
        st.tuples(st.integers(0, 2), st.integers(1, 12), st.integers(0, 2), st.integers(0, 1)), max_size=20
    ),
    certain=st.dictionaries(st.integers(0, 2), st.integers(0, 12)),
)
def test_keeping_never_leaves_more_than_there_was_or_is_certain(
    frames: list[tuple[int, int, int, int]], certain: dict[int, int]
) -> None:
    store, keys = BackupStore(), (0, 1, 2)
    for sequence, positions, layer, source in frames:
        put(store, (layer, layer + 1), pages_of(sequence, positions), source=f"{source}", epoch=source)
    before = [store.positions((layer, layer + 1), keys) for layer in range(3)]
    store.keep(certain, 0)
    for layer in range(3):
        expected = tuple(min(n, certain.get(key, 0)) for key, n in zip(keys, before[layer], strict=True))
        assert store.positions((layer, layer + 1), keys) == expected


def test_what_is_sent_under_an_epoch_of_before_comes_too_late() -> None:
    store, layers = BackupStore(), (0, 2)
    put(store, layers, pages_of(1, 10), epoch=3)
    store.keep({1: 6}, 4)
    put(store, layers, pages_of(1, 10), epoch=3)  # it was on its way when the controller died
    put(store, layers, pages_of(2, 4), epoch=4, source="b")
    assert store.positions(layers, [1, 2]) == (6, 0)
    put(store, layers, pages_of(1, 8), epoch=5, source="b")
    assert store.positions(layers, [1]) == (8,)
    store.ignore(0)  # another service counts from the beginning
    put(store, layers, pages_of(2, 4), epoch=1)
    assert store.positions(layers, [2]) == (4,)
