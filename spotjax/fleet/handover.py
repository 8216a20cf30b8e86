"""Works out where the sequences of stopped replicas go at a switch, and which KV pages they have there. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from spotjax.engine.pages import PageAllocator
from spotjax.engine.sequence import Sequence as ScheduledSequence
from spotjax.planner.kv_cohorts import KvCohort, LiveSequence
from spotjax.reshard.transfer import PageTransfer


@dataclass(frozen=True)
class Handover:
    """Where everything goes.

    Attributes:
      allocators: the pages of every new replica, those of adopted sequences taken.
      adopted: new replica to the sequences that go on with their KV there.
      pages: key of an adopted sequence to its pages there.
      progress: key of an adopted sequence to the positions whose KV it has there.
      recomputed: sequences whose KV is computed again, and those that wait, oldest first.
      transfers: which pages move where.
    """

    allocators: tuple[PageAllocator, ...]
    adopted: Mapping[int, tuple[ScheduledSequence, ...]]
    pages: Mapping[int, list[int]]
    progress: Mapping[int, int]
    recomputed: tuple[ScheduledSequence, ...]
    transfers: tuple[PageTransfer, ...]


CopiedPages = frozenset[tuple[int, int]]
"""Old replica and page."""


def live_sequence(sequence: ScheduledSequence, positions: int, pages: PageAllocator) -> LiveSequence:
    """What the first positions of a sequence are to a handover, with the pages that others of its replica share."""
    own = sequence.pages[: pages.needed(positions)]
    return LiveSequence(sequence.key, len(own), positions, tuple(page for page in own if pages.references(page) > 1))


def full_pages(
    running: Mapping[int, Iterable[ScheduledSequence]], heirs: Mapping[int, int], page_size: int
) -> tuple[PageTransfer, ...]:
    """What of the KV can be copied while decoding goes on: pages that are full and keep their numbers, each once.

    Args:
      running: by old replica, those with KV worth keeping.
      heirs: old replica to the new one that goes on with its page numbers.
      page_size: positions per page.
    """
    transfers = []
    for old, sequences in running.items():
        if old not in heirs:
            continue
        full: dict[int, tuple[int, int]] = {}
        for sequence in sequences:
            for number, page in enumerate(sequence.pages[: sequence.computed // page_size]):
                full.setdefault(page, (sequence.key, number))
        pairs = tuple((page, page) for page in full)
        transfers.append(PageTransfer(old, heirs[old], pairs, tuple(full.values())))
    return tuple(transfers)


def hand_over(
    sequences: Iterable[ScheduledSequence],
    cohorts: Sequence[KvCohort],
    heirs: Mapping[int, int],
    allocators: tuple[PageAllocator, ...],
    copied: CopiedPages = frozenset(),
) -> Handover:
    """Gives every sequence its place.

    Args:
      sequences: all that are not finished.
      cohorts: those that keep their KV.
      heirs: old replica to the new one that goes on with its page numbers.
      allocators: one for every new replica, nothing taken yet.
      copied: what ``full_pages`` said and was copied, for the same heirs, and is there as it was.
    """
    by_key = {sequence.key: sequence for sequence in sequences}
    inherited_first = sorted(cohorts, key=lambda cohort: heirs.get(cohort.old) != cohort.new)
    pages: dict[int, list[int]] = {}
    for cohort in inherited_first:  # page numbers that must stay are claimed before any are chosen freely
        pages |= _keep_pages(cohort, by_key, heirs, allocators[cohort.new])
    adopted: dict[int, tuple[ScheduledSequence, ...]] = {}
    for cohort in inherited_first:
        for live in cohort.sequences:
            if _complete(by_key[live.key], pages[live.key], allocators[cohort.new]):
                adopted[cohort.new] = (*adopted.get(cohort.new, ()), by_key[live.key])
            else:
                allocators[cohort.new].release(pages.pop(live.key))
    transfers = tuple(_transfer(cohort, by_key, pages, copied) for cohort in cohorts)
    recomputed = tuple(by_key[key] for key in sorted(by_key.keys() - pages.keys()))
    progress = {live.key: live.progress for cohort in cohorts for live in cohort.sequences}
    return Handover(allocators, adopted, pages, progress, recomputed, transfers)


def _keep_pages(
    cohort: KvCohort, by_key: Mapping[int, ScheduledSequence], heirs: Mapping[int, int], allocator: PageAllocator
) -> dict[int, list[int]]:
    """Pages for the KV that exists: the same numbers where the new replica inherits them, others elsewhere.

    Sequences that share a page go on sharing it.
    """
    pages: dict[int, list[int]] = {}
    places: dict[int, int] = {}
    for live in cohort.sequences:
        old = by_key[live.key].pages[: live.pages]
        allocator.share(places[page] for page in old if page in places)
        others = [page for page in old if page not in places]
        if heirs.get(cohort.old) == cohort.new:
            allocator.claim(others)
            places |= zip(others, others, strict=True)
        else:
            places |= zip(others, allocator.allocate(len(others)), strict=True)
        pages[live.key] = [places[page] for page in old]
    return pages


def _transfer(
    cohort: KvCohort, by_key: Mapping[int, ScheduledSequence], pages: Mapping[int, list[int]], copied: CopiedPages
) -> PageTransfer:
    moved: dict[tuple[int, int], tuple[int, int]] = {}
    for live in cohort.sequences:
        if live.key in pages:
            pairs = zip(by_key[live.key].pages[: live.pages], pages[live.key][: live.pages], strict=True)
            for number, (old, new) in enumerate(pairs):
                if old != new or (cohort.old, old) not in copied:
                    moved.setdefault((old, new), (live.key, number))
    return PageTransfer(cohort.old, cohort.new, tuple(moved), tuple(moved.values()))


def _complete(sequence: ScheduledSequence, pages: list[int], allocator: PageAllocator) -> bool:
    """Adds the pages that the sequence needs beyond those that hold KV; False if there is no room for them."""
    more = max(0, allocator.needed(sequence.state.length) - len(pages))
    if more > allocator.free:
        return False
    pages += allocator.allocate(more)
    return True
