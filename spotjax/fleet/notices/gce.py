"""What Compute Engine's metadata server says of a VM's end, of TPU VMs as well: preemption and host maintenance.

Each key is asked for with a request that the server holds until the value changes, so that a notice is here as soon as
the server has it. See "Get live migration notices", "Monitor and plan for a host maintenance event" and "About VM
metadata" in the documentation of Compute Engine, and "View maintenance notifications" in that of Cloud TPU.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple
from urllib.parse import urlencode

import httpx

from spotjax.errors import MetadataUnavailable
from spotjax.fleet.notices.asking import Answer, Asking
from spotjax.fleet.notices.notice import Notice, NoticeKind, Withdrawn
from spotjax.fleet.notices.patience import METADATA

ROOT = "/computeMetadata/v1/"
FLAVOR = {"Metadata-Flavor": "Google"}
"""Header that the server wants to see, and shows: whoever does not is another one, such as a captive portal."""
WAIT_SECONDS = 5
"""After which the server is to answer that nothing has changed: a dead connection is not waited on for longer."""
HELD_SECONDS = 0.5
"""An answer that says nothing new and came sooner was not held: the server is asked less often."""
PREEMPTED_SECONDS = 25.0
"""From notice to end: 30 s "best effort", and a margin."""
MAINTENANCE_SECONDS = 55.0
"""From ``maintenance-event`` to the stop: 60 s, and a margin."""
GPU_MAINTENANCE_SECONDS = 3540.0
"""The same of VMs with GPUs: 60 minutes."""


NEVER = "no notifications have been received yet"
"""Part of an error that means that there was never anything to tell."""


class Reading(NamedTuple):
    """What a value means.

    Attributes:
      kind: of notice.
      seconds: until the machine is gone; None if that is not known. Of no meaning for advice.
    """

    kind: NoticeKind
    seconds: float | None


Read = Callable[[str, float], Reading | None]
"""The meaning of a value, at a moment in Unix seconds; None for nothing. Raises ValueError for a value that is not
documented."""


@dataclass(frozen=True, slots=True)
class Key:
    """Something that the metadata server can be asked for.

    Attributes:
      path: below ``ROOT``.
      read: what its values mean.
      parameters: of the request.
      answers: which statuses of HTTP come with a value.
    """

    path: str
    read: Read
    parameters: Mapping[str, str]
    answers: Collection[int] = (200,)


class GceSource:
    """One key of the metadata server.

    Args:
      name: as in ``Notice.source``.
      key: what to ask for.
      instance: that notices are about.
      client: for HTTP; see ``patience.metadata_client``. It is not closed.
      clock: monotonic seconds.
      base_url: of the server, without a path.
      wall: Unix seconds.
    """

    def __init__(
        self,
        name: str,
        key: Key,
        instance: str,
        client: httpx.AsyncClient,
        clock: Callable[[], float],
        base_url: str = METADATA,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._name, self._key, self._instance, self._clock = name, key, instance, clock
        self._url = f"{base_url}{ROOT}{key.path}"
        self._asking = Asking(name, client, clock, wall=wall)
        self._etag = "0"  # none has this one: the first answer comes at once
        self._text, self._noticed = "", False

    @property
    def name(self) -> str:
        """See ``NoticeSource.name``."""
        return self._name

    async def wait(self) -> Notice | Withdrawn:
        """See ``NoticeSource.wait``."""
        while True:
            began, before = self._clock(), self._text
            answer, reading = await self._asking.until_answered(self._look)
            self._text = answer.text()
            noticed, self._noticed = self._noticed, reading is not None
            evidence = f"{self._key.path}: {self._text}"
            if reading is not None and (self._text != before or not noticed):
                deadline = None if reading.seconds is None else answer.moment + reading.seconds
                return Notice(self._name, reading.kind, self._instance, deadline, evidence)
            if reading is None and noticed:
                return Withdrawn(self._name, self._instance, evidence)
            if self._text == before and self._clock() - began < HELD_SECONDS:
                await self._asking.rest()

    async def close(self) -> None:
        """See ``NoticeSource.close``; there is nothing to be freed."""

    async def _look(self) -> tuple[Answer, Reading | None]:
        """The value once it differs from the last, or after some seconds, and its meaning.

        Raises:
          MetadataUnavailable: there is none.
        """
        waiting = {"wait_for_change": "true", "last_etag": self._etag, "timeout_sec": str(WAIT_SECONDS)}
        url = f"{self._url}?{urlencode({**self._key.parameters, **waiting})}"
        answer = await self._asking.ask("GET", url, FLAVOR, self._key.answers, held=WAIT_SECONDS)
        require_flavor(answer)
        text = answer.text()
        if answer.status != 200 and NEVER not in text:
            raise MetadataUnavailable(f"status {answer.status}", f"GET {url}")
        try:
            reading = self._key.read(text, answer.now)
        except ValueError as problem:
            raise MetadataUnavailable("an answer without meaning", f"GET {url}: {problem}") from None
        self._etag = answer.headers.get("etag", "0")
        return answer, reading


def require_flavor(answer: Answer) -> None:
    """Raises MetadataUnavailable unless it is Google's metadata server that answers."""
    if answer.headers.get("Metadata-Flavor") != "Google":
        raise MetadataUnavailable("somebody else answers", "there is no Metadata-Flavor: Google in the answer")


def preempted(seconds: float = PREEMPTED_SECONDS) -> Key:
    """``instance/preempted``; ``seconds`` from notice to end, which the server does not say."""

    def read(text: str, now: float) -> Reading | None:
        match text:
            case "TRUE":
                return Reading(NoticeKind.PREEMPT, seconds)
            case "FALSE":
                return None
        raise ValueError(f"answers {text[:80]!r} instead of TRUE or FALSE")

    return Key("instance/preempted", read, {})


def maintenance_event(seconds: float = MAINTENANCE_SECONDS) -> Key:
    """``instance/maintenance-event``; a live migration is advice only: the machine pauses, but stays."""

    def read(text: str, now: float) -> Reading | None:
        match text:
            case "NONE":
                return None
            case "MIGRATE_ON_HOST_MAINTENANCE":
                return Reading(NoticeKind.REBALANCE, None)
            case "TERMINATE_ON_HOST_MAINTENANCE":
                return Reading(NoticeKind.MAINTENANCE, seconds)
        raise ValueError(f"answers {text[:80]!r}, which is no maintenance event")

    return Key("instance/maintenance-event", read, {})


def upcoming_maintenance() -> Key:
    """``instance/upcoming-maintenance``: as JSON, days before.

    In a window that has begun, or when it goes on already, the machine may stop at any moment.
    """

    def read(text: str, now: float) -> Reading | None:
        fields = _object(text)
        status = _field(fields, "maintenanceStatus")
        if not fields or NEVER in str(fields.get("error", "")):
            return None
        if status not in ("PENDING", "ONGOING"):
            raise ValueError(f"answers {text[:200]!r}, which is no upcoming maintenance")
        seconds = _unix(_field(fields, "windowStartTime")) - now if status == "PENDING" else 0.0
        return Reading(NoticeKind.MAINTENANCE, seconds if seconds > 0 else None)

    return Key("instance/upcoming-maintenance", read, {"alt": "json"}, (200, 404, 503))


def gce_sources(
    instance: str,
    client: httpx.AsyncClient,
    clock: Callable[[], float],
    base_url: str = METADATA,
    *,
    name: str = "gce",
    preempted_seconds: float = PREEMPTED_SECONDS,
    maintenance_seconds: float = MAINTENANCE_SECONDS,
    wall: Callable[[], float] = time.time,
) -> tuple[GceSource, ...]:
    """All that a VM is to listen to; see ``GceSource`` and the keys. ``name`` is ``tpu`` for TPU VMs."""
    keys = {
        name: preempted(preempted_seconds),
        f"{name}-maintenance": maintenance_event(maintenance_seconds),
        f"{name}-upcoming": upcoming_maintenance(),
    }
    return tuple(GceSource(source, key, instance, client, clock, base_url, wall) for source, key in keys.items())


def _object(text: str) -> Mapping[str, Any]:
    """A JSON object; also what stands for an empty one."""
    if text in ("NONE", '"NONE"'):
        return {}
    fields = json.loads(text)
    if not isinstance(fields, dict):
        raise ValueError(f"answers {text[:80]!r} instead of an object")
    return fields


def _field(fields: Mapping[str, Any], name: str) -> str:
    """A field, also where it is spelt ``window_start_time`` as the metadata server has it; empty if it is not there."""
    snake = "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name)
    return str(fields.get(name, fields.get(snake, "")))


def _unix(time_text: str) -> float:
    """Unix seconds of a time such as ``2026-04-11T22:26:58Z``. Raises ValueError for what is none."""
    when = datetime.fromisoformat(time_text)
    return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
