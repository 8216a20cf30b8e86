"""The document of Azure's Scheduled Events as data: read with care, since it is what a machine's end is told by."""

from __future__ import annotations

import json
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from spotjax.errors import MetadataUnavailable

TYPES = ("Preempt", "Terminate", "Redeploy", "Reboot", "Freeze")


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that will be done to some machines.

    Attributes:
      id: the same as long as it is announced.
      type: one of ``TYPES``.
      machines: names of the virtual machines that it is done to, casefolded.
      started: it begins now, or has begun.
      begins: not before, Unix seconds; None if it is not told.
      seconds: how long the machine is interrupted; None if it is not known, or for good.
      text: as it came.
    """

    id: str
    type: str
    machines: frozenset[str]
    started: bool
    begins: float | None
    seconds: float | None
    text: str

    def pauses(self, seconds: float) -> bool:
        """Whether the machine stands still for no longer than that, and goes on as if nothing had been."""
        return self.type == "Freeze" and self.seconds is not None and self.seconds <= seconds


@dataclass(frozen=True, slots=True)
class Document:
    """What is announced at one time.

    Attributes:
      incarnation: counts up with every change.
      events: those that can be read, of all machines of the group.
      unread: the others, as they came.
    """

    incarnation: int
    events: tuple[Event, ...]
    unread: tuple[str, ...]


def read_document(value: Any) -> Document:
    """The document of an answer.

    Raises:
      MetadataUnavailable: it is none.
    """
    if not isinstance(value, dict):
        raise MetadataUnavailable("events that cannot be read", repr(value)[:80])
    incarnation, events = value.get("DocumentIncarnation"), value.get("Events")
    if not isinstance(incarnation, int) or not isinstance(events, list):
        raise MetadataUnavailable("events that cannot be read", repr(value)[:80])
    read = [(_event(event), json.dumps(event)) for event in events]
    return Document(
        incarnation,
        tuple(event for event, _ in read if event is not None),
        tuple(text for event, text in read if event is None),
    )


def _event(value: Any) -> Event | None:
    """None if it lacks what decides whether and to whom something happens; times are not needed for that."""
    if not isinstance(value, dict):
        return None
    id, type_, resources = value.get("EventId"), value.get("EventType"), value.get("Resources")
    status = value.get("EventStatus")
    if not isinstance(id, str) or type_ not in TYPES or not isinstance(resources, list):
        return None
    if status not in ("Scheduled", "Started") or not all(isinstance(name, str) for name in resources):
        return None
    seconds = value.get("DurationInSeconds")
    return Event(
        id,
        type_,
        frozenset(name.casefold() for name in resources),
        status == "Started",
        _unix(value.get("NotBefore")),
        float(seconds) if isinstance(seconds, int) and seconds >= 0 else None,
        json.dumps(value),
    )


def _unix(text: object) -> float | None:
    """Unix seconds of ``Mon, 11 Apr 2022 22:26:58 GMT``; None of anything else."""
    try:
        return parsedate_to_datetime(str(text)).timestamp()
    except ValueError:
        return None
