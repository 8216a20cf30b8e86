"""How long a worker that failed must stay out: longer every time, so that one bad machine does not keep a fleet busy.

Bookkeeping only: no clock, no sockets. Every ``now`` is the caller's monotonic clock, in seconds. What counts as a
failure is the caller's business.
"""

from __future__ import annotations

from dataclasses import dataclass

FIRST_SECONDS, LONGEST_SECONDS = 1.0, 60.0
"""The first time out, which doubles with every failure, and the longest."""
GOOD_SERVICE_SECONDS = 60.0
"""Of service without a failure, after which those before are forgiven."""


@dataclass(slots=True)
class _Record:
    """Failures of one process.

    Attributes:
      incarnation: of the process; another one of that name begins with a clean record.
      seconds: the latest time out.
      until: when it is over.
      serving_since: when it was taken in again, None while it is out.
    """

    incarnation: str
    seconds: float
    until: float
    serving_since: float | None = None


class Probation:
    """The failures of all instances."""

    def __init__(self) -> None:
        self._records: dict[str, _Record] = {}

    def failed(self, name: str, incarnation: str, now: float) -> float:
        """Notes a failure. Returns the seconds that the instance must stay out."""
        record = self._of(name, incarnation)
        since = record.serving_since if record is not None else None
        forgiven = since is not None and now - since >= GOOD_SERVICE_SECONDS
        seconds = FIRST_SECONDS if record is None or forgiven else min(2 * record.seconds, LONGEST_SECONDS)
        self._records[name] = _Record(incarnation, seconds, now + seconds)
        return seconds

    def serves(self, name: str, incarnation: str, now: float) -> None:
        """Notes that an instance was taken in."""
        record = self._of(name, incarnation)
        if record is None:
            self._records.pop(name, None)  # of a process that is no more
        else:
            record.serving_since = now

    def remaining(self, name: str, incarnation: str, now: float) -> float:
        """Seconds that an instance must still stay out: 0 if it may come in."""
        record = self._of(name, incarnation)
        return 0.0 if record is None else max(0.0, record.until - now)

    def _of(self, name: str, incarnation: str) -> _Record | None:
        record = self._records.get(name)
        return record if record is not None and record.incarnation == incarnation else None
