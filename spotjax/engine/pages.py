"""Which KV page belongs to whom. Counts pages, holds no bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from spotjax.engine.prefix_cache import ROOT, PrefixCache, Tokens


class PageAllocator:
    """The pages of one replica: free, referred to by one sequence or several, or cached.

    Page 0 is never given away: padding rows of a step write there.

    Args:
      pages: total, page 0 included; at least 2.
      page_size: positions per page.
      caching: whether pages are kept that nobody refers to any more, until there are no others to give away.

    Attributes:
      cache: the pages that can be found again by their tokens.
      gains: how often pages were given back, or cached: as long as that stays the same, who did not fit does not fit.
    """

    def __init__(self, pages: int, page_size: int, *, caching: bool = False) -> None:
        if pages < 2:
            raise ValueError(f"at least 2 pages are needed (page 0 is reserved), got {pages}")
        self.page_size, self.total, self.caching = page_size, pages - 1, caching
        self.cache = PrefixCache()
        self.gains = 0
        self._free = list(range(pages - 1, 0, -1))
        self._references: dict[int, int] = {}
        self._lives = [0] * pages

    @property
    def free(self) -> int:
        """Pages that can be allocated now, idle ones of the cache among them."""
        return len(self._free) + len(self.cache.idle)

    def needed(self, positions: int) -> int:
        """Pages that a sequence of so many positions takes."""
        return -(-positions // self.page_size)

    def references(self, page: int) -> int:
        """Sequences that refer to a page."""
        return self._references.get(page, 0)

    def life(self, page: int) -> int:
        """How often a page was given away: as long as that stays the same, so does what it has been filled with."""
        return self._lives[page]

    def allocate(self, count: int) -> list[int]:
        """Takes ``count`` pages; where no others are left, those that have been idle in the cache for longest.

        Raises:
          ValueError: not that many are free; callers ask ``free`` first.
        """
        if count > self.free:
            raise ValueError(f"{count} pages asked for, {self.free} free")
        pages = [self._free.pop() if self._free else self.cache.evict() for _ in range(count)]
        self._take(pages)
        return pages

    def claim(self, pages: Iterable[int]) -> None:
        """Takes exactly these pages, as a replica does that inherits another's KV.

        Raises:
          ValueError: one of them is taken, cached or does not exist.
        """
        wanted = set(pages)
        missing = wanted.difference(self._free)
        if missing:
            raise ValueError(f"pages {sorted(missing)} are taken or do not exist")
        self._free = [page for page in self._free if page not in wanted]
        self._take(wanted)

    def share(self, pages: Iterable[int]) -> None:
        """Adds a reference to pages that others refer to, or that are cached.

        Raises:
          ValueError: one of them is neither.
        """
        for page in pages:
            if page not in self._references:
                if page not in self.cache:
                    raise ValueError(f"page {page} is to be shared but holds nothing")
                self.cache.revive(page)
            self._references[page] = self.references(page) + 1

    def release(self, pages: Sequence[int]) -> None:
        """Gives up one reference to each of a sequence's pages, the last page first.

        Raises:
          ValueError: one of them was not taken (given back twice).
        """
        self.gains += 1
        for page in reversed(pages):
            left = self.references(page) - 1
            if left < 0:
                raise ValueError(f"page {page} is released but was not taken")
            if left:
                self._references[page] = left
                continue
            del self._references[page]
            if page in self.cache:
                self.cache.rest(page)
            else:
                self._free.append(page)

    def remember(self, before: int, tokens: Tokens, page: int) -> bool:
        """Caches a full page that follows another; False if none are cached, or a page of the same tokens is."""
        cached = self.caching and self.cache.insert(before, tokens, page)
        self.gains += cached
        return cached

    def forget(self) -> None:
        """Caches nothing of what was cached: pages do not hold it any more."""
        self.gains += 1
        self._free += self.cache.clear()

    def check(self, owned: Iterable[Iterable[int]]) -> None:
        """Verifies that the given owners hold exactly the references that there are, and the cache what is left.

        Raises:
          AssertionError: a page is lost, or used by somebody it was not given to.
        """
        held, idle = Counter(page for pages in owned for page in pages), set(self.cache.idle)
        if held != self._references or len(held) + len(self._free) + len(idle) != self.total:
            raise AssertionError(
                f"pages do not balance: {len(held)} owned, {len(self._references)} taken, {self.free} free"
            )
        cached = {page for page, _ in self.cache.nodes()}
        assert cached >= idle and cached <= idle | held.keys(), "a page is cached and free, or idle and not cached"
        assert idle.isdisjoint(held), "a page is idle and in use"
        for page, (before, _) in self.cache.nodes():
            assert before == ROOT or before in (cached if page in idle else held), "a page outlives the one before it"

    def _take(self, pages: Iterable[int]) -> None:
        for page in pages:
            self._references[page] = 1
            self._lives[page] += 1
