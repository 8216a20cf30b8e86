"""An epoch's truth: which position of which mesh sits on which device. Data only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from spotjax.meshes.instance import DeviceRef
from spotjax.meshes.layout import LayerRanges
from spotjax.meshes.shape import MeshShape, Position


@dataclass(frozen=True)
class Placement:
    """Where every position of the mesh is.

    Attributes:
      epoch: counts placements of this service upwards; messages of an older epoch are void.
      shape: degrees (D, P, M).
      layers: decoder layers of every stage.
      devices: the device of every position.

    Raises:
      ValueError: a position has no device, a device serves two positions, or there are not as many stages as ranges.
    """

    epoch: int
    shape: MeshShape
    layers: LayerRanges
    devices: Mapping[Position, DeviceRef]

    def __post_init__(self) -> None:
        if set(self.devices) != set(self.shape.positions()):
            raise ValueError(f"a {self.shape} mesh needs a device for each of its positions, got {len(self.devices)}")
        if len(set(self.devices.values())) != len(self.devices):
            raise ValueError("a device can serve only one position")
        if len(self.layers) != self.shape.stage:
            raise ValueError(f"{self.shape.stage} stages need as many layer ranges, got {len(self.layers)}")

    def group(self, data: int, stage: int) -> tuple[DeviceRef, ...]:
        """The devices of one stage of one replica, in tensor order."""
        return tuple(self.devices[Position(data, stage, m)] for m in range(self.shape.tensor))

    def devices_of(self, data: int) -> tuple[DeviceRef, ...]:
        """All devices of replica ``data``, stage by stage."""
        return tuple(device for stage in range(self.shape.stage) for device in self.group(data, stage))

    def instances(self, data: int) -> frozenset[str]:
        """Names of the instances that replica ``data`` stands on."""
        return frozenset(device.instance for device in self.devices_of(data))

    def without(self, instance: str) -> Placement:
        """The same, with the devices of an instance under a name that no instance has.

        For a mesh that has stopped, when an instance is gone and another, or itself with empty memory, takes its name.
        """
        devices = {
            at: DeviceRef(f"{instance} (gone)", device.index) if device.instance == instance else device
            for at, device in self.devices.items()
        }
        return replace(self, devices=devices)
