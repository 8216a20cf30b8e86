"""Machines and their devices as data: what an instance has and costs, and what state it is in."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, NamedTuple

PriceClass = Literal["spot", "on_demand"]
"""Whether a machine can be taken away."""
HOST_MEMORY = -1
"""Number of the device that stands for an instance's host memory, which can be a source and never has a position."""


class DeviceRef(NamedTuple):
    """One device: the ``index``-th of an instance."""

    instance: str
    index: int  # type: ignore[assignment]  # tuple.index is of no use here

    def __str__(self) -> str:
        return f"{self.instance}/{self.index}"


@dataclass(frozen=True, slots=True)
class InstanceType:
    """What a kind of machine has and costs. Frozen facts, no state.

    Attributes:
      name: the provider's name for it, or one of our own for local devices.
      devices: devices in one instance.
      memory_bytes: memory of one device.
      flops: floating-point operations per second of one device.
      memory_bandwidth: bytes per second between a device and its memory.
      link_bandwidth: bytes per second between two devices of one instance.
      network_bandwidth: bytes per second between two instances.
      network_latency: seconds for a small message between two instances.
      spot_price: USD per hour, preemptible.
      on_demand_price: USD per hour, not preemptible.
      tensor_instances: instances of this type that one tensor group may span; 1 keeps ``tensor`` inside an instance.
    """

    name: str
    devices: int
    memory_bytes: int
    flops: float
    memory_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float
    network_latency: float = 1e-4
    spot_price: float = 0.0
    on_demand_price: float = 0.0
    tensor_instances: int = 1

    def span(self, tensor: int) -> int:
        """Instances that a tensor group of that degree takes: part of one or several whole ones; 0 if it cannot be."""
        if tensor <= self.devices:
            return 1
        whole, rest = divmod(tensor, self.devices)
        return 0 if rest or whole > self.tensor_instances else whole


class InstanceState(StrEnum):
    """Life of an instance, in order; one that is gone may join again under its name, with nothing in memory."""

    JOINING = "joining"
    READY = "ready"
    NOTICED = "noticed"
    DRAINING = "draining"
    GONE = "gone"


@dataclass(frozen=True, slots=True)
class Instance:
    """One machine of the fleet.

    Attributes:
      name: unique in the fleet.
      type: what it has and costs.
      state: where it is in its life.
      on_demand: it was rented at the on-demand price and is not taken away.
      zone: where it is; empty if that is not known.
      address: HOST:PORT at which others reach it; empty for devices of this process.
    """

    name: str
    type: InstanceType
    state: InstanceState = InstanceState.READY
    on_demand: bool = False
    zone: str = ""
    address: str = ""

    @property
    def price(self) -> float:
        """USD per hour."""
        return self.type.on_demand_price if self.on_demand else self.type.spot_price

    @property
    def devices(self) -> tuple[DeviceRef, ...]:
        """All devices of the instance, in index order."""
        return tuple(DeviceRef(self.name, index) for index in range(self.type.devices))
