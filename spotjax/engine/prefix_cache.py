"""Which KV pages hold which tokens, so that sequences that begin alike share the pages of their common prefix.

A prefix tree of full pages, one node for a page, as in SGLang's RadixAttention (Zheng et al. 2023). KV depends on the
tokens of its page and on all before them, so a node is known by the page before it and by its own tokens. These are
compared as they are: with digests in their place, two prefixes might be taken for each other. Holds page numbers, no
bytes; who refers to a page, and which pages are free, is known to ``pages``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator

ROOT = 0
"""In place of the page before a first one: no sequence ever has page 0."""

Tokens = tuple[int, ...]
Node = tuple[int, Tokens]
"""The page before a page, and the tokens of its positions."""


class PrefixCache:
    """The full pages of one replica that can be found again, in use or idle.

    Idle pages are those that nobody refers to. Whoever refers to a page also refers to those before it, and gives up
    the later ones first. So the page that has been idle for longest has no page after it, and can be evicted.
    """

    def __init__(self) -> None:
        self._pages: dict[Node, int] = {}
        self._nodes: dict[int, Node] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    def __contains__(self, page: int) -> bool:
        return page in self._nodes

    @property
    def idle(self) -> Collection[int]:
        """Pages that nobody refers to, next to be evicted first."""
        return self._idle.keys()

    def nodes(self) -> Iterator[tuple[int, Node]]:
        """All pages, each after the one before it."""
        return iter(self._nodes.items())

    def after(self, page: int, tokens: Tokens) -> int | None:
        """The page with these tokens that comes after a page; after ROOT, the first page of a prompt."""
        return self._pages.get((page, tokens))

    def match(self, tokens: Tokens, page_size: int, most: int) -> list[int]:
        """The pages of the longest prefix of ``tokens`` that is here, ``most`` of them at most."""
        found: list[int] = []
        for start in range(0, most * page_size, page_size):
            page = self.after(found[-1] if found else ROOT, tokens[start : start + page_size])
            if page is None:
                break
            found.append(page)
        return found

    def insert(self, before: int, tokens: Tokens, page: int) -> bool:
        """Makes a page known that its owner has filled, after ROOT or one that is known; False if another has that."""
        known = self._pages.setdefault((before, tokens), page)
        if known == page:
            self._nodes[page] = (before, tokens)
        return known == page

    def rest(self, page: int) -> None:
        """Nobody refers to a page any more."""
        self._idle[page] = None

    def revive(self, page: int) -> None:
        """Somebody refers to an idle page again."""
        del self._idle[page]

    def clear(self) -> list[int]:
        """Forgets all pages; returns those that were idle."""
        idle = list(self._idle)
        for known in (self._pages, self._nodes, self._idle):
            known.clear()
        return idle

    def evict(self) -> int:
        """Forgets the page that has been idle for longest."""
        page, _ = self._idle.popitem(last=False)
        del self._pages[self._nodes.pop(page)]
        return page
