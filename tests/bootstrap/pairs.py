"""Few combinations of choices in which every two choices occur together."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import combinations, product
from typing import Any


def pairwise(choices: Mapping[str, Sequence[Hashable]]) -> Iterable[dict[str, Any]]:
    """Combinations, one value for each name; greedy, so not the fewest."""
    missing = {
        frozenset(((a, x), (b, y)))
        for a, b in combinations(choices, 2)
        for x, y in product(choices[a], choices[b])
    }  # fmt: skip
    while missing:
        chosen = dict(next(iter(missing)))
        for name in choices:
            if name not in chosen:
                chosen[name] = max(choices[name], key=lambda value: _new(missing, chosen, name, value))
        missing -= {frozenset(pair) for pair in combinations(chosen.items(), 2)}
        yield chosen


def _new(missing: set[frozenset[Any]], chosen: Mapping[str, Any], name: str, value: Any) -> int:
    return sum(frozenset(((name, value), other)) in missing for other in chosen.items())
