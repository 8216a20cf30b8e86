"""Notices of AWS EC2: interruptions of Spot instances, rebalance recommendations, scheduled events.

Source: the EC2 user guide, "Spot Instance interruption notices", "EC2 instance rebalance recommendations", "Scheduled
events". Not run on AWS, see docs/support.md.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from spotjax.errors import MetadataUnavailable
from spotjax.fleet.notices.asking import Answer, Asking
from spotjax.fleet.notices.imds import Imds
from spotjax.fleet.notices.notice import Notice, NoticeKind, Withdrawn
from spotjax.fleet.notices.patience import METADATA
from spotjax.fleet.notices.several import Several

NOTICE_SECONDS = 120.0
"""The longest time between the notice and the end of a Spot instance. A later end is a clock that is wrong."""
MAINTENANCE_INTERVAL = 15.0
"""Seconds; scheduled events are announced hours or days before."""
ANSWERS_TO_BELIEVE = 3
"""In a row, before a scheduled event counts as gone."""
ACTIONS = ("terminate", "stop", "hibernate")


class AwsSource(Several):
    """All that the metadata service says of this instance's end, as ``aws``, ``aws-rebalance`` and ``aws-maintenance``.

    Args:
      instance: that the notices are about.
      client: carries the asks.
      clock: monotonic seconds.
      base_url: of the metadata service.
      wall: Unix seconds.
    """

    def __init__(
        self,
        instance: str,
        client: httpx.AsyncClient,
        clock: Callable[[], float],
        base_url: str = METADATA,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._imds = Imds(client, clock, base_url)
        sources = (
            _Interruption("aws", "spot/instance-action", instance, self._imds, Asking("aws", client, clock, wall=wall)),
            _Rebalance(
                "aws-rebalance", "events/recommendations/rebalance", instance, self._imds,
                Asking("aws-rebalance", client, clock, wall=wall),
            ),
            _Maintenance(
                "aws-maintenance", "events/maintenance/scheduled", instance, self._imds,
                Asking("aws-maintenance", client, clock, MAINTENANCE_INTERVAL, wall),
            ),
        )  # fmt: skip
        super().__init__("aws", sources)


class _Path(ABC):
    """Looks at one path of the service, again and again."""

    def __init__(self, name: str, path: str, instance: str, imds: Imds, asking: Asking) -> None:
        self.name, self._path, self._instance = name, path, instance
        self._imds, self._asking = imds, asking

    async def wait(self) -> Notice | Withdrawn:
        """See ``NoticeSource.wait``."""
        while True:
            await self._asking.rest()
            word = await self._asking.until_answered(self._look)
            if word is not None:
                return word

    async def close(self) -> None:
        """Ends the session, which all paths have together."""
        await self._imds.close()

    async def _look(self) -> Notice | Withdrawn | None:
        answer = await self._imds.get(self._asking, self._path)
        return None if answer is None else self._word(answer)

    @abstractmethod
    def _word(self, answer: Answer) -> Notice | Withdrawn | None:
        """What an answer says that was not said before."""


class _Interruption(_Path):
    """Is never taken back by AWS: nothing there, after there was something, means nothing."""

    _said: tuple[str, float | None] | None = None

    def _word(self, answer: Answer) -> Notice | None:
        action, ends = interruption(answer.json())
        if self._said == (action, ends):
            return None
        self._said = action, ends
        deadline = None
        if ends is not None and action != "hibernate":
            deadline = min(answer.monotonic(ends), answer.moment + NOTICE_SECONDS)
        if deadline is not None and deadline <= answer.moment:
            deadline = None
        return Notice(self.name, NoticeKind.PREEMPT, self._instance, deadline, answer.text())


class _Rebalance(_Path):
    """Advice; stays."""

    _said: str | None = None

    def _word(self, answer: Answer) -> Notice | None:
        value = answer.json()
        since = value.get("noticeTime") if isinstance(value, dict) else None
        if not isinstance(since, str):
            raise MetadataUnavailable("a recommendation that is none", repr(answer.text()[:80]))
        if self._said == since:
            return None
        self._said = since
        return Notice(self.name, NoticeKind.REBALANCE, self._instance, None, answer.text())


class _Maintenance(_Path):
    """The next of the scheduled events; taken back when none is left.

    An answer may be older than one before it, as it comes from many servers. What is new is said at once; that an event
    is gone, or that one is back that was, only after several answers in a row.
    """

    _said: ScheduledEvent | None = None
    _agree = 0

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._gone: set[str] = set()

    def _word(self, answer: Answer) -> Notice | Withdrawn | None:
        events = scheduled_events(answer.json())
        first = min(events, key=lambda event: event.begins) if events else None
        if first == self._said:
            self._agree = 0
            return None
        if first is None or first.event in self._gone:
            self._agree += 1
            if self._agree < ANSWERS_TO_BELIEVE:
                return None
        self._agree = 0
        if self._said is not None:
            self._gone.add(self._said.event)
        self._said = first
        if first is None:
            return Withdrawn(self.name, self._instance, answer.text())
        self._gone.discard(first.event)
        deadline = answer.monotonic(first.begins)
        return Notice(self.name, NoticeKind.MAINTENANCE, self._instance, deadline, f"{first.code} {answer.text()}")


@dataclass(frozen=True, slots=True)
class ScheduledEvent:
    """Maintenance to come.

    Attributes:
      event: its id.
      code: what will happen: ``instance-stop``, ``instance-retirement``, ``instance-reboot``, ``system-reboot``,
        ``system-maintenance``.
      begins: not before, Unix seconds.
    """

    event: str
    code: str
    begins: float


def interruption(value: Any) -> tuple[str, float | None]:
    """Action, and its time in Unix seconds if it is told, of ``spot/instance-action``.

    Raises:
      MetadataUnavailable: it says no such thing.
    """
    action = value.get("action") if isinstance(value, dict) else None
    if action not in ACTIONS:
        raise MetadataUnavailable("an interruption that is none", repr(value)[:80])
    try:
        moment = datetime.fromisoformat(value.get("time"))
    except (TypeError, ValueError):
        return action, None
    return action, moment.timestamp() if moment.tzinfo else None


def scheduled_events(value: Any) -> list[ScheduledEvent]:
    """Those of ``events/maintenance/scheduled`` that are neither over nor cancelled.

    Raises:
      MetadataUnavailable: they cannot be read.
    """
    try:
        return [
            ScheduledEvent(event["EventId"], event["Code"], parsedate_to_datetime(event["NotBefore"]).timestamp())
            for event in _list(value)
            if event["State"] == "active"
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise MetadataUnavailable("scheduled events that cannot be read", repr(error)) from None


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"a {type(value).__name__}, not a list")
    return value
