"""What target devices need and do not have, in parts that some devices have in full. Chooses no source.

Devices that need the same parameters and have the same are worked out once, and what the same devices could send is
kept together, so that a fleet of thousands has a few parts per device and not one per array.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil

from spotjax.meshes.instance import DeviceRef
from spotjax.meshes.slices import ArraySlice, Boxes, Index, intersect, remainder, subtract
from spotjax.meshes.stacks import depth, is_layered
from spotjax.planner.holdings import Holdings
from spotjax.planner.kv_cohorts import cohort_of
from spotjax.planner.needs import StackedNeeds
from spotjax.planner.plan import Phase
from spotjax.planner.reuse import Classes, parameters_held

PAGES = 2
"""The axis of pages in a stack of KV."""

Holders = tuple[DeviceRef, ...]
"""Devices that all have something in full, in order; none, and only a checkpoint may have it."""

Missing = Mapping[tuple[Phase, int, object], list[ArraySlice]]
"""Slices of stacks by when they may move, the number of their holders, and what else must not go together."""


@dataclass(frozen=True, slots=True)
class Part:
    """Missing slices that come from one source together.

    Attributes:
      pieces: of stacks, whose elements are of one size.
      target: who misses them.
      bytes: all of them.
      phase: when they may move.
      holders: number of the devices that have all of them.
    """

    pieces: tuple[ArraySlice, ...]
    target: DeviceRef
    bytes: int
    phase: Phase
    holders: int


class Gaps:
    """Finds what is missing.

    Args:
      holdings: who has what.

    Attributes:
      holders: of each number.
    """

    def __init__(self, holdings: Holdings) -> None:
        self.holders: list[Holders] = []
        self._holdings = holdings
        self._sources = holdings.sources()
        self._numbers: dict[Holders, int] = {}
        self._patterns: dict[str, _Pattern] = {}
        self._cuts: dict[tuple[Boxes, Index], list[tuple[Index, list[Index]]]] = {}

    def parts(self, needs: Mapping[DeviceRef, StackedNeeds]) -> Iterator[Part]:
        """Everything that is missing."""
        held = Classes()
        known: dict[tuple[int, int], Missing] = {}
        number: dict[int, int] = {}  # by identity: replicas share what they have
        has_of = {target: self._holdings.at(target) for target in needs}
        for target, wanted in needs.items():
            has = has_of[target]
            if id(has) not in number:
                number[id(has)] = held.number(parameters_held(has))
            pair = id(wanted.parameters), number[id(has)]
            if pair not in known:
                known[pair] = self._missing(wanted.parameters, has, Phase.PRECOPY)
            for found in (known[pair], self._missing(wanted.kv, has, Phase.FINAL)):
                for (phase, holders, _), pieces in found.items():
                    size = sum(piece.size for piece in pieces) * self._holdings.bytes_per_element(pieces[0].name)
                    yield Part(tuple(pieces), target, size, phase, holders)

    def _missing(self, wanted: Mapping[str, Index], has: Mapping[str, Boxes], phase: Phase) -> Missing:
        """KV of each cohort is kept apart, so that what is lost can be left out; and elements of different sizes."""
        found: dict[tuple[Phase, int, object], list[ArraySlice]] = defaultdict(list)
        for stack, index in wanted.items():
            held = has.get(stack, ())
            apart = cohort_of(stack) or is_layered(stack), self._holdings.bytes_per_element(stack)
            for box in () if index in held else remainder(index, held):
                for part, holders in self._cut(ArraySlice(stack, box)):
                    found[phase, holders, apart].append(ArraySlice(stack, part))
        return found

    def _cut(self, piece: ArraySlice) -> list[tuple[Index, int]]:
        """A slice in disjoint parts with the devices that have all of each; no device has only a piece of a part.

        How the boxes of a stack cut it is worked out once for all stacks that are cut alike: only axes in which boxes
        differ matter, so the KV of all cohorts is alike however many pages they have.
        """
        if piece.name not in self._patterns:
            self._patterns[piece.name] = _Pattern(self._sources.get(piece.name, {}))
        pattern = self._patterns[piece.name]
        if any(piece.index[axis] != extent for axis, extent in pattern.same.items()):
            cuts = list(_cut(piece.index, list(pattern.devices)))
            return [(box, self._number(pattern.having(boxes))) for box, boxes in cuts]
        reduced = tuple(extent for axis, extent in enumerate(piece.index) if axis not in pattern.same)
        key = pattern.boxes, reduced
        if key not in self._cuts:
            self._cuts[key] = list(_cut(reduced, pattern.boxes))
        return [
            (pattern.restore(box, len(piece.index)), self._number(pattern.having(boxes)))
            for box, boxes in self._cuts[key]
        ]

    def _number(self, devices: Iterable[DeviceRef]) -> int:
        holders = tuple(sorted(devices))
        number = self._numbers.setdefault(holders, len(self.holders))
        if number == len(self.holders):
            self.holders.append(holders)
        return number


class _Pattern:
    """The boxes of one stack, whoever has them, without the axes in which they are all the same.

    Attributes:
      same: those axes and their ranges.
      boxes: the rest of every box.
      devices: by box, without and with those axes.
    """

    def __init__(self, sources: Mapping[Index, Sequence[DeviceRef]]) -> None:
        axes = range(len(next(iter(sources), ())))
        ranges = {axis: {box[axis] for box in sources} for axis in axes}
        self.same = {axis: next(iter(extents)) for axis, extents in ranges.items() if len(extents) == 1}
        rest = [tuple(extent for axis, extent in enumerate(box) if axis not in self.same) for box in sources]
        self.boxes = tuple(rest)
        self.devices: dict[Index, Sequence[DeviceRef]] = dict(sources)
        self._reduced = dict(zip(rest, sources.values(), strict=True))

    def having(self, boxes: Iterable[Index]) -> Iterator[DeviceRef]:
        """The devices of some boxes."""
        for box in boxes:
            yield from self._reduced[box] if box in self._reduced else self.devices[box]

    def restore(self, reduced: Index, axes: int) -> Index:
        """A box with all its axes again."""
        rest = iter(reduced)
        return tuple(self.same[axis] if axis in self.same else next(rest) for axis in range(axes))


def _cut(box: Index, boxes: Sequence[Index]) -> Iterator[tuple[Index, list[Index]]]:
    """``box`` in disjoint parts with those of ``boxes`` that cover each; the others do not meet it."""
    meeting = [held for held in boxes if intersect(box, held) is not None]
    for held in meeting:
        common = intersect(box, held)
        if common is not None and common != box:
            for part in (common, *subtract(box, common)):
                yield from _cut(part, meeting)
            return
    yield box, meeting


def with_full_pages_early(part: Part, full_pages: Mapping[str, int]) -> Iterator[Part]:
    """A part cut so that KV pages that decoding no longer writes to may move before the stop.

    Args:
      part: of parameters, or of one cohort's KV.
      full_pages: by cohort, how many of its pages, which are numbered first.
    """
    cohort = cohort_of(part.pieces[0].name)
    if cohort is None:
        yield part
        return
    element_bytes = part.bytes // sum(piece.size for piece in part.pieces)
    full = full_pages.get(cohort, 0)
    for phase, pages in ((Phase.PRECOPY, (0, full)), (Phase.FINAL, (full, 1 << 62))):
        cut = [
            ArraySlice(piece.name, box)
            for piece in part.pieces
            for box in [intersect(piece.index, (*piece.index[:PAGES], pages, *piece.index[PAGES + 1 :]))]
            if box is not None
        ]
        if cut:
            size = sum(piece.size for piece in cut) * element_bytes
            yield Part(tuple(cut), part.target, size, phase, part.holders)


def split(parts: Sequence[Part], most: int) -> list[Part]:
    """The parts cut finely enough to share out evenly: by array, or by runs of layers where that makes over ``most``.

    Nothing is cut below one array of one layer, and no two parts are joined, so there may be more than ``most``.
    """
    if sum(_layers(piece) for part in parts for piece in part.pieces) <= most:
        return [one for part in parts for one in _runs(part, 1, alone=True)]
    run = ceil(sum(max(map(_layers, part.pieces)) for part in parts) / most)
    return [one for part in parts for one in _runs(part, run, alone=False)]


def _layers(piece: ArraySlice) -> int:
    return piece.index[0][1] - piece.index[0][0] if is_layered(piece.name) else 1


def _runs(part: Part, run: int, alone: bool) -> Iterator[Part]:
    """A part by runs of layers, with each stack alone or all together."""
    element_bytes = part.bytes // sum(piece.size for piece in part.pieces)
    if not is_layered(part.pieces[0].name):
        groups = [[piece] for piece in part.pieces] if alone else [list(part.pieces)]
    else:
        first = min(piece.index[0][0] for piece in part.pieces)
        last = max(piece.index[0][1] for piece in part.pieces)
        if last - first <= run and not alone:
            yield part
            return
        groups = []
        for start in range(first, last, run):
            within = [
                ArraySlice(piece.name, ((max(start, low), min(start + run, high)), *rest))
                for piece in part.pieces
                for (low, high), *rest in [piece.index]
                if max(start, low) < min(start + run, high)
            ]
            groups += [[piece] for piece in within] if alone else [within]
    for pieces in groups:
        if pieces:
            size = sum(piece.size for piece in pieces) * element_bytes
            yield Part(tuple(pieces), part.target, size, part.phase, part.holders)


def order(part: Part) -> tuple[bool, bool, float, str, Index, DeviceRef]:
    """Sorts what moves before the stop, parameters before KV, and front layers, hence stages, first."""
    name, index = part.pieces[0]
    along = index[0][0] if is_layered(name) else depth(name)
    return part.phase is Phase.FINAL, cohort_of(name) is not None, along, name, index, part.target
