"""Plans what has to move: a source for every needed slice that is not in place. Carries nothing out.

Every missing box is cut where its holders differ; each part comes from the holder that is done sending first. Lasting
holders come before dying ones, which may not live to send, and a checkpoint serves the parameters that nobody has.
In-place slices never move.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from math import inf
from typing import NamedTuple

from spotjax.errors import PlanError
from spotjax.meshes.instance import DeviceRef, Instance, InstanceType
from spotjax.meshes.slices import ArraySlice, Index, intersect, subtract
from spotjax.planner.holdings import Holdings, Needs, cohort_of, lost_cohorts


class Phase(StrEnum):
    """When a slice may move: while decoding goes on, or only once it has stopped."""

    PRECOPY = "precopy"
    FINAL = "final"


class Direction(StrEnum):
    """Where the bytes on a link of an instance go."""

    OUT = "out"
    IN = "in"
    INSIDE = "inside"
    CHECKPOINT = "checkpoint"


class Link(NamedTuple):
    """One direction of one instance's traffic; all transfers over it share its bandwidth."""

    instance: str
    direction: Direction


@dataclass(frozen=True)
class Links:
    """Bandwidths of the instances that take part.

    Attributes:
      types: instance name to its type.
      checkpoint_bandwidth: bytes per second at which one instance reads a checkpoint.
    """

    types: Mapping[str, InstanceType]
    checkpoint_bandwidth: float = 1e9

    @classmethod
    def of(cls, instances: Sequence[Instance], checkpoint_bandwidth: float = 1e9) -> Links:
        """Bandwidths by the types of the instances."""
        return cls({instance.name: instance.type for instance in instances}, checkpoint_bandwidth)

    def seconds(self, link: Link, size: int) -> float:
        """Seconds that ``size`` bytes keep a link busy.

        Raises:
          PlanError: the type of the instance is not known.
        """
        if link.direction is Direction.CHECKPOINT:
            return size / self.checkpoint_bandwidth
        kind = self.types.get(link.instance)
        if kind is None:
            raise PlanError(f"instance {link.instance} sends or receives, but its type is not given")
        return size / (kind.link_bandwidth if link.direction is Direction.INSIDE else kind.network_bandwidth)

    @staticmethod
    def between(source: DeviceRef | None, target: DeviceRef) -> tuple[Link, ...]:
        """The links that bytes from a source (None: the checkpoint) to a target go over, the sender's first."""
        if source is None:
            return (Link(target.instance, Direction.CHECKPOINT),)
        if source.instance == target.instance:
            return (Link(target.instance, Direction.INSIDE),)
        return Link(source.instance, Direction.OUT), Link(target.instance, Direction.IN)


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


@dataclass(frozen=True)
class MigrationPlan:
    """All that has to move, in order.

    Attributes:
      moves: parameters first (they move while decoding goes on), by layer; then KV, by layer.
      lost: names of the cohorts whose KV is not held in full by anyone alive, in order; none of it moves.
      bytes_in_place: needed bytes that stay where they are, KV of lost cohorts not counted.
      bytes_moved: bytes from device to device.
      bytes_loaded: bytes from the checkpoint.
      link_seconds: for each phase, how long each link is busy.
      lower_bound_seconds: for each phase, what no choice of sources can beat on the given targets.
    """

    moves: tuple[SliceMove, ...]
    lost: tuple[str, ...]
    bytes_in_place: int
    bytes_moved: int
    bytes_loaded: int
    link_seconds: Mapping[Phase, Mapping[Link, float]] = field(default_factory=dict)
    lower_bound_seconds: Mapping[Phase, float] = field(default_factory=dict)

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


class _Part(NamedTuple):
    """A missing slice that one holder has in full, and who could send it."""

    slice: ArraySlice
    target: DeviceRef
    bytes: int
    holders: tuple[DeviceRef, ...]

    @property
    def phase(self) -> Phase:
        return Phase.PRECOPY if cohort_of(self.slice.name) is None else Phase.FINAL


def plan_migration(needs: Mapping[DeviceRef, Needs], holdings: Holdings, links: Links) -> MigrationPlan:
    """Finds a source for everything that the target devices need and do not have.

    Args:
      needs: what every device of the new mesh must have.
      holdings: what every device has now.
      links: bandwidths of the instances that hold or need something.

    Raises:
      PlanError: a target stands on a dying or gone instance, or the type of an instance is not given.
    """
    for target in needs:
        if target.instance in holdings.dying | holdings.gone:
            raise PlanError(f"device {target} cannot be a target: its instance is going or gone; match without it")
    sources = holdings.sources()
    lost = lost_cohorts(needs.values(), holdings)
    kept = {
        target: {name: index for name, index in arrays.items() if cohort_of(name) not in lost}
        for target, arrays in needs.items()
    }
    parts = sorted(_parts(kept, holdings, sources), key=_order)
    moves, link_seconds = _choose_sources(parts, holdings, links)
    return MigrationPlan(
        moves=tuple(moves),
        lost=tuple(sorted(lost)),
        bytes_in_place=sum(holdings.reusable_bytes(target, arrays) for target, arrays in kept.items()),
        bytes_moved=sum(move.bytes for move in moves if move.source is not None),
        bytes_loaded=sum(move.bytes for move in moves if move.source is None),
        link_seconds=link_seconds,
        lower_bound_seconds={phase: _lower_bound([p for p in parts if p.phase is phase], links) for phase in Phase},
    )


def _parts(
    needs: Mapping[DeviceRef, Needs],
    holdings: Holdings,
    sources: Mapping[str, Sequence[tuple[DeviceRef, Index]]],
) -> Iterator[_Part]:
    """Everything missing, cut so that every part has holders of all of it, or none."""
    for target, arrays in needs.items():
        for name, index in arrays.items():
            for box in holdings.missing(target, name, index):
                for part, holders in _cut(box, sources.get(name, ())):
                    piece = ArraySlice(name, part)
                    yield _Part(piece, target, piece.size * holdings.element_bytes, holders)


def _cut(box: Index, sources: Sequence[tuple[DeviceRef, Index]]) -> Iterator[tuple[Index, tuple[DeviceRef, ...]]]:
    """``box`` in disjoint parts with the devices that have all of each; no device has a piece of a part."""
    meeting = [(device, held) for device, held in sources if intersect(box, held) is not None]
    for _, held in meeting:
        common = intersect(box, held)
        if common is not None and common != box:
            for part in (common, *subtract(box, common)):
                yield from _cut(part, meeting)
            return
    yield box, tuple(device for device, _ in meeting)


def _order(part: _Part) -> tuple[bool, float, str, Index, DeviceRef]:
    """Parameters before KV, front layers first, so that front stages are complete first."""
    return part.phase is Phase.FINAL, _depth(part.slice.name), part.slice.name, part.slice.index, part.target


def _depth(name: str) -> float:
    """How far along the model an array is: its layer; the embedding before, norm and head after all layers."""
    numbered = re.match(r"(?:layers|kv)\.(\d+)", name)
    if numbered:
        return int(numbered[1])
    return -1 if name == "embedding" else inf


def _choose_sources(
    parts: Sequence[_Part], holdings: Holdings, links: Links
) -> tuple[list[SliceMove], dict[Phase, dict[Link, float]]]:
    """Greedy list scheduling (Graham 1969): each part from the lasting holder that is done sending first."""
    busy: dict[Phase, dict[Link, float]] = {phase: defaultdict(float) for phase in Phase}
    sent: dict[DeviceRef, int] = defaultdict(int)
    moves: list[SliceMove] = []
    for part in parts:
        load = busy[part.phase]

        def cost(
            holder: DeviceRef, part: _Part = part, load: Mapping[Link, float] = load
        ) -> tuple[bool, float, int, DeviceRef]:
            link = links.between(holder, part.target)[0]
            done = load[link] + links.seconds(link, part.bytes)
            return holder.instance in holdings.dying, done, sent[holder], holder

        source = min(part.holders, key=cost) if part.holders else None
        for link in links.between(source, part.target):
            load[link] += links.seconds(link, part.bytes)
        if source is not None:
            sent[source] += part.bytes
        moves.append(SliceMove(part.slice, source, part.target, part.bytes, part.phase))
    return moves, {phase: dict(load) for phase, load in busy.items()}


def _lower_bound(parts: Sequence[_Part], links: Links) -> float:
    """The busiest link if every part came over the links that no choice of its source avoids."""
    least: dict[Link, float] = defaultdict(float)
    for part in parts:
        ways = [set(links.between(holder, part.target)) for holder in part.holders or (None,)]
        for link in set.intersection(*ways):
            least[link] += links.seconds(link, part.bytes)
    return max(least.values(), default=0.0)
