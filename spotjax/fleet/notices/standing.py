"""What the words of several sources about one instance come to. Pure; who listens to them is ``listen``.

Every source's newest word counts, until it takes it back. Together they are as bad as the worst of them, and as urgent
as the most urgent: one source cannot put off what another one holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import inf

from spotjax.fleet.notices.notice import Notice, NoticeKind, Withdrawn

Word = Notice | Withdrawn
"""What a source says."""

ASSUMED_SECONDS = 5.0
"""That an instance is taken to have when a source says that it ends, but not when."""
LEAD_SECONDS = 300.0
"""Before its deadline, from which on maintenance that was announced is acted on; until then the instance serves on."""
REPEATED_SECONDS = 1.0
"""Within which two deadlines are the same: seconds left are told anew, and travel."""
SEVERITY = tuple(NoticeKind)
"""From advice to fact."""


@dataclass(frozen=True, slots=True)
class Standing:
    """What every source says now.

    Attributes:
      words: the notice of every source that has given one and not taken it back. All but advice have a deadline.
    """

    words: Mapping[str, Notice] = field(default_factory=dict)

    def hear(self, word: Word, now: float) -> Standing:
        """What stands after a source's word.

        A word that was said before, give or take ``REPEATED_SECONDS`` of its deadline, changes nothing. One that ends
        the instance without saying when ends it ``ASSUMED_SECONDS`` from now, or when that source's last word would
        have: said again, it does not become later.

        Args:
          word: of a source.
          now: when it was heard, on the clock of its deadline.
        """
        others = {source: notice for source, notice in self.words.items() if source != word.source}
        if isinstance(word, Withdrawn):
            return Standing(others)
        if word.deadline is None and binding(word):
            before = self.words.get(word.source)
            known = before.deadline if before is not None and binding(before) else None
            word = replace(word, deadline=min(now + ASSUMED_SECONDS, inf if known is None else known))
        return self if _said_again(word, self.words.get(word.source)) else Standing({**others, word.source: word})

    @property
    def notice(self) -> Notice | None:
        """All words as one: the worst kind, with the earliest deadline, in the words of who sets that.

        Advice has no deadline. None if nothing stands.
        """
        if not self.words:
            return None
        ending = [notice for notice in self.words.values() if binding(notice)]
        if not ending:
            return min(self.words.values(), key=lambda notice: notice.source)
        first = min(ending, key=lambda notice: (_deadline(notice), notice.source))
        return replace(first, kind=max((notice.kind for notice in ending), key=SEVERITY.index))


def binding(notice: Notice) -> bool:
    """Whether the instance ends: all but advice."""
    return notice.kind is not NoticeKind.REBALANCE


def acted_on_from(notice: Notice | None) -> float:
    """When to begin to leave, on the clock of the deadline: minus infinity for at once, infinity for never.

    Maintenance is announced an hour before, or days: until shortly before it, the instance is of use.
    """
    if notice is None or not binding(notice):
        return inf
    return _deadline(notice) - LEAD_SECONDS if notice.kind is NoticeKind.MAINTENANCE else -inf


def _said_again(word: Notice, before: Notice | None) -> bool:
    if before is None or replace(word, deadline=None) != replace(before, deadline=None):
        return False
    if word.deadline is None or before.deadline is None:
        return word.deadline == before.deadline
    return abs(word.deadline - before.deadline) < REPEATED_SECONDS


def _deadline(notice: Notice) -> float:
    return -inf if notice.deadline is None else notice.deadline
