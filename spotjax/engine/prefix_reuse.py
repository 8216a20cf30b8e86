"""Gives sequences pages that others have filled, in place of computing them, and caches those that they fill.

What is cached is in ``prefix_cache``; which sequences there are, and what runs next, is for the scheduler to know.
"""

from __future__ import annotations

from collections.abc import Iterable

from spotjax.engine.pages import PageAllocator
from spotjax.engine.prefix_cache import ROOT, Node
from spotjax.engine.request import RequestState
from spotjax.engine.sequence import Sequence


class PrefixReuse:
    """Between the sequences of one replica and the prefix cache of its pages.

    Args:
      pages: of the replica.
      prefill_tokens: positions of one prefill span.

    Attributes:
      positions: whose KV was found since the replica was formed.
      queried: positions of the sequences for which it was looked for.
    """

    def __init__(self, pages: PageAllocator, prefill_tokens: int) -> None:
        self._pages, self._prefill_tokens = pages, prefill_tokens
        self.positions = self.queried = 0

    def find(self, state: RequestState) -> list[int]:
        """Pages of the longest prefix of a sequence that is cached; its last position is left to be computed."""
        most = (state.length - 1) // self._pages.page_size
        return self._pages.cache.match(state.prompt + state.tokens, self._pages.page_size, most)

    def asked(self, sequence: Sequence) -> None:
        """A sequence was let in with what ``find`` had for it."""
        if self._pages.caching:
            self.queried += sequence.state.length

    def take(self, sequence: Sequence, pages: int) -> None:
        """The next pages of a sequence hold what it would have computed."""
        positions = pages * self._pages.page_size
        sequence.cached += pages
        sequence.computed += positions
        self.positions += positions

    def exchange(self, sequences: Iterable[Sequence]) -> None:
        """Gives running sequences what others have filled since they were let in, in place of pages of their own."""
        for sequence in sequences:
            while sequence.missing > 1 and (node := self.next_page(sequence)) is not None:
                page = self._pages.cache.after(*node)
                if page is None or not self.can_use(sequence):
                    break
                self._pages.share([page])
                self._pages.release([sequence.pages[sequence.cached]])
                sequence.pages[sequence.cached] = page
                self.take(sequence, 1)

    def next_page(self, sequence: Sequence) -> Node | None:
        """What its next page will be in the cache when the next prefill span is back; None if it will not be there."""
        size, number = self._pages.page_size, sequence.cached
        filled = sequence.begun + (0 if sequence.in_flight else min(sequence.missing, self._prefill_tokens))
        if not self._pages.caching or sequence.computed != number * size or filled < (number + 1) * size:
            return None
        return self._before(sequence), sequence.tokens(number * size, (number + 1) * size)

    def can_use(self, sequence: Sequence) -> bool:
        """Whether there is a position left to be computed when its next page is there."""
        return (sequence.cached + 1) * self._pages.page_size < sequence.state.length

    def remember(self, sequence: Sequence) -> None:
        """Caches the pages that it has filled, up to the first of which there is another already."""
        size = self._pages.page_size
        while self._pages.caching and sequence.cached < sequence.computed // size:
            number = sequence.cached
            tokens = sequence.tokens(number * size, (number + 1) * size)
            if not self._pages.remember(self._before(sequence), tokens, sequence.pages[number]):
                return
            sequence.cached += 1

    @staticmethod
    def _before(sequence: Sequence) -> int:
        """The last of its pages that is cached."""
        return sequence.pages[sequence.cached - 1] if sequence.cached else ROOT
