"""A migration as data: what moves from where to where, in which order, and how long the links are busy with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property

from spotjax.meshes.instance import DeviceRef
from spotjax.meshes.slices import ArraySlice, Index
from spotjax.meshes.stacks import arrays_in, depth
from spotjax.planner.links import Link


class Phase(StrEnum):
    """When a slice may move: while decoding goes on, or only once it has stopped."""

    PRECOPY = "precopy"
    FINAL = "final"


@dataclass(frozen=True, slots=True)
class SliceMove:
    """One slice on its way.

    Attributes:
      slice: what moves, in the array's own indices.
      source: the device that has it; None reads it from the checkpoint.
      target: the device that needs it.
      bytes: its size.
      phase: when it may move.
    """

    slice: ArraySlice
    source: DeviceRef | None
    target: DeviceRef
    bytes: int
    phase: Phase


@dataclass(frozen=True, slots=True)
class Transfer:
    """Slices of stacks that go from one source to one target together.

    Attributes:
      pieces: what moves, in the stacks' own indices.
      source, target, bytes, phase: see ``SliceMove``.
    """

    pieces: tuple[ArraySlice, ...]
    source: DeviceRef | None
    target: DeviceRef
    bytes: int
    phase: Phase

    @property
    def depth(self) -> float:
        """How far along the model its first array is; see ``stacks.depth``."""
        return min(depth(next(arrays_in(piece)).name) for piece in self.pieces)

    def moves(self) -> Iterator[SliceMove]:
        """Array by array."""
        size = sum(piece.size for piece in self.pieces)
        for piece in self.pieces:
            for part in arrays_in(piece):
                yield SliceMove(part, self.source, self.target, self.bytes * part.size // size, self.phase)


@dataclass(frozen=True)
class MigrationPlan:
    """All that has to move, in order.

    Attributes:
      transfers: parameters first (they move while decoding goes on), by layer; then KV, by layer.
      lost: names of the cohorts whose KV is not held in full by anyone alive, in order; none of it moves.
      bytes_in_place: needed bytes that stay where they are, KV of lost cohorts not counted.
      bytes_moved: bytes from device to device.
      bytes_loaded: bytes from the checkpoint.
      link_seconds: for each phase, how long each link is busy.
      lower_bound_seconds: for each phase, what no choice of sources can beat on the given targets.
    """

    transfers: tuple[Transfer, ...]
    lost: tuple[str, ...]
    bytes_in_place: int
    bytes_moved: int
    bytes_loaded: int
    link_seconds: Mapping[Phase, Mapping[Link, float]] = field(default_factory=dict)
    lower_bound_seconds: Mapping[Phase, float] = field(default_factory=dict)

    @cached_property
    def moves(self) -> tuple[SliceMove, ...]:
        """The transfers array by array, in order. Expanded when first asked for."""
        return tuple(sorted((move for transfer in self.transfers for move in transfer.moves()), key=_order))

    def seconds(self, phase: Phase) -> float:
        """Estimated makespan of a phase: its busiest link."""
        return max(self.link_seconds[phase].values(), default=0.0)

    @property
    def makespan(self) -> float:
        """Estimated seconds of both phases, one after the other."""
        return sum(self.seconds(phase) for phase in Phase)

    @property
    def lower_bound(self) -> float:
        """Seconds that no choice of sources can beat on the given targets."""
        return sum(self.lower_bound_seconds.values())


def _order(move: SliceMove) -> tuple[bool, float, str, Index, DeviceRef]:
    """Parameters before KV, front layers first, so that front stages are complete first."""
    return move.phase is Phase.FINAL, depth(move.slice.name), move.slice.name, move.slice.index, move.target
