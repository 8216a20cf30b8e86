"""Which slices every device has: parameters, and KV of the sequences that leave its replicas. Kept by stack."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from spotjax.meshes.instance import HOST_MEMORY, DeviceRef, Instance, InstanceState
from spotjax.meshes.placement import Placement
from spotjax.meshes.slices import ArraySlice, Boxes, Index, covered, joined, remainder
from spotjax.meshes.stacks import in_stack, other_bytes
from spotjax.models.spec import ModelSpec
from spotjax.planner.kv_cohorts import KvCohort, by_replica, cohort_of
from spotjax.planner.needs import Needs, StackedNeeds, boxes_of, contents_of


@dataclass(frozen=True)
class Holdings:
    """What every device has now.

    Attributes:
      devices: device to stack name to the index ranges it has.
      element_bytes: bytes of one element of every array that ``other_bytes`` does not name.
      dying: instances with a deadline: sources until then, never targets.
      gone: instances that are neither, whatever ``devices`` says.
      other_bytes: bytes of one element of quantized matrices and of their scales, by stack.
    """

    devices: Mapping[DeviceRef, Mapping[str, Boxes]]
    element_bytes: int
    dying: frozenset[str] = frozenset()
    gone: frozenset[str] = frozenset()
    other_bytes: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        spec: ModelSpec,
        placement: Placement | None,
        cohorts: Sequence[KvCohort],
        instances: Iterable[Instance],
        held: Mapping[DeviceRef, Needs] = MappingProxyType({}),
        backups: Mapping[tuple[int, int], str] = MappingProxyType({}),
    ) -> Holdings:
        """What the devices of a placement have: its parameters, and the KV of the cohorts that leave its replicas.

        Other devices have what ``held`` says of them. ``backups`` names the instance whose host memory has a copy of
        that KV, by (replica, stage). Instances of the placement that are not among ``instances`` count as gone.
        """
        states = {instance.name: instance.state for instance in instances}
        devices: dict[DeviceRef, Mapping[str, Boxes]] = {}
        if placement is not None:
            leaving = by_replica(cohorts, lambda cohort: cohort.old)
            contents = contents_of(spec, placement.shape, placement.layers, leaving, range(placement.shape.data))
            boxes: dict[int, dict[str, Boxes]] = {}  # by identity of the parameters, which positions share
            for position, device in placement.devices.items():
                has = contents[position]
                if id(has.parameters) not in boxes:
                    boxes[id(has.parameters)] = {name: (index,) for name, index in has.parameters.items()}
                kv = {name: (index,) for name, index in has.kv.items()}
                devices[device] = boxes[id(has.parameters)] | kv if kv else boxes[id(has.parameters)]
            for (replica, stage), keeper in backups.items():
                kept = dict(devices.get(DeviceRef(keeper, HOST_MEMORY), {}))
                for cohort in leaving[replica]:
                    pages = cohort.kv_array(spec, 0).shape
                    box = (placement.layers[stage], *((0, extent) for extent in pages))
                    kept[f"kv.*@{cohort.name}"] = (*kept.get(f"kv.*@{cohort.name}", ()), box)
                devices[DeviceRef(keeper, HOST_MEMORY)] = kept
        for device, arrays in held.items():
            if device not in devices:
                devices[device] = boxes_of(arrays)
        dying = (InstanceState.NOTICED, InstanceState.DRAINING)
        names = {device.instance for device in devices} | set(states)
        return cls(
            devices,
            spec.dtype_bytes,
            dying=frozenset(name for name in names if states.get(name) in dying),
            gone=frozenset(name for name in names if states.get(name, InstanceState.GONE) is InstanceState.GONE),
            other_bytes=other_bytes(spec),
        )

    def bytes_per_element(self, stack: str) -> int:
        """Of a stack."""
        return self.other_bytes.get(stack, self.element_bytes)

    def bytes_of(self, stacks: Iterable[tuple[str, Index]]) -> int:
        """Of slices of stacks."""
        return sum(ArraySlice(*item).size * self.bytes_per_element(item[0]) for item in stacks)

    def at(self, device: DeviceRef) -> Mapping[str, Boxes]:
        """What a device has; nothing when it is gone or unknown."""
        return {} if device.instance in self.gone else self.devices.get(device, {})

    def sources(self) -> dict[str, dict[Index, list[DeviceRef]]]:
        """Who alive has what: stack name to index ranges to the devices that have them, in order."""
        alike: dict[int, tuple[Mapping[str, Boxes], list[DeviceRef]]] = {}  # by identity: replicas share what they have
        for device in sorted(self.devices):
            has = self.at(device)
            alike.setdefault(id(has), (has, []))[1].append(device)
        held: dict[str, dict[Index, list[DeviceRef]]] = defaultdict(dict)
        for has, devices in alike.values():
            for stack, boxes in has.items():
                for box in boxes:
                    held[stack].setdefault(box, []).extend(devices)
        for having in held.values():
            for devices in having.values():
                devices.sort()
        return dict(held)

    def of_kv(self) -> Holdings:
        """Only KV."""
        devices = {
            device: {name: boxes for name, boxes in has.items() if cohort_of(name) is not None}
            for device, has in self.devices.items()
        }
        return replace(self, devices={device: has for device, has in devices.items() if has})

    def received(self, slices: Iterable[tuple[DeviceRef, ArraySlice]]) -> Holdings:
        """These holdings after devices got slices: where to plan on from when a migration is cut short."""
        devices = {device: dict(stacks) for device, stacks in self.devices.items()}
        for device, piece in slices:
            stack, index = in_stack(piece)
            held = devices.setdefault(device, {}).get(stack, ())
            devices[device][stack] = joined([*held, *remainder(index, held)])
        return replace(self, devices=devices)

    def reusable_bytes(self, device: DeviceRef, needs: StackedNeeds) -> int:
        """Bytes of ``needs`` that a device already has."""
        held = self.at(device)
        stacks = needs.stacks
        common = stacks.keys() & held.keys()
        return sum(covered(stacks[name], held[name]) * self.bytes_per_element(name) for name in common)


def lost_cohorts(needs: Iterable[Needs], holdings: Holdings) -> frozenset[str]:
    """Names of the cohorts of whose needed KV some part is held by nobody alive: it must be computed again."""
    wanted = {item for position in needs for item in StackedNeeds.of(position).kv.items()}
    stacks = {name for name, _ in wanted}
    held: dict[str, set[Index]] = defaultdict(set)
    for device in holdings.devices:
        for stack, boxes in holdings.at(device).items():
            if stack in stacks:
                held[stack].update(boxes)
    lost = {stack for stack, index in wanted if index not in held[stack] and remainder(index, held[stack])}
    return frozenset(cohort for cohort in map(cohort_of, lost) if cohort is not None)
