"""What is asked of a switch to a new mesh, what is there to switch from, and what it cost. Plain data, no jax."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from spotjax.meshes.instance import DeviceRef
from spotjax.meshes.placement import Placement
from spotjax.planner.migration import MigrationPlan
from spotjax.planner.needs import Needs


@dataclass(frozen=True)
class Survivors:
    """KV that outlived the loss of an instance.

    Attributes:
      positions: by replica: key of a sequence to the positions, from the first on, whose KV is complete somewhere.
      backups: by (replica, stage) whose instance is gone: the instance that has a copy.
    """

    positions: Mapping[int, Mapping[int, int]] = field(default_factory=dict)
    backups: Mapping[tuple[int, int], str] = field(default_factory=dict)


@dataclass(frozen=True)
class Remains:
    """What is left of the mesh that a controller before this one had.

    Attributes:
      placement: the mesh.
      holders: instances that still have their stages of it.
      sequences: by replica: key of a sequence to its KV pages there and the positions whose KV is in them, on every
        stage that a holder has.
    """

    placement: Placement
    holders: frozenset[str]
    sequences: Mapping[int, Mapping[int, tuple[tuple[int, ...], int]]]


@dataclass(frozen=True)
class Preparation:
    """A placement about to be brought into being.

    Attributes:
      placement: the new mesh.
      needs: what each of its devices must have.
      plan: where that comes from.
      heirs: old replica to the new one that goes on with its page numbers, so that its pages can stay where they are.
      carried: those of the heirs whose replica is the same in both meshes and goes on without stopping.
      survivors: KV of replicas of the old mesh that lost an instance.
    """

    placement: Placement
    needs: Mapping[DeviceRef, Needs]
    plan: MigrationPlan
    heirs: Mapping[int, int]
    carried: Mapping[int, int] = field(default_factory=dict)
    survivors: Survivors = Survivors()

    @property
    def changed(self) -> tuple[int, ...]:
        """New replicas that are not carried over."""
        return tuple(data for data in range(self.placement.shape.data) if data not in self.carried.values())


@dataclass(frozen=True, slots=True)
class PageTransfer:
    """Pages of the sequences that one new replica takes over from one old replica.

    Attributes:
      old, new: replica numbers in the old and in the new mesh.
      pages: (page in the old replica, page in the new one), each holding at least one computed position.
      owners: (key of the sequence, number of the page in it) of each, by which backups are kept.
    """

    old: int
    new: int
    pages: tuple[tuple[int, int], ...]
    owners: tuple[tuple[int, int], ...] = ()


@dataclass
class Traffic:
    """Bytes counted where they move.

    Attributes:
      moved: from device to device.
      loaded: from the checkpoint.
    """

    moved: int = 0
    loaded: int = 0
