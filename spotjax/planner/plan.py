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
class MemoryUse:
    """What a migration takes beyond what devices hold when it starts.

    Attributes:
      peak: the most bytes at once, for every target device; KV is not counted.
      excess: bytes by which the worst device passes its room, 0 or less if none does.
      deferred: bytes that could not be pre-copied beside what is held, and move after the stop.
      layer_order: layers in the order in which those move; -1 is what is before them, the last number what is after.
    """

    peak: Mapping[DeviceRef, int]
    excess: int
    deferred: int
    layer_order: tuple[int, ...]

    @property
    def fits(self) -> bool:
        """Whether no device ever passes its room."""
        return self.excess <= 0


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
      memory: what it takes, if a bound was given. Parameters that do not fit beside what is held then move after the
        stop and after KV, in an order that frees memory.
    """

    transfers: tuple[Transfer, ...]
    lost: tuple[str, ...]
    bytes_in_place: int
    bytes_moved: int
    bytes_loaded: int
    link_seconds: Mapping[Phase, Mapping[Link, float]] = field(default_factory=dict)
    lower_bound_seconds: Mapping[Phase, float] = field(default_factory=dict)
    memory: MemoryUse | None = None

    @cached_property
    def moves(self) -> tuple[SliceMove, ...]:
        """The transfers array by array, in order. Expanded when first asked for."""
        deferred = () if self.memory is None else self.memory.layer_order
        rank = {layer: number for number, layer in enumerate(deferred)}

        def order(move: SliceMove) -> tuple[bool, bool, float, str, Index, DeviceRef]:
            name, index = move.slice
            late = move.phase is Phase.FINAL
            is_kv = "@" in name
            at = depth(name)
            if late and not is_kv:
                at = rank[int(min(at, len(rank) - 2))]
            return late, is_kv != late, at, name, index, move.target

        return tuple(sorted((move for transfer in self.transfers for move in transfer.moves()), key=order))

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
