"""Everything that a simulation assumes and does not take from a trace: one named parameter each, with its source."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from spotjax.errors import ConfigError


def _assumed(default: float, unit: str, source: str) -> Any:
    return field(default=default, metadata={"unit": unit, "source": source})


@dataclass(frozen=True)
class Assumptions:
    """The world outside of the traces. Every field says its unit and its source in its metadata.

    Raises:
      ConfigError: a number is negative.
    """

    notice_seconds: float = _assumed(30.0, "s", "grace period of the SpotServe artifact; 0 is a loss without notice")
    start_seconds: float = _assumed(
        0.0, "s", "from granted to ready; 0 where a trace has it counted in, as A_S and B_S"
    )
    announced_seconds: float = _assumed(
        30.0, "s", "how long before it is ready a system knows of an instance (artifact)"
    )
    on_demand_start_seconds: float = _assumed(90.0, "s", "launch of an on-demand instance in the S+O traces")
    switch_seconds: float = _assumed(0.5, "s", "stop and start at a change of the mesh; the constant of the artifact")
    engine_start_seconds: float = _assumed(5.0, "s", "assumed: a serving process starts, in all systems")
    checkpoint_bandwidth: float = _assumed(7e8, "B/s", "assumed: one instance reads parameters from storage")
    scale: float = _assumed(1.0, "x", "factor on all times of the profile; the published results need none")

    def __post_init__(self) -> None:
        for parameter in fields(self):
            if getattr(self, parameter.name) < 0:
                raise ConfigError(f"{parameter.name} must not be negative, got {getattr(self, parameter.name)}")
