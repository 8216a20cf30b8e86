"""What a worker says of itself, and what the controller knows of it besides. Data only."""

from __future__ import annotations

from dataclasses import dataclass

from spotjax.protocol.control import Vitals


@dataclass(frozen=True, slots=True)
class InstanceReport:
    """One worker, as the controller sees it.

    Attributes:
      vitals: what it said last; None if it has said nothing yet.
      heartbeat_age: seconds since its last sign of life.
    """

    vitals: Vitals | None
    heartbeat_age: float
