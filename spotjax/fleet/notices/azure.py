"""Notices of Azure: Scheduled Events of the instance metadata service.

The service is switched on by the first ask, whose answer may take two minutes, and sleeps after a day without any.
Source: "Azure Metadata Service: Scheduled Events for Linux VMs". Not run on Azure, see docs/support.md.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable

import httpx

from spotjax.errors import MetadataUnavailable
from spotjax.fleet.notices.asking import Answer, Asking
from spotjax.fleet.notices.azure_events import Document, Event, read_document
from spotjax.fleet.notices.notice import Notice, NoticeKind, Withdrawn
from spotjax.fleet.notices.patience import METADATA

log = logging.getLogger("spotjax.notices")

EVENTS = "/metadata/scheduledevents?api-version=2020-07-01"
COMPUTE = "/metadata/instance/compute?api-version=2021-02-01"
HEADERS = {"Metadata": "true"}
ANSWERS_TO_BELIEVE = 10
"""In a row, before documents older than the newest one are taken for a count that began anew: that does not happen as
long as events are asked for, while an answer may be old."""
PAUSE_SECONDS = 2.0
"""A pause of the machine that nobody needs to know of: the default lease of a fleet."""
PREEMPT, MAINTENANCE = "azure", "azure-maintenance"


class AzureSource:
    """What Azure is about to do to this machine: preemption as ``azure``, all else as ``azure-maintenance``.

    Args:
      instance: that the notices are about.
      client: carries the asks.
      clock: monotonic seconds.
      base_url: of the metadata service.
      pause_seconds: a ``Freeze`` of this length or less is not told; the machine goes on after it.
      wall: Unix seconds.
    """

    name = PREEMPT

    def __init__(
        self,
        instance: str,
        client: httpx.AsyncClient,
        clock: Callable[[], float],
        base_url: str = METADATA,
        pause_seconds: float = PAUSE_SECONDS,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._instance, self._base_url, self._pause_seconds = instance, base_url, pause_seconds
        self._asking = Asking(self.name, client, clock, wall=wall)
        self._machine: str | None = None
        self._newest = Document(-1, (), ())
        self._older = 0
        self._said: dict[str, Event] = {}
        self._words: deque[Notice | Withdrawn] = deque()
        self._logged: set[str] = set()

    async def wait(self) -> Notice | Withdrawn:
        """See ``NoticeSource.wait``."""
        while not self._words:
            await self._asking.rest()
            answer, machine = await self._asking.until_answered(self._look)
            self._hear(answer, machine)
        return self._words.popleft()

    async def close(self) -> None:
        """See ``NoticeSource.close``."""

    async def acknowledge(self, released: Collection[str] = ()) -> tuple[str, ...]:
        """Lets Azure begin at once with what it announced, so that nobody waits and pays for a machine that is free.

        Events that concern other machines, too, are left alone unless those are free as well: it begins for all.

        Args:
          released: names of other virtual machines that are free.

        Returns: ids of the events that begin.

        Raises:
          MetadataUnavailable: Azure did not hear it. It begins at its time, as announced.
        """
        free = {name.casefold() for name in (*released, self._machine or "")}
        ids = tuple(
            event.id
            for event in self._newest.events
            if event in self._said.values() and not event.started and free.issuperset(event.machines)
        )
        if ids:
            request = {"StartRequests": [{"EventId": id} for id in ids]}
            await self._asking.ask("POST", self._base_url + EVENTS, HEADERS, content=request)
        return ids

    async def _look(self) -> tuple[tuple[Answer, Document], str]:
        """The document, which switches the service on, and this machine's name."""
        answer = await self._asking.ask("GET", self._base_url + EVENTS, HEADERS)
        document = read_document(answer.json())
        if self._machine is None:
            described = (await self._asking.ask("GET", self._base_url + COMPUTE, HEADERS)).json()
            named = described.get("name") if isinstance(described, dict) else None
            if not isinstance(named, str) or not named:
                raise MetadataUnavailable("a machine without a name", repr(described)[:80])
            self._machine = named
        return (answer, document), self._machine

    def _hear(self, heard: tuple[Answer, Document], machine: str) -> None:
        answer, document = heard
        if document.incarnation < self._newest.incarnation:
            self._older += 1
            if self._older < ANSWERS_TO_BELIEVE:
                return
        self._older = 0
        self._newest = document
        self._log_once("an event that cannot be read", document.unread)
        ours = [event for event in document.events if machine.casefold() in event.machines]
        pauses = [event for event in ours if event.pauses(self._pause_seconds)]
        self._log_once("the machine will pause, and goes on", (event.text for event in pauses))
        ending = [event for event in ours if event not in pauses]
        self._say(PREEMPT, [event for event in ending if event.type == "Preempt"], answer, bool(document.unread))
        self._say(MAINTENANCE, [event for event in ending if event.type != "Preempt"], answer, bool(document.unread))

    def _say(self, source: str, events: Iterable[Event], answer: Answer, unsure: bool) -> None:
        """Adds the word of one source, if it has a new one, on what is announced now."""
        first = min(events, key=lambda event: (not event.started, event.begins or 0.0, event.id), default=None)
        said = self._said.get(source)
        if first == said:
            return
        if first is None:
            if not unsure:
                del self._said[source]
                self._words.append(Withdrawn(source, self._instance, answer.text()))
            return
        self._said[source] = first
        if first.type == "Freeze" and first.started:
            return  # it is too late to leave, and the machine goes on
        kind = NoticeKind.PREEMPT if source == PREEMPT else NoticeKind.MAINTENANCE
        self._words.append(Notice(source, kind, self._instance, self._deadline(first, answer), first.text))

    @staticmethod
    def _deadline(event: Event, answer: Answer) -> float | None:
        """None once it began: at any moment."""
        if event.started or event.begins is None:
            return None
        deadline = answer.monotonic(event.begins)
        return deadline if deadline > answer.moment else None

    def _log_once(self, message: str, texts: Iterable[str]) -> None:
        for text in texts:
            if text not in self._logged:
                self._logged.add(text)
                log.warning("%s: %s", message, text[:300], extra={"source": self.name})
