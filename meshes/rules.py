"""Which mesh axis splits which logical axis of an array: the one place that says so. Knows no sizes and no devices."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

MESH_AXES = ("data", "stage", "tensor")
"""Axes of the mesh, outermost first."""

_DEFAULT: Mapping[str, str | None] = MappingProxyType(
    {
        "vocab": "tensor",
        "positions": "tensor",
        "embed": None,
        "heads": "tensor",
        "kv_heads": "tensor",
        "head_size": None,
        "mlp": "tensor",
        "expert": None,
        "expert_mlp": "tensor",
        "choices": None,
        "pages": None,
        "page_slot": None,
        "kv": None,
    }
)


@dataclass(frozen=True)
class AxisRules:
    """Logical axis to the mesh axis that splits it, or None where every position holds it whole.

    Raises:
      ValueError: a rule names a mesh axis that does not exist.
    """

    rules: Mapping[str, str | None] = field(default_factory=lambda: _DEFAULT)

    def __post_init__(self) -> None:
        for axis, mesh_axis in self.rules.items():
            if mesh_axis is not None and mesh_axis not in MESH_AXES:
                raise ValueError(f"axis {axis!r} maps to {mesh_axis!r}, mesh axes are {', '.join(MESH_AXES)}")

    def mesh_axis(self, axis: str) -> str | None:
        """The mesh axis that splits a logical axis, or None.

        Raises:
          ValueError: no rule names the logical axis.
        """
        if axis not in self.rules:
            raise ValueError(f"no rule for logical axis {axis!r}, known are {', '.join(sorted(self.rules))}")
        return self.rules[axis]

    def split_by(self, mesh_axis: str) -> frozenset[str]:
        """The logical axes that a mesh axis splits."""
        return frozenset(axis for axis, to in self.rules.items() if to == mesh_axis)

    def partition(self, axes: Iterable[str]) -> tuple[str | None, ...]:
        """What a partition spec takes for an array of those logical axes: a mesh axis or None for each.

        Raises:
          ValueError: an axis is unknown, or two axes of the array map to the same mesh axis.
        """
        taken: dict[str, str] = {}
        partition: list[str | None] = []
        for axis in axes:
            mesh_axis = self.mesh_axis(axis)
            if mesh_axis is not None:
                if mesh_axis in taken:
                    raise ValueError(f"axes {taken[mesh_axis]!r} and {axis!r} both map to mesh axis {mesh_axis!r}")
                taken[mesh_axis] = axis
            partition.append(mesh_axis)
        return tuple(partition)


DEFAULT_RULES = AxisRules()
"""Heads, feed-forward width (of every expert, too), vocabulary and learned positions are split over ``tensor``, nothing
else is."""

EXPERT_RULES = AxisRules(MappingProxyType({**_DEFAULT, "expert": "tensor", "expert_mlp": None}))
"""The same, but that each shard has some of the experts, whole. Where which holds, ``layout.rules_of`` says."""
