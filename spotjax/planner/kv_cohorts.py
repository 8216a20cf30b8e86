"""Running sequences whose KV goes from one replica to another together, and the pseudo-arrays that this KV is.

``kv.<layer>@<cohort>`` are the pages in use of the sequences that one new replica takes over from one old replica,
numbered from 0 in the cohort's order. So one planner serves parameters and KV alike.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property

from spotjax.models.spec import ArraySpec, ModelSpec


@dataclass(frozen=True, slots=True)
class LiveSequence:
    """A running sequence as far as its KV is concerned.

    Attributes:
      key: of the sequence within its old replica.
      pages: KV pages that it has filled, at least in part.
      progress: positions whose KV is in them.
      shared: numbers, in the old replica, of those that others there have as well; all of them full.
    """

    key: int
    pages: int
    progress: int
    shared: tuple[int, ...] = ()


def distinct_pages(sequences: Iterable[LiveSequence]) -> int:
    """Pages of sequences of one replica, those that they share counted once."""
    pages, shared = 0, set[int]()
    for sequence in sequences:
        pages += sequence.pages - len(sequence.shared)
        shared.update(sequence.shared)
    return pages + len(shared)


@dataclass(frozen=True)
class KvCohort:
    """The sequences that new replica ``new`` takes over from old replica ``old``, with their KV.

    Attributes:
      old: replica of the old mesh that has the KV.
      new: replica of the new mesh that goes on with it.
      sequences: in the order in which their pages are numbered: first all pages that are full, then those that are not,
        at most one of each sequence.
      page_size: token positions in a page.
    """

    old: int
    new: int
    sequences: tuple[LiveSequence, ...]
    page_size: int

    @cached_property
    def name(self) -> str:
        """Unique within one change of the mesh."""
        return f"{self.old}-{self.new}"

    @cached_property
    def pages(self) -> int:
        """Pages of all sequences together, those that they share counted once."""
        return distinct_pages(self.sequences)

    @cached_property
    def full_pages(self) -> int:
        """Pages that decoding no longer writes to."""
        partial = sum(sequence.pages > sequence.progress // self.page_size for sequence in self.sequences)
        return self.pages - partial

    def kv_array(self, spec: ModelSpec, layer: int) -> ArraySpec:
        """The pseudo-array of one layer: (2, pages, page_size, K, H)."""
        array = spec.kv_array(layer, self.pages, self.page_size)
        return replace(array, name=f"{array.name}@{self.name}")


def cohort_of(name: str) -> str | None:
    """Name of the cohort whose KV an array or stack is, or None for a parameter."""
    _, at, cohort = name.partition("@")
    return cohort if at else None


def by_replica(cohorts: Iterable[KvCohort], replica: Callable[[KvCohort], int]) -> dict[int, list[KvCohort]]:
    """Cohorts by one of their replicas."""
    grouped: dict[int, list[KvCohort]] = defaultdict(list)
    for cohort in cohorts:
        grouped[replica(cohort)].append(cohort)
    return grouped
