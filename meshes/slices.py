"""Named index ranges of arrays: the unit of planning, moving, reading and checkpointing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from math import prod
from typing import NamedTuple

Range = tuple[int, int]
"""Half-open index range ``[start, stop)`` along one axis."""

Index = tuple[Range, ...]
"""One range for every axis of an array."""


Boxes = tuple[Index, ...]
"""Disjoint parts of one array."""


class ArraySlice(NamedTuple):
    """The part of array ``name`` that ``index`` covers, in the array's own (logical) indices."""

    name: str
    index: Index  # type: ignore[assignment]  # shadows tuple.index, which nobody needs here

    @property
    def shape(self) -> tuple[int, ...]:
        """Extent along every axis."""
        return tuple(stop - start for start, stop in self.index)

    @property
    def size(self) -> int:
        """Number of elements."""
        elements = 1
        for start, stop in self.index:
            elements *= stop - start
        return elements


def whole(shape: tuple[int, ...]) -> Index:
    """The index that covers an array of that shape."""
    return tuple((0, extent) for extent in shape)


def intersect(a: Index, b: Index) -> Index | None:
    """What two indices of the same array have in common, or None."""
    common: list[Range] = []
    for (a0, a1), (b0, b1) in zip(a, b, strict=True):
        # Planning does this a hundred thousand times at once, and conditionals are much faster than max and min.
        start, stop = a0 if a0 > b0 else b0, a1 if a1 < b1 else b1
        if start >= stop:
            return None
        common.append((start, stop))
    return tuple(common)


def subtract(a: Index, b: Index) -> list[Index]:
    """``a`` without ``b`` as disjoint boxes; ``[a]`` when they do not meet, ``[]`` when ``b`` covers ``a``."""
    common = intersect(a, b)
    if common is None:
        return [a]
    rest: list[Index] = []
    left = list(a)
    for axis, (start, stop) in enumerate(common):
        low, high = left[axis]
        if low < start:
            rest.append((*left[:axis], (low, start), *left[axis + 1 :]))
        if stop < high:
            rest.append((*left[:axis], (stop, high), *left[axis + 1 :]))
        left[axis] = (start, stop)
    return rest


def relative(inner: Index, outer: Index) -> tuple[slice, ...]:
    """Where ``inner`` lies inside ``outer``, as slices into an array that holds exactly ``outer``."""
    return tuple(slice(i0 - o0, i1 - o0) for (i0, i1), (o0, _) in zip(inner, outer, strict=True))


def covered(index: Index, held: Iterable[Index]) -> int:
    """Elements of ``index`` that the ``held`` boxes, disjoint, have."""
    common = (intersect(index, box) for box in held)
    return sum(prod(stop - start for start, stop in box) for box in common if box is not None)


def remainder(index: Index, held: Iterable[Index]) -> list[Index]:
    """The parts of ``index`` that none of the ``held`` boxes covers, as disjoint boxes, none empty."""
    rest = [index] if all(start < stop for start, stop in index) else []
    for box in held:
        rest = [part for piece in rest for part in subtract(piece, box)]
    return rest


def joined(boxes: Sequence[Index]) -> Boxes:
    """The same boxes, disjoint, with those that follow each other along the first axis made one."""
    runs: dict[Index, list[tuple[int, int]]] = defaultdict(list)
    for (start, stop), *rest in sorted(boxes):
        run = runs[tuple(rest)]
        if run and run[-1][1] == start:
            run[-1] = (run[-1][0], stop)
        else:
            run.append((start, stop))
    return tuple((first, *rest) for rest, run in runs.items() for first in run)
