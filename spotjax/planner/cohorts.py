"""Which new replica goes on with which sequences when the number of replicas changes. Moves nothing itself."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heapreplace

from spotjax.planner.kv_cohorts import KvCohort, LiveSequence, distinct_pages


@dataclass(frozen=True, slots=True)
class Inheritance:
    """Who goes on with what.

    Attributes:
      cohorts: sequences that keep their KV, by old and new replica.
      recomputed: (old replica, sequence) of those for whose KV there is no room, most progress first.
    """

    cohorts: tuple[KvCohort, ...]
    recomputed: tuple[tuple[int, LiveSequence], ...]


def assign_cohorts(
    live: Mapping[int, Sequence[LiveSequence]],
    replicas: int,
    page_capacity: int | Sequence[int],
    page_size: int,
    heirs: Mapping[int, int] | None = None,
) -> Inheritance:
    """Gives the live sequences of the old replicas to ``replicas`` new ones.

    The old replicas with the most live pages each have one heir, of the same number where there is one. An heir takes
    the sequences with the most progress first while they fit into its ``page_capacity`` pages; those left over, and
    those of old replicas without an heir, go to the new replica with the most free pages, most progress first. This is
    SpotServe's rule (keep what has decoded longest) with pages in place of whole batches. Heirs are chosen anew unless
    given, as they are when room was made for them while decoding still went on. ``page_capacity`` is one number for all
    new replicas or one for each. Pages that sequences share take room once where these go the same way.
    """
    heirs = choose_heirs(live, replicas) if heirs is None else heirs
    free = [page_capacity] * replicas if isinstance(page_capacity, int) else list(page_capacity)
    taken: dict[tuple[int, int], list[LiveSequence]] = {}
    there: dict[tuple[int, int], set[int]] = defaultdict(set)
    left: list[tuple[int, LiveSequence]] = []

    def room_for(old: int, new: int, sequence: LiveSequence) -> int:
        return sequence.pages - (len(there[old, new].intersection(sequence.shared)) if sequence.shared else 0)

    def take(old: int, new: int, sequence: LiveSequence) -> None:
        free[new] -= room_for(old, new, sequence)
        there[old, new].update(sequence.shared)
        taken.setdefault((old, new), []).append(sequence)

    for old in sorted(live):
        for sequence in _most_progress_first((old, sequence) for sequence in live[old]):
            new = heirs.get(old)
            if new is not None and room_for(old, new, sequence[1]) <= free[new]:
                take(old, new, sequence[1])
            else:
                left.append(sequence)
    recomputed: list[tuple[int, LiveSequence]] = []
    roomiest = [(-pages, replica) for replica, pages in enumerate(free)]
    heapify(roomiest)
    for old, leftover in _most_progress_first(left):
        new = roomiest[0][1]
        if room_for(old, new, leftover) <= free[new]:
            take(old, new, leftover)
            heapreplace(roomiest, (-free[new], new))
        else:
            recomputed.append((old, leftover))
    cohorts = (KvCohort(old, new, tuple(sequences), page_size) for (old, new), sequences in sorted(taken.items()))
    return Inheritance(tuple(cohorts), tuple(recomputed))


def choose_heirs(
    live: Mapping[int, Sequence[LiveSequence]], replicas: int, first: Collection[int] = ()
) -> dict[int, int]:
    """Old replica to the new replica that inherits from it, for as many as there are new ones.

    Those in ``first`` come first, then those with the most live pages.
    """
    pages = {old: distinct_pages(sequences) for old, sequences in live.items()}
    inheriting = sorted(pages, key=lambda old: (old not in first, -pages[old], old))[:replicas]
    heirs = {old: old for old in inheriting if old < replicas}
    vacant = iter(sorted(set(range(replicas)) - set(heirs)))
    return heirs | {old: next(vacant) for old in sorted(inheriting) if old not in heirs}


def _most_progress_first(entries: Iterable[tuple[int, LiveSequence]]) -> list[tuple[int, LiveSequence]]:
    return sorted(entries, key=lambda entry: (-entry[1].progress, entry[0], entry[1].key))
