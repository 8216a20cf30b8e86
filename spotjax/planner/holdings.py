"""Which slices every device has and which it needs: parameters and KV of live sequences in one vocabulary.

KV is described by pseudo-arrays ``kv.<layer>@<cohort>``: the pages in use of the sequences that one new replica takes
over from one old replica, numbered from 0 in the cohort's order. So one planner serves parameters and KV alike.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from spotjax.meshes.instance import DeviceRef, Instance, InstanceState
from spotjax.meshes.layout import LayerRanges, shard_index, slices_at
from spotjax.meshes.placement import Placement
from spotjax.meshes.shape import MeshShape, Position
from spotjax.meshes.slices import ArraySlice, Index, intersect, subtract
from spotjax.models.spec import ArraySpec, ModelSpec

Needs = Mapping[str, Index]
"""Array name to the index ranges that one position or device must have."""


@dataclass(frozen=True, slots=True)
class LiveSequence:
    """A running sequence as far as its KV is concerned.

    Attributes:
      key: of the sequence within its old replica.
      pages: KV pages that it has filled, at least in part.
      progress: positions whose KV is in them.
    """

    key: int
    pages: int
    progress: int


@dataclass(frozen=True, slots=True)
class KvCohort:
    """The sequences that new replica ``new`` takes over from old replica ``old``, with their KV.

    Attributes:
      old: replica of the old mesh that has the KV.
      new: replica of the new mesh that goes on with it.
      sequences: in the order in which their pages are numbered.
      page_size: token positions in a page.
    """

    old: int
    new: int
    sequences: tuple[LiveSequence, ...]
    page_size: int

    @property
    def name(self) -> str:
        """Unique within one change of the mesh."""
        return f"{self.old}-{self.new}"

    @property
    def pages(self) -> int:
        """Pages of all sequences together."""
        return sum(sequence.pages for sequence in self.sequences)

    def kv_array(self, spec: ModelSpec, layer: int) -> ArraySpec:
        """The pseudo-array of one layer: (2, pages, page_size, K, H)."""
        array = spec.kv_array(layer, self.pages, self.page_size)
        return replace(array, name=f"{array.name}@{self.name}")


def cohort_of(name: str) -> str | None:
    """Name of the cohort whose KV an array is, or None for a parameter."""
    _, at, cohort = name.partition("@")
    return cohort if at else None


def needed(
    spec: ModelSpec, shape: MeshShape, layers: LayerRanges, cohorts: Iterable[KvCohort], position: Position
) -> dict[str, Index]:
    """What a position of the new mesh must have: its parameters, and the KV that its replica takes over."""
    mine = [cohort for cohort in cohorts if cohort.new == position.data]
    return _slices(spec, shape, layers, mine, position)


def needs_of(
    spec: ModelSpec, shape: MeshShape, layers: LayerRanges, cohorts: Sequence[KvCohort]
) -> dict[Position, dict[str, Index]]:
    """``needed`` for every position."""
    return {position: needed(spec, shape, layers, cohorts, position) for position in shape.positions()}


def _slices(
    spec: ModelSpec, shape: MeshShape, layers: LayerRanges, cohorts: Sequence[KvCohort], position: Position
) -> dict[str, Index]:
    slices = slices_at(spec.parameters, spec, shape, layers, position)
    for layer in range(*layers[position.stage]):
        for array in (cohort.kv_array(spec, layer) for cohort in cohorts):
            slices[array.name] = shard_index(array, spec, shape.tensor, position.tensor)
    return slices


@dataclass(frozen=True)
class Holdings:
    """What every device has now.

    Attributes:
      devices: device to array name to the index ranges it has, disjoint.
      element_bytes: bytes of one element of every array.
      dying: instances with a deadline: sources until then, never targets.
      gone: instances that are neither, whatever ``devices`` says.
    """

    devices: Mapping[DeviceRef, Mapping[str, tuple[Index, ...]]]
    element_bytes: int
    dying: frozenset[str] = frozenset()
    gone: frozenset[str] = frozenset()

    @classmethod
    def of(
        cls, spec: ModelSpec, placement: Placement | None, cohorts: Sequence[KvCohort], instances: Iterable[Instance]
    ) -> Holdings:
        """What the devices of a placement have: its parameters, and the KV of the cohorts that leave its replicas.

        Instances of the placement that are not among ``instances`` count as gone.
        """
        states = {instance.name: instance.state for instance in instances}
        devices: dict[DeviceRef, dict[str, tuple[Index, ...]]] = {}
        if placement is not None:
            for position, device in placement.devices.items():
                leaving = [cohort for cohort in cohorts if cohort.old == position.data]
                slices = _slices(spec, placement.shape, placement.layers, leaving, position)
                devices[device] = {name: (index,) for name, index in slices.items()}
        dying = (InstanceState.NOTICED, InstanceState.DRAINING)
        names = {device.instance for device in devices} | set(states)
        return cls(
            devices,
            spec.dtype_bytes,
            dying=frozenset(name for name in names if states.get(name) in dying),
            gone=frozenset(name for name in names if states.get(name, InstanceState.GONE) is InstanceState.GONE),
        )

    def at(self, device: DeviceRef) -> Mapping[str, tuple[Index, ...]]:
        """What a device has; nothing when it is gone or unknown."""
        return {} if device.instance in self.gone else self.devices.get(device, {})

    def sources(self) -> dict[str, list[tuple[DeviceRef, Index]]]:
        """Who alive has what: array name to (device, index ranges), devices in order."""
        held: dict[str, list[tuple[DeviceRef, Index]]] = defaultdict(list)
        for device in sorted(self.devices):
            for name, boxes in self.at(device).items():
                held[name] += [(device, box) for box in boxes]
        return dict(held)

    def missing(self, device: DeviceRef, name: str, index: Index) -> list[Index]:
        """The parts of ``index`` that a device does not have, as disjoint boxes."""
        return remainder(index, self.at(device).get(name, ()))

    def received(self, slices: Iterable[tuple[DeviceRef, ArraySlice]]) -> Holdings:
        """These holdings after devices got slices: where to plan on from when a migration is cut short."""
        devices = {device: dict(arrays) for device, arrays in self.devices.items()}
        for device, (name, index) in slices:
            held = devices.setdefault(device, {}).get(name, ())
            devices[device][name] = (*held, *remainder(index, held))
        return replace(self, devices=devices)

    def reusable_bytes(self, device: DeviceRef, needs: Needs) -> int:
        """Bytes of ``needs`` that a device already has."""
        held = self.at(device)
        return self.element_bytes * sum(covered(needs[name], held[name]) for name in needs.keys() & held.keys())


def covered(index: Index, held: Iterable[Index]) -> int:
    """Elements of ``index`` that the ``held`` boxes, disjoint, have."""
    common = (intersect(index, box) for box in held)
    return sum(prod(stop - start for start, stop in box) for box in common if box is not None)


def lost_cohorts(needs: Iterable[Needs], holdings: Holdings) -> frozenset[str]:
    """Names of the cohorts of whose needed KV some part is held by nobody alive: it must be computed again."""
    sources = holdings.sources()
    wanted = {(cohort_of(name), name, index) for arrays in needs for name, index in arrays.items()}
    return frozenset(
        cohort
        for cohort, name, index in wanted
        if cohort is not None and remainder(index, (held for _, held in sources.get(name, ())))
    )


def remainder(index: Index, held: Iterable[Index]) -> list[Index]:
    """The parts of ``index`` that none of the ``held`` boxes covers, as disjoint boxes, none empty."""
    rest = [index] if all(start < stop for start, stop in index) else []
    for box in held:
        rest = [part for piece in rest for part in subtract(piece, box)]
    return rest
