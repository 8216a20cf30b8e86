"""What bytes travel over, and how long that keeps it busy. Data and arithmetic only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from spotjax.errors import PlanError
from spotjax.meshes.instance import DeviceRef, Instance, InstanceType


class Direction(StrEnum):
    """Where the bytes on a link of an instance go."""

    OUT = "out"
    IN = "in"
    INSIDE = "inside"
    CHECKPOINT = "checkpoint"


class Link(NamedTuple):
    """One direction of one instance's traffic; all transfers over it share its bandwidth."""

    instance: str
    direction: Direction


@dataclass(frozen=True)
class Links:
    """Bandwidths of the instances that take part.

    Attributes:
      types: instance name to its type.
      checkpoint_bandwidth: bytes per second at which one instance reads a checkpoint.
    """

    types: Mapping[str, InstanceType]
    checkpoint_bandwidth: float = 1e9

    @classmethod
    def of(cls, instances: Sequence[Instance], checkpoint_bandwidth: float = 1e9) -> Links:
        """Bandwidths by the types of the instances."""
        return cls({instance.name: instance.type for instance in instances}, checkpoint_bandwidth)

    def bandwidth(self, link: Link) -> float:
        """Bytes per second.

        Raises:
          PlanError: the type of the instance is not known.
        """
        if link.direction is Direction.CHECKPOINT:
            return self.checkpoint_bandwidth
        kind = self.types.get(link.instance)
        if kind is None:
            raise PlanError(f"instance {link.instance} sends or receives, but its type is not given")
        return kind.link_bandwidth if link.direction is Direction.INSIDE else kind.network_bandwidth

    def seconds(self, link: Link, size: int) -> float:
        """Seconds that ``size`` bytes keep a link busy.

        Raises:
          PlanError: the type of the instance is not known.
        """
        return size / self.bandwidth(link)

    @staticmethod
    def between(source: DeviceRef | None, target: DeviceRef) -> tuple[Link, ...]:
        """The links that bytes from a source (None: the checkpoint) to a target go over, the sender's first."""
        if source is None:
            return (Link(target.instance, Direction.CHECKPOINT),)
        if source.instance == target.instance:
            return (Link(target.instance, Direction.INSIDE),)
        return Link(source.instance, Direction.OUT), Link(target.instance, Direction.IN)
