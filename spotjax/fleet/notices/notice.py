"""What a platform says of a machine's end, as data, and the interface of those who listen. Knows no platform."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol


class NoticeKind(StrEnum):
    """How sure the end is, from advice to fact."""

    REBALANCE = "rebalance"
    """The machine is more likely than others to be taken: look for another one; nothing ends yet."""
    MAINTENANCE = "maintenance"
    """It will be stopped or restarted by its host, usually much later than a preemption."""
    PREEMPT = "preempt"
    """It will be taken."""
    LOST = "lost"
    """It is gone already."""


@dataclass(frozen=True, slots=True)
class Notice:
    """One platform's word about one instance.

    Attributes:
      source: who says so: ``gce``, ``gce-maintenance``, ``tpu``, ``aws``, ``aws-rebalance``, ``azure``, ``signal``,
        ``file``, ``command``, ``operator``.
      kind: what will happen.
      instance: which instance it is about.
      deadline: when the machine is gone, in monotonic seconds of the process that was told; None if the platform does
        not say, which means: at any moment.
      evidence: what the platform said, in its own words; for logs.
    """

    source: str
    kind: NoticeKind
    instance: str
    deadline: float | None
    evidence: str


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """A platform takes a notice back, as Azure does with events and Compute Engine with maintenance.

    Attributes:
      source: who does, as in the notice.
      instance: which instance it is about.
      evidence: what the platform says now.
    """

    source: str
    instance: str
    evidence: str


class NoticeSource(Protocol):
    """Turns one platform's signal into notices.

    A source never gives up: what stands in its way (unreachable, slow, malformed, refused) it logs once and tries
    again, and it never takes such a thing for a notice. It speaks only when that differs from what it said last.
    """

    @property
    def name(self) -> str:
        """As in ``Notice.source``."""
        ...

    async def wait(self) -> Notice | Withdrawn:
        """The next thing that the platform says. Cancels cleanly; may be called again and again."""
        ...

    async def close(self) -> None:
        """Frees connections and handlers."""
        ...
