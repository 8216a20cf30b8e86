"""What Spotjax is simulated with, and what can be left out of it. Data only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from spotjax.errors import ConfigError
from spotjax.fleet.capacity.file import CapacitySettings
from spotjax.fleet.change import Recovery
from spotjax.meshes.instance import DeviceRef, Instance
from spotjax.meshes.shape import MeshShape, Position
from spotjax.planner.demand import Demand
from spotjax.planner.holdings import Holdings
from spotjax.planner.needs import Needs

Feature = Literal["optimizer", "matcher", "migration", "arranger", "backup", "precopy"]
"""optimizer: P and M change; without it only D does.
matcher: positions go where most bytes stay; without it on devices in their order.
migration: parameters and KV come before the stop; without it all of it moves after the stop.
arranger: decoding goes on until everything is prepared, or the deadline; without it replicas stop at the notice.
backup: KV is copied to a neighbour; without it that of a replica that loses an instance unannounced is lost.
precopy: full pages of KV are copied before the stop; without it all KV moves after it, parameters still before."""
FEATURES: tuple[Feature, ...] = get_args(Feature)


@dataclass(frozen=True)
class SpotjaxOptions:
    """How it is set up; defaults are those of the server where it has them.

    Attributes:
      leave: when the mesh leaves instances that have notice.
      batch: most sequences of a replica; the published tables end at 8.
      demand: typical requests; None takes the mean of all that come.
      near_tie: see ``Goal``. 0 puts every instance to use: they are paid for anyway.
      smoothing_seconds: over which the load is observed.
      look_seconds: between looks at the load.
      backup_bandwidth: bytes per second of each instance for backups; 16 % of a g4dn.12xlarge's network.
      backup_lag_seconds: see ``Backups``; the server's rounds.
      expected_interruption_seconds: between two changes that are forced, before any was seen.
      kv_room: KV pages of a replica, as a multiple of what ``batch`` typical requests fill: so there is room for the
        sequences of replicas that are left.
      fallback: on-demand instances are requested when the fleet is too small for the load.
      fallback_tie: see ``Goal.near_tie``; how much longer requests may take before an instance more is worth its price.
      most_on_demand: of these at the same time.
      capacity: instances are rented and given back as a controller with such settings would; beside those of the trace.
      recovery: how changes are made: as Spotjax, or as a baseline on the same engine; see ``fleet.recovery_policies``.
      wanted: the mesh that the operator pinned, None for none.
    """

    leave: Literal["early", "late"] = "early"
    batch: int = 8
    demand: Demand | None = None
    near_tie: float = 0.0
    smoothing_seconds: float = 120.0
    look_seconds: float = 30.0
    backup_bandwidth: float = 1e9
    backup_lag_seconds: float = 0.1
    expected_interruption_seconds: float = 600.0
    kv_room: float = 2.0
    fallback: bool = False
    fallback_tie: float = 0.2
    most_on_demand: int = 8
    capacity: CapacitySettings | None = None
    recovery: Recovery = "spotjax"
    wanted: MeshShape | None = None


def require_feature(name: str | None) -> None:
    """Verifies that something can be left out.

    Raises:
      ConfigError: there is no such feature.
    """
    if name is not None and name not in FEATURES:
        raise ConfigError(f"Spotjax has no feature {name!r} to leave out; there are {', '.join(FEATURES)}")


def in_order(
    shape: MeshShape, needs: Mapping[Position, Needs], hosts: Sequence[Instance], holdings: Holdings
) -> dict[Position, DeviceRef]:
    """Positions on devices in their order, whatever these hold: what there is without a matcher."""
    groups = [host.devices[n : n + shape.tensor] for host in hosts for n in range(0, host.type.devices, shape.tensor)]
    devices = [device for group in groups if len(group) == shape.tensor for device in group]
    return dict(zip(shape.positions(), devices, strict=False))
