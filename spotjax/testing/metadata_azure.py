"""A stand-in for Azure's instance metadata service, with Scheduled Events, as one machine of a group sees it.

It wants ``Metadata: true`` and a version, refuses what was forwarded, switches Scheduled Events on at the first ask,
counts its document up with every change, and starts events when their time has come or when it is asked to. Beside
that it can be told what to say, see ``spotjax.testing.metadata_server``.
``python -m spotjax.testing.metadata_azure --port 0`` prints its address.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Callable, Sequence
from email.utils import formatdate
from typing import Any

from spotjax.testing.metadata_faults import Reply, Request
from spotjax.testing.metadata_server import run

VERSIONS = ("2019-08-01", "2020-07-01")


class AzureMetadata:
    """What it knows.

    Args:
      wall: the platform's clock, Unix seconds.
      machine: this machine's name.
      switch_on_seconds: how long the first ask for events is not answered, nor any other meanwhile.
    """

    def __init__(
        self, wall: Callable[[], float] = time.time, machine: str = "vm-0", switch_on_seconds: float = 0.0
    ) -> None:
        self._wall, self.machine, self._switch_on_seconds = wall, machine, switch_on_seconds
        self._on_at: float | None = None
        self._incarnation = 1
        self._begins: dict[str, float] = {}
        self._events: dict[str, dict[str, Any]] = {}
        self.orders: dict[str, Callable[..., Any]] = {
            "schedule": self.schedule, "start": self.start, "remove": self.remove, "restart": self.restart,
            "skew": self.skew,
        }  # fmt: skip

    def schedule(
        self,
        type: str = "Preempt",
        seconds: float = 30.0,
        machines: Sequence[str] | None = None,
        duration: int = -1,
    ) -> str:
        """Something happens to machines in so many seconds, by default to this one. Returns its id."""
        id = str(uuid.uuid4()).upper()
        self._begins[id] = float(int(self._wall() + seconds))
        self._events[id] = {
            "EventId": id, "EventStatus": "Scheduled", "EventType": type, "ResourceType": "VirtualMachine",
            "Resources": list(machines or [self.machine]), "NotBefore": formatdate(self._begins[id], usegmt=True),
            "Description": "", "EventSource": "Platform", "DurationInSeconds": duration,
        }  # fmt: skip
        self._incarnation += 1
        return id

    def skew(self, seconds: float) -> None:
        """Its clock goes wrong, or this machine's: they differ by so much."""
        wall = self._wall
        self._wall = lambda: wall() + seconds

    def begins(self, id: str) -> float:
        """Not before, Unix seconds."""
        return self._begins[id]

    def start(self, id: str) -> None:
        """It begins now."""
        self._events[id] |= {"EventStatus": "Started", "NotBefore": ""}
        self._incarnation += 1

    def remove(self, id: str) -> None:
        """It is over, or does not happen."""
        del self._events[id]
        self._incarnation += 1

    def restart(self) -> None:
        """The service counts anew, as after a day without asks."""
        self._incarnation = 1

    async def answer(self, request: Request) -> Reply:
        """As the service answers."""
        if request.headers.get("metadata", "").lower() != "true" or "x-forwarded-for" in request.headers:
            return self._reply(400, {"error": "Bad request. Required metadata header not specified"})
        version = request.query.get("api-version")
        if request.path in ("/metadata/instance", "/metadata/instance/compute"):
            if version is None:
                return self._reply(400, {"error": "Bad request. api-version was not specified"})
            compute = {
                "name": self.machine,
                "vmId": str(uuid.uuid5(uuid.NAMESPACE_DNS, self.machine)),
                "priority": "Spot",
            }
            return self._reply(200, {"compute": compute} if request.path.endswith("instance") else compute)
        if request.path != "/metadata/scheduledevents":
            return self._reply(404, {"error": "Not found"})
        if version not in VERSIONS:
            return self._reply(400, {"error": "Bad request. api-version is invalid"})
        await self._switch_on()
        self.start_due()
        if request.method == "GET":
            return self._reply(200, {"DocumentIncarnation": self._incarnation, "Events": list(self._events.values())})
        return self._approve(request.body) if request.method == "POST" else self._reply(405, {"error": "no method"})

    async def _switch_on(self) -> None:
        if self._on_at is None:
            self._on_at = self._wall() + self._switch_on_seconds
        await asyncio.sleep(max(self._on_at - self._wall(), 0.0))

    def start_due(self) -> None:
        """Starts what is due; happens with every answer."""
        for id, event in self._events.items():
            if event["EventStatus"] == "Scheduled" and self._begins[id] <= self._wall():
                self.start(id)

    def _approve(self, body: bytes) -> Reply:
        ids = [each["EventId"] for each in json.loads(body)["StartRequests"]]
        if not all(id in self._events for id in ids):
            return self._reply(400, {"error": "Bad request. Unknown event"})
        for id in ids:
            self.start(id)
        return Reply(b"", 200, {"Date": self._date()})

    def _reply(self, status: int, value: object) -> Reply:
        headers = {"Content-Type": "application/json; charset=utf-8", "Server": "IMDS", "Date": self._date()}
        return Reply(json.dumps(value).encode(), status, headers)

    def _date(self) -> str:
        return formatdate(int(self._wall()), usegmt=True)


if __name__ == "__main__":
    run(AzureMetadata(), "a stand-in for Azure's instance metadata service")
