"""What every position of a mesh must have: parameters and KV in one vocabulary.

Everything is kept by stack (``meshes.stacks``), which makes it as small as the mesh is regular.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from spotjax.errors import PlanError
from spotjax.meshes.layout import LayerRanges, tensor_range
from spotjax.meshes.shape import MeshShape, Position
from spotjax.meshes.slices import ArraySlice, Boxes, Index, joined
from spotjax.meshes.stacks import in_stack, is_layered, stack_of, stacks_at
from spotjax.models.spec import ModelSpec
from spotjax.planner.kv_cohorts import KvCohort, by_replica, cohort_of

Needs = Mapping[str, Index]
"""What one position or device must have: array name to its index ranges."""


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
        stacks = boxes_of(arrays)
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
    return contents_of(spec, shape, layers, by_replica(cohorts, lambda cohort: cohort.new), range(shape.data))


def kv_needs_of(
    spec: ModelSpec, shape: MeshShape, layers: LayerRanges, cohorts: Sequence[KvCohort]
) -> dict[Position, StackedNeeds]:
    """The KV that the replicas of the new mesh take over, at the positions of those that take any."""
    joining = by_replica(cohorts, lambda cohort: cohort.new)
    contents = contents_of(spec, shape, layers, joining, sorted(joining))
    return {position: arrays.of_kv() for position, arrays in contents.items()}


def contents_of(
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


def boxes_of(arrays: Needs) -> dict[str, Boxes]:
    """Parts of single arrays by stack."""
    if isinstance(arrays, StackedNeeds):
        return {stack: (index,) for stack, index in arrays.stacks.items()}
    pieces: dict[str, list[Index]] = defaultdict(list)
    for array in arrays.items():
        stack, index = in_stack(ArraySlice(*array))
        pieces[stack].append(index)
    return {stack: joined(indices) for stack, indices in pieces.items()}
