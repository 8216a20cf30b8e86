"""Which KV page belongs to whom. Counts pages, holds no bytes."""

from __future__ import annotations

from collections.abc import Iterable


class PageAllocator:
    """The free pages of one replica.

    Page 0 is never given away: padding rows of a step write there.

    Args:
      pages: total, page 0 included; at least 2.
      page_size: positions per page.
    """

    def __init__(self, pages: int, page_size: int) -> None:
        if pages < 2:
            raise ValueError(f"at least 2 pages are needed (page 0 is reserved), got {pages}")
        self.page_size, self.total = page_size, pages - 1
        self._free = list(range(pages - 1, 0, -1))
        self._taken: set[int] = set()

    @property
    def free(self) -> int:
        """Pages that can be allocated now."""
        return len(self._free)

    def needed(self, positions: int) -> int:
        """Pages that a sequence of so many positions takes."""
        return -(-positions // self.page_size)

    def allocate(self, count: int) -> list[int]:
        """Takes ``count`` pages.

        Raises:
          ValueError: not that many are free; callers ask ``free`` first.
        """
        if count > len(self._free):
            raise ValueError(f"{count} pages asked for, {len(self._free)} free")
        pages = [self._free.pop() for _ in range(count)]
        self._taken.update(pages)
        return pages

    def claim(self, pages: Iterable[int]) -> None:
        """Takes exactly these pages, as a replica does that inherits another's KV.

        Raises:
          ValueError: one of them is taken or does not exist.
        """
        wanted = set(pages)
        missing = wanted.difference(self._free)
        if missing:
            raise ValueError(f"pages {sorted(missing)} are taken or do not exist")
        self._free = [page for page in self._free if page not in wanted]
        self._taken |= wanted

    def release(self, pages: Iterable[int]) -> None:
        """Gives pages back.

        Raises:
          ValueError: one of them was not taken (given back twice).
        """
        for page in pages:
            if page not in self._taken:
                raise ValueError(f"page {page} is released but was not taken")
            self._taken.remove(page)
            self._free.append(page)

    def check(self, owned: Iterable[Iterable[int]]) -> None:
        """Verifies that the given owners hold exactly the taken pages, each once.

        Raises:
          AssertionError: a page is lost or shared.
        """
        held = [page for pages in owned for page in pages]
        if sorted(held) != sorted(self._taken) or len(held) + len(self._free) != self.total:
            raise AssertionError(f"pages do not balance: {len(held)} owned, {len(self._taken)} taken, {self.free} free")
