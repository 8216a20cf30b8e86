"""Which slices every device has and which it needs: parameters and KV of live sequences in one vocabulary.

KV is described by pseudo-arrays ``kv.<layer>@<cohort>``: the pages in use of the sequences that one new replica takes
over from one old replica, numbered from 0 in the cohort's order. So one planner serves parameters and KV alike.
Everything is kept by stack (``meshes.stacks``), which makes it as small as the mesh is regular.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType

from spotjax.errors import PlanError
from spotjax.meshes.instance import HOST_MEMORY, DeviceRef, Instance, InstanceState
from spotjax.meshes.layout import LayerRanges, tensor_range
from spotjax.meshes.placement import Placement
from spotjax.meshes.shape import MeshShape, Position
from spotjax.meshes.slices import ArraySlice, Boxes, Index, covered, joined, remainder
from spotjax.meshes.stacks import in_stack, is_layered, other_bytes, stack_of, stacks_at
from spotjax.models.spec import ArraySpec, ModelSpec

Needs = Mapping[str, Index]
"""What one position or device must have: array name to its index ranges."""


@dataclass(frozen=True, slots=True)
class LiveSequence:
    """A running sequence as far as its KV is concerned.

    Attributes:
      key: of the sequence within its old replica.
      pages: KV pages that it has filled, at least in part.
      progress: positions whose KV is in them.
      shared: numbers, in the old replica, of those that others there have as well; all of them full.
    """

    key: int
    pages: int
    progress: int
    shared: tuple[int, ...] = ()


def distinct_pages(sequences: Iterable[LiveSequence]) -> int:
    """Pages of sequences of one replica, those that they share counted once."""
    pages, shared = 0, set[int]()
    for sequence in sequences:
        pages += sequence.pages - len(sequence.shared)
        shared.update(sequence.shared)
    return pages + len(shared)


@dataclass(frozen=True)
class KvCohort:
    """The sequences that new replica ``new`` takes over from old replica ``old``, with their KV.

    Attributes:
      old: replica of the old mesh that has the KV.
      new: replica of the new mesh that goes on with it.
      sequences: in the order in which their pages are numbered: first all pages that are full, then those that are not,
        at most one of each sequence.
      page_size: token positions in a page.
    """

    old: int
    new: int
    sequences: tuple[LiveSequence, ...]
    page_size: int

    @cached_property
    def name(self) -> str:
        """Unique within one change of the mesh."""
        return f"{self.old}-{self.new}"

    @cached_property
    def pages(self) -> int:
        """Pages of all sequences together, those that they share counted once."""
        return distinct_pages(self.sequences)

    @cached_property
    def full_pages(self) -> int:
        """Pages that decoding no longer writes to."""
        partial = sum(sequence.pages > sequence.progress // self.page_size for sequence in self.sequences)
        return self.pages - partial

    def kv_array(self, spec: ModelSpec, layer: int) -> ArraySpec:
        """The pseudo-array of one layer: (2, pages, page_size, K, H)."""
        array = spec.kv_array(layer, self.pages, self.page_size)
        return replace(array, name=f"{array.name}@{self.name}")


def cohort_of(name: str) -> str | None:
    """Name of the cohort whose KV an array or stack is, or None for a parameter."""
    _, at, cohort = name.partition("@")
    return cohort if at else None


class StackedNeeds(Mapping[str, Index]):
    """``Needs`` kept by stack; arrays are named when they are asked for.

    Args:
      parameters: stack name to index ranges; positions that need the same may share it.
      kv: the same of KV.
    """

    __slots__ = ("kv", "parameters")

    def __init__(self, parameters: Mapping[str, Index], kv: Mapping[str, Index]) -> None:
        self.parameters, self.kv = parameters, kv

    @classmethod
    def of(cls, arrays: Needs) -> StackedNeeds:
        """The same needs by stack.

        Raises:
          PlanError: arrays of a stack differ in their index, or are not those of successive layers.
        """
        if isinstance(arrays, cls):
            return arrays
        stacks = _boxes(arrays)
        for stack, boxes in stacks.items():
            if len(boxes) > 1:
                raise PlanError(f"needs of {stack} must be one index range in successive layers, got {list(boxes)}")
        parameters = {stack: boxes[0] for stack, boxes in stacks.items() if cohort_of(stack) is None}
        return cls(parameters, {stack: boxes[0] for stack, boxes in stacks.items() if stack not in parameters})

    def of_parameters(self) -> StackedNeeds:
        """Without KV."""
        return StackedNeeds(self.parameters, {})

    def of_kv(self) -> StackedNeeds:
        """Without parameters."""
        return StackedNeeds({}, self.kv)

    @property
    def stacks(self) -> dict[str, Index]:
        """Parameters and KV by stack."""
        return {**self.parameters, **self.kv}

    def __getitem__(self, array: str) -> Index:
        stack, layer = stack_of(array)
        index = self.parameters.get(stack) or self.kv[stack]
        if layer is None:
            return index
        if not index[0][0] <= layer < index[0][1]:
            raise KeyError(array)
        return index[1:]

    def __iter__(self) -> Iterator[str]:
        for stack, index in self.stacks.items():
            if is_layered(stack):
                before, after = stack.split("*", 1)
                yield from (f"{before}{layer}{after}" for layer in range(*index[0]))
            else:
                yield stack

    def __len__(self) -> int:
        return sum(index[0][1] - index[0][0] if is_layered(stack) else 1 for stack, index in self.stacks.items())


def needs_of(
    spec: ModelSpec, shape: MeshShape, layers: LayerRanges, cohorts: Sequence[KvCohort]
) -> dict[Position, StackedNeeds]:
    """What every position of the new mesh must have: its parameters, and the KV that its replica takes over."""
    return _contents(spec, shape, layers, _by(cohorts, lambda cohort: cohort.new), range(shape.data))


def kv_needs_of(
    spec: ModelSpec, shape: MeshShape, layers: LayerRanges, cohorts: Sequence[KvCohort]
) -> dict[Position, StackedNeeds]:
    """The KV that the replicas of the new mesh take over, at the positions of those that take any."""
    joining = _by(cohorts, lambda cohort: cohort.new)
    contents = _contents(spec, shape, layers, joining, sorted(joining))
    return {position: arrays.of_kv() for position, arrays in contents.items()}


def _by(cohorts: Iterable[KvCohort], replica: Callable[[KvCohort], int]) -> dict[int, list[KvCohort]]:
    grouped: dict[int, list[KvCohort]] = defaultdict(list)
    for cohort in cohorts:
        grouped[replica(cohort)].append(cohort)
    return grouped


def _contents(
    spec: ModelSpec,
    shape: MeshShape,
    layers: LayerRanges,
    cohorts: Mapping[int, Sequence[KvCohort]],
    replicas: Iterable[int],
) -> dict[Position, StackedNeeds]:
    """Parameters and KV at every position of some replicas, given the cohorts of each. Equal contents are shared."""
    c = spec.config
    kv_heads = [tensor_range(c.kv_heads, "kv_heads", spec, shape.tensor, m) for m in range(shape.tensor)]
    parameters = {
        (stage, tensor): StackedNeeds(stacks_at(spec, shape, layers, Position(0, stage, tensor)), {})
        for stage in range(shape.stage)
        for tensor in range(shape.tensor)
    }
    contents: dict[Position, StackedNeeds] = {}
    for position in (Position(data, *place) for data in replicas for place in parameters):
        data, stage, tensor = position
        if data not in cohorts:
            contents[position] = parameters[stage, tensor]
            continue
        kv: dict[str, Index] = {
            f"kv.*@{cohort.name}": (
                layers[stage],
                (0, 2),
                (0, cohort.pages),
                (0, cohort.page_size),
                kv_heads[tensor],
                (0, c.head_size),
            )
            for cohort in cohorts[data]
        }
        contents[position] = StackedNeeds(parameters[stage, tensor].parameters, kv)
    return contents


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
            leaving = _by(cohorts, lambda cohort: cohort.old)
            contents = _contents(spec, placement.shape, placement.layers, leaving, range(placement.shape.data))
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
                devices[device] = _boxes(arrays)
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


def _boxes(arrays: Needs) -> dict[str, Boxes]:
    """Parts of single arrays by stack."""
    if isinstance(arrays, StackedNeeds):
        return {stack: (index,) for stack, index in arrays.stacks.items()}
    pieces: dict[str, list[Index]] = defaultdict(list)
    for array in arrays.items():
        stack, index = in_stack(ArraySlice(*array))
        pieces[stack].append(index)
    return {stack: joined(indices) for stack, indices in pieces.items()}


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
