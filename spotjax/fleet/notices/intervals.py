"""How long instances really lived after their notices, by source: what clouds promise about that is "best effort".

Plain bookkeeping. An instance that the mesh has left ends by itself, so only of those that were gone before is it known
how long the machine had.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from spotjax.fleet.notices.notice import Notice
from spotjax.fleet.notices.standing import Word


@dataclass(frozen=True, slots=True)
class NoticeRecord:
    """What one source's notices have come to.

    Attributes:
      source: as in ``Notice.source``.
      given: instances that it gave notice to.
      withdrawn: of these, how many were told that they may stay.
      left: how many were let go, or ended themselves, while they lived.
      taken: how many were gone before.
      shortest_seconds, longest_seconds: from notice to end, of those that were taken; 0 if none was.
    """

    source: str
    given: int = 0
    withdrawn: int = 0
    left: int = 0
    taken: int = 0
    shortest_seconds: float = 0.0
    longest_seconds: float = 0.0


@dataclass
class Intervals:
    """The records of all sources."""

    _records: dict[str, NoticeRecord] = field(default_factory=dict)
    _since: dict[str, dict[str, float]] = field(default_factory=dict)
    """By instance and source: when it was given first."""

    def heard(self, word: Word, now: float) -> None:
        """A word of a source, at a moment in monotonic seconds."""
        source = word.source.partition("@")[0]  # of any host of a slice
        record = self._records.setdefault(source, NoticeRecord(source))
        since = self._since.setdefault(word.instance, {})
        if isinstance(word, Notice) and source not in since:
            since[source] = now
            self._records[source] = replace(record, given=record.given + 1)
        elif not isinstance(word, Notice) and since.pop(source, None) is not None:
            self._records[source] = replace(record, withdrawn=record.withdrawn + 1)

    def ended(self, instance: str, now: float, *, in_order: bool) -> float | None:
        """The instance is gone; ``in_order`` if it was let go. Returns seconds since its first notice, if any."""
        since = self._since.pop(instance, {})
        for source, began in since.items():
            record, seconds = self._records[source], now - began
            if in_order:
                self._records[source] = replace(record, left=record.left + 1)
            else:
                self._records[source] = replace(
                    record,
                    taken=record.taken + 1,
                    shortest_seconds=min(record.shortest_seconds, seconds) if record.taken else seconds,
                    longest_seconds=max(record.longest_seconds, seconds),
                )
        return now - min(since.values()) if since else None

    def records(self) -> tuple[NoticeRecord, ...]:
        """Of all sources, by name."""
        return tuple(self._records[source] for source in sorted(self._records))
