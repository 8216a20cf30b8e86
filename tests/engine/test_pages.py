"""Pages balance, whatever the order in which they are taken and given back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotjax.engine.pages import PageAllocator


@given(st.integers(2, 30), st.randoms(use_true_random=False))
def test_every_page_is_free_or_owned_by_one(pages: int, random) -> None:
    allocator = PageAllocator(pages, page_size=4)
    owned: list[list[int]] = []
    for _ in range(40):
        action = random.choice(("allocate", "claim", "release"))
        if action == "allocate":
            owned.append(allocator.allocate(random.randint(0, allocator.free)))
        elif action == "claim":
            free = sorted(set(range(1, pages)).difference(*owned))
            owned.append(random.sample(free, random.randint(0, len(free))))
            allocator.claim(owned[-1])
        elif owned:
            allocator.release(owned.pop(random.randrange(len(owned))))
        allocator.check(owned)
        held = [page for pages_of_one in owned for page in pages_of_one]
        assert len(held) == len(set(held)) == allocator.total - allocator.free
        assert set(held) <= set(range(1, pages)), "page 0 is never given away"


def test_more_pages_than_are_free_are_refused_and_none_is_taken() -> None:
    allocator = PageAllocator(4, page_size=1)
    with pytest.raises(ValueError, match="4 pages asked for, 3 free"):
        allocator.allocate(4)
    assert allocator.free == 3


def test_a_page_is_given_back_once() -> None:
    allocator = PageAllocator(4, page_size=1)
    pages = allocator.allocate(2)
    allocator.release(pages)
    with pytest.raises(ValueError, match=f"page {pages[0]} is released but was not taken"):
        allocator.release(pages[:1])
    assert allocator.free == 3


@pytest.mark.parametrize("page", [0, 1, 9])
def test_only_free_pages_can_be_claimed(page: int) -> None:
    allocator = PageAllocator(4, page_size=1)
    allocator.claim([1])
    with pytest.raises(ValueError, match=rf"pages \[{page}\] are taken or do not exist"):
        allocator.claim([2, page])
    assert allocator.free == 2


@pytest.mark.parametrize("owned", [[], [[1]], [[1, 2], [2]], [[1, 3]]], ids=str)
def test_check_finds_lost_shared_and_foreign_pages(owned: list[list[int]]) -> None:
    allocator = PageAllocator(4, page_size=1)
    allocator.claim([1, 2])
    allocator.check([[2], [1]])
    with pytest.raises(AssertionError, match="pages do not balance"):
        allocator.check(owned)


def test_a_sequence_takes_whole_pages() -> None:
    allocator = PageAllocator(4, page_size=3)
    assert [allocator.needed(positions) for positions in (0, 1, 3, 4, 6, 7)] == [0, 1, 1, 2, 2, 3]


def test_an_allocator_without_a_usable_page_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 pages"):
        PageAllocator(1, page_size=4)
