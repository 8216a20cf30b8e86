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
from spotjax.meshes.slices import ArraySlice, Index, intersect, subtract
from spotjax.meshes.stacks import arrays_in, is_layered
from spotjax.planner.holdings import Holdings, StackedNeeds, remainder
from spotjax.planner.plan import Phase
from spotjax.planner.reuse import Classes, parameters_held

Holders = tuple[DeviceRef, ...]
"""Devices that all have something in full, in order; none, and only a checkpoint may have it."""

Missing = Mapping[tuple[Phase, int, bool], list[ArraySlice]]
"""Slices of stacks by when they may move, the number of their holders, and whether they belong to layers."""


@dataclass(frozen=True, slots=True)
class Part:
    """Missing slices that come from one source together.

    Attributes:
      pieces: of stacks.
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
        self._cuts: dict[ArraySlice, list[tuple[Index, int]]] = {}

    def parts(self, needs: Mapping[DeviceRef, StackedNeeds], lost: Iterable[str]) -> Iterator[Part]:
        """Everything that is missing, except KV of the lost cohorts."""
        lost_stacks = {f"kv.*@{cohort}" for cohort in lost}
        held = Classes()
        known: dict[tuple[int, int], Missing] = {}
        for target, wanted in needs.items():
            has = self._holdings.at(target)
            pair = id(wanted.parameters), held.number(parameters_held(has))
            if pair not in known:
                known[pair] = self._missing(wanted.parameters, has, Phase.PRECOPY)
            kv = {stack: index for stack, index in wanted.kv.items() if stack not in lost_stacks}
            for found in (known[pair], self._missing(kv, has, Phase.FINAL)):
                for (phase, holders, _), pieces in found.items():
                    yield Part(tuple(pieces), target, self._bytes(pieces), phase, holders)

    def _bytes(self, pieces: Iterable[ArraySlice]) -> int:
        return sum(piece.size for piece in pieces) * self._holdings.element_bytes

    def _missing(self, wanted: Mapping[str, Index], has: Mapping[str, tuple[Index, ...]], phase: Phase) -> Missing:
        found: dict[tuple[Phase, int, bool], list[ArraySlice]] = defaultdict(list)
        for stack, index in wanted.items():
            held = has.get(stack, ())
            for box in () if index in held else remainder(index, held):
                for part, holders in self._cut(ArraySlice(stack, box)):
                    found[phase, holders, is_layered(stack)].append(ArraySlice(stack, part))
        return found

    def _cut(self, piece: ArraySlice) -> list[tuple[Index, int]]:
        """A slice in disjoint parts with the devices that have all of each; no device has only a piece of a part."""
        if piece not in self._cuts:
            sources = self._sources.get(piece.name, {})
            self._cuts[piece] = [
                (box, self._number([device for held in having for device in sources[held]]))
                for box, having in _cut(piece.index, list(sources))
            ]
        return self._cuts[piece]

    def _number(self, devices: list[DeviceRef]) -> int:
        holders = tuple(sorted(devices))
        number = self._numbers.setdefault(holders, len(self.holders))
        if number == len(self.holders):
            self.holders.append(holders)
        return number


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


def first_array(part: Part) -> ArraySlice:
    """The slice of the part's frontmost array, for ordering."""
    return next(arrays_in(min(part.pieces, key=lambda piece: piece.index[0] if is_layered(piece.name) else (-1, -1))))
