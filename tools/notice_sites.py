"""Machines on stand-ins of platforms: what is announced there, and what that should come to. For ``notice_chaos``."""

from __future__ import annotations

import json
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import httpx

from spotjax.fleet.notices.aws import ANSWERS_TO_BELIEVE, MAINTENANCE_INTERVAL, AwsSource
from spotjax.fleet.notices.azure import AzureSource
from spotjax.fleet.notices.gce import MAINTENANCE_SECONDS, PREEMPTED_SECONDS, gce_sources
from spotjax.fleet.notices.notice import NoticeKind, NoticeSource
from spotjax.fleet.notices.several import Several
from spotjax.testing.metadata_aws import AwsMetadata
from spotjax.testing.metadata_azure import AzureMetadata
from spotjax.testing.metadata_gce import GceMetadata
from spotjax.testing.metadata_server import Metadata

INTERVAL_SECONDS = 1.5
"""Between two asks for what is urgent, at most, and some for a busy machine."""


@dataclass(frozen=True)
class Stated:
    """What a platform says.

    Attributes:
      kind: of notice.
      ends: seconds from the beginning of the play, if it says.
      after: seconds from the moment when it is heard, where it does not say but they are known. With neither it is
        advice, or may happen at any moment.
    """

    kind: NoticeKind
    ends: float | None = None
    after: float | None = None


@dataclass(frozen=True)
class Told:
    """A change of what a platform says.

    Attributes:
      at: seconds from the beginning of the play.
      source: as in ``Notice.source``.
      said: from then on; None for nothing.
    """

    at: float
    source: str
    said: Stated | None


class Site(ABC):
    """A machine on a stand-in.

    Args:
      wall: the machine's clock, Unix seconds.
      skew: seconds that the platform's is ahead.
      begun: when the play begins, on the machine's clock.

    Attributes:
      sources: what it can speak as.
      paths: parts of paths that faults can be limited to.
      metadata: the stand-in.
      record: what it said from when on.
      early_seconds, late_seconds: that a deadline may be wrong by.
    """

    sources: Sequence[str]
    paths: Sequence[str]
    metadata: Metadata
    early_seconds, late_seconds = 10.0, 1.0

    def __init__(self, wall: Callable[[], float], skew: float, begun: float) -> None:
        self._wall, self._begun = wall, begun + skew
        self.wall: Callable[[], float] = lambda: wall() + skew
        self.record: list[Told] = []

    @abstractmethod
    def source(self, client: httpx.AsyncClient, clock: Callable[[], float], url: str) -> NoticeSource:
        """Who listens to it."""

    @abstractmethod
    def draw_moves(self, draw: random.Random, seconds: float) -> list[tuple[float, str]]:
        """What is announced when; names that ``move`` takes."""

    @abstractmethod
    def move(self, name: str) -> None:
        """Announces something, or takes it back."""

    @abstractmethod
    def now(self, source: str) -> Stated | None:
        """What it says."""

    def look(self, now: float) -> None:
        """Records what has changed."""
        for source in self.sources:
            last = next((told.said for told in reversed(self.record) if told.source == source), None)
            said = self.now(source)
            if said != last:
                self.record.append(Told(now, source, said))

    def lag(self, source: str, withdrawn: bool) -> float:
        """Seconds after which a change is heard if nothing goes wrong."""
        return INTERVAL_SECONDS


class AwsSite(Site):
    """A Spot instance of EC2."""

    sources = ("aws", "aws-rebalance", "aws-maintenance")
    paths = ("api/token", "spot/instance-action", "rebalance", "scheduled")

    def __init__(self, wall: Callable[[], float], skew: float, begun: float) -> None:
        super().__init__(wall, skew, begun)
        self.metadata: AwsMetadata = AwsMetadata(self.wall, longest_ttl=40)
        self._stated: dict[str, Stated | None] = {}
        self._count = 0

    def source(self, client: httpx.AsyncClient, clock: Callable[[], float], url: str) -> NoticeSource:
        return AwsSource("instance-0", client, clock, url, wall=self._wall)

    def draw_moves(self, draw: random.Random, seconds: float) -> list[tuple[float, str]]:
        scheduled = draw.uniform(0, seconds / 2)
        moves = [(scheduled, f"schedule {draw.uniform(600, 6000)}"), (draw.uniform(0, seconds), "forget")]
        if draw.random() < 0.5:
            moves.append((draw.uniform(scheduled, seconds), "cancel"))
        if draw.random() < 0.7:
            moves.append((draw.uniform(0, seconds), "advise"))
        if draw.random() < 0.8:
            action = draw.choice(["terminate", "terminate", "stop", "hibernate"])
            moves.append((draw.uniform(0, seconds), f"{action} {draw.uniform(60, 119)}"))
        return moves

    def move(self, name: str) -> None:
        what, _, seconds = name.partition(" ")
        if what == "schedule":
            self._count += 1
            begins = self.metadata.schedule(f"event-{self._count}", float(seconds))
            self._stated["aws-maintenance"] = Stated(NoticeKind.MAINTENANCE, begins - self._begun)
        elif what == "cancel":
            self.metadata.cancel(f"event-{self._count}")
            self._stated["aws-maintenance"] = None
        elif what == "advise":
            self.metadata.recommend()
            self._stated["aws-rebalance"] = Stated(NoticeKind.REBALANCE)
        elif what == "forget":
            self.metadata.forget_tokens()
        else:
            ends = self.metadata.interrupt(float(seconds), what)
            self._stated["aws"] = Stated(NoticeKind.PREEMPT, None if what == "hibernate" else ends - self._begun)

    def now(self, source: str) -> Stated | None:
        return self._stated.get(source)

    def lag(self, source: str, withdrawn: bool) -> float:
        if source != "aws-maintenance":
            return INTERVAL_SECONDS
        return 1.2 * MAINTENANCE_INTERVAL * (ANSWERS_TO_BELIEVE if withdrawn else 1) + 1


class AzureSite(Site):
    """A Spot virtual machine of Azure, in a group with others."""

    sources = ("azure", "azure-maintenance")
    paths = ("compute", "scheduledevents")
    TYPES: Mapping[str, NoticeKind] = {
        "Preempt": NoticeKind.PREEMPT, "Reboot": NoticeKind.MAINTENANCE, "Redeploy": NoticeKind.MAINTENANCE,
        "Terminate": NoticeKind.MAINTENANCE,
    }  # fmt: skip

    def __init__(self, wall: Callable[[], float], skew: float, begun: float) -> None:
        super().__init__(wall, skew, begun)
        self.metadata: AzureMetadata = AzureMetadata(self.wall, switch_on_seconds=5.0)
        self._ours: dict[str, str] = {}
        self._numbered: dict[str, str] = {}

    def source(self, client: httpx.AsyncClient, clock: Callable[[], float], url: str) -> NoticeSource:
        return AzureSource("instance-0", client, clock, url, wall=self._wall)

    def draw_moves(self, draw: random.Random, seconds: float) -> list[tuple[float, str]]:
        moves = []
        for number in range(draw.randint(2, 6)):
            at = draw.uniform(0, seconds)
            type = draw.choice(["Preempt", "Preempt", "Reboot", "Redeploy", "Terminate", "Freeze", "Other"])
            moves.append((at, f"schedule {number} {type} {draw.uniform(30, 90)}"))
            if type != "Preempt" or draw.random() < 0.4:
                moves.append((draw.uniform(at, seconds + 10), f"remove {number}"))
        return moves

    def move(self, name: str) -> None:
        what, number, *rest = name.split()
        if what == "remove":
            self.metadata.remove(self._numbered[number])
            self._ours.pop(self._numbered[number], None)
            return
        type, seconds = rest
        if type in self.TYPES:
            id = self.metadata.schedule(type, float(seconds), draw_group(number))
            self._ours[id] = type
        elif type == "Freeze":
            id = self.metadata.schedule(type, float(seconds), duration=1)
        else:
            id = self.metadata.schedule("Preempt", float(seconds), ["vm-1", "vm-00"])
        self._numbered[number] = id

    def now(self, source: str) -> Stated | None:
        self.metadata.start_due()
        kind = NoticeKind.PREEMPT if source == "azure" else NoticeKind.MAINTENANCE
        begins = [self.metadata.begins(id) for id, type in self._ours.items() if self.TYPES[type] is kind]
        if not begins:
            return None
        return Stated(kind, None if min(begins) <= self.wall() else min(begins) - self._begun)


EVENTS: Mapping[str, Stated | None] = {
    "NONE": None,
    "MIGRATE_ON_HOST_MAINTENANCE": Stated(NoticeKind.REBALANCE),
    "TERMINATE_ON_HOST_MAINTENANCE": Stated(NoticeKind.MAINTENANCE, after=MAINTENANCE_SECONDS),
}


class GceSite(Site):
    """A Spot VM of Compute Engine. Its server does not say when a machine ends that it says will end."""

    name = "gce"
    early_seconds = 15.0
    paths = ("preempted", "maintenance-event", "upcoming-maintenance")

    def __init__(self, wall: Callable[[], float], skew: float, begun: float) -> None:
        super().__init__(wall, skew, begun)
        self.sources = (self.name, f"{self.name}-maintenance", f"{self.name}-upcoming")
        self.metadata: GceMetadata = GceMetadata(self.wall, tpu=self.name == "tpu")

    def source(self, client: httpx.AsyncClient, clock: Callable[[], float], url: str) -> NoticeSource:
        return Several(self.name, gce_sources("instance-0", client, clock, url, name=self.name, wall=self._wall))

    def draw_moves(self, draw: random.Random, seconds: float) -> list[tuple[float, str]]:
        moves = [(draw.uniform(0, seconds), "maintenance-event MIGRATE_ON_HOST_MAINTENANCE")]
        moves += [
            (draw.uniform(0, seconds), f"maintenance-event {event}")
            for event in ("NONE", "TERMINATE_ON_HOST_MAINTENANCE")
        ]
        moves += [(draw.uniform(0, seconds), f"upcoming-maintenance {draw.uniform(600, 6000)}") for _ in range(2)]
        moves += [(draw.uniform(0, seconds), "upcoming-maintenance 0")]
        if draw.random() < 0.8:
            moves.append((draw.uniform(0, seconds), "preempted TRUE"))
        return moves

    def move(self, name: str) -> None:
        key, _, value = name.partition(" ")
        if key == "upcoming-maintenance":
            begins = datetime.fromtimestamp(int(self.wall() + float(value)), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            described = {"maintenance_status": "PENDING", "type": "SCHEDULED", "window_start_time": begins}
            value = json.dumps(described) if float(value) else "{}"
        self.metadata.tell(f"instance/{key}", value)

    def now(self, source: str) -> Stated | None:
        if source == self.name:
            gone = self.metadata.values["instance/preempted"] == "TRUE"
            return Stated(NoticeKind.PREEMPT, after=PREEMPTED_SECONDS) if gone else None
        if source == f"{self.name}-maintenance":
            return EVENTS[self.metadata.values["instance/maintenance-event"]]
        described = json.loads(self.metadata.values["instance/upcoming-maintenance"])
        if "window_start_time" not in described:
            return None
        begins = datetime.fromisoformat(described["window_start_time"]).timestamp() - self._begun
        return Stated(NoticeKind.MAINTENANCE, begins)


class TpuSite(GceSite):
    """A TPU VM, which has the same server."""

    name = "tpu"


def draw_group(number: str) -> list[str]:
    """This machine, for some events together with another one, and spelt otherwise."""
    return ["VM-0", "vm-1"] if int(number) % 2 else ["vm-0"]


SITES: Mapping[str, type[Site]] = {"aws": AwsSite, "azure": AzureSite, "gce": GceSite, "tpu": TpuSite}
