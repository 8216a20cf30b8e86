"""What a worker knows of the sequences on one of its stages: which pages are whose, how much KV is in them.

Steps tell what they are about to write (``begin``) and what they have written (``written``). Backups are made from it,
and a controller that has started again learns from it what KV is still there. Holds no KV.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from spotjax.runtime.stage import Stage

NOBODY = -1
"""In place of a key."""


@dataclass(eq=False)
class Resident:
    """What is known of one sequence on one stage.

    Attributes:
      pages: its KV pages; full ones may be others' as well.
      written: positions whose KV is on the stage; they only grow. What loses KV becomes another ``Resident``.
    """

    pages: tuple[int, ...]
    written: int = 0


class StageLedger:
    """Whose the pages of one stage are. Its lock orders steps and copies.

    A page that changes hands is a danger: copied under its old owner's name it would be wrong KV. So a step that writes
    pages takes them from whoever had them before it runs, and a copy looks, under the lock, whether what it is about to
    read still belongs to whom it thinks. A page that a step only reads, as one does of a prefix that another sequence
    has computed, is the others' as before, and that sequence's too: what is there of it is all that it can read.
    """

    def __init__(self, stage: Stage, page_size: int) -> None:
        self.stage = stage
        self.lock = threading.Lock()
        self.epoch = 0
        self.page_size = page_size
        self._sequences: dict[int, Resident] = {}
        self._owners: dict[int, set[int]] = {}

    def begin(self, sequences: Sequence[int], rows: np.ndarray, pages: np.ndarray) -> None:
        """A step is about to write; called before it is dispatched. ``rows`` and ``pages`` are as in ``StepInput``."""
        with self.lock:
            for row, key in enumerate(sequences):
                count = -(-int(rows[row, 0] + rows[row, 1]) // self.page_size)
                owned = tuple(pages[row, :count].tolist())
                sequence = self._sequences.get(key)
                if sequence is None or sequence.pages != owned[: len(sequence.pages)]:  # it lost its pages, if any
                    sequence = self._sequences[key] = Resident(())
                known, read = len(sequence.pages), int(rows[row, 0]) // self.page_size
                sequence.pages = owned
                for number in range(known, count):  # most steps bring none: this is on every step's way
                    if number >= read:
                        self._take_away(owned[number], key)
                    self._owners.setdefault(owned[number], set()).add(key)

    def _take_away(self, page: int, new: int = NOBODY) -> None:
        """Whoever had a page, but its new owner, is not copied any more until it runs again."""
        for before in self._owners.pop(page, ()):
            robbed = self._sequences.get(before)
            if before != new and robbed is not None and page in robbed.pages:
                del self._sequences[before]

    def written(self, sequences: Sequence[int], rows: np.ndarray) -> None:
        """The step is dispatched: what reads the stage's pages from now on finds what it writes."""
        with self.lock:
            for row, key in enumerate(sequences):
                if (sequence := self._sequences.get(key)) is None:
                    continue
                if rows[row, 0] < sequence.written:  # computed again
                    sequence = self._sequences[key] = Resident(sequence.pages)
                sequence.written = int(rows[row, 0] + rows[row, 1])

    def overwrite(self, pages: Iterable[int]) -> None:
        """KV of others is about to be brought into these pages: whoever had them has none here any more."""
        with self.lock:
            for page in pages:
                self._take_away(page)

    def forget(self, sequences: Iterable[int]) -> None:
        """These have ended."""
        with self.lock:
            for key in sequences:
                self._sequences.pop(key, None)

    def keep(self, certain: Mapping[int, int]) -> None:
        """Only these sequences count from now on, each with no more than so many positions."""
        with self.lock:
            self._sequences = {
                key: Resident(one.pages, min(one.written, certain[key]))
                for key, one in self._sequences.items()
                if key in certain
            }

    def remains(self) -> tuple[tuple[int, tuple[int, ...], int], ...]:
        """(key, pages in order, positions whose KV is in them) of every sequence that has some."""
        with self.lock:
            return tuple((key, one.pages, one.written) for key, one in self._sequences.items() if one.written)

    def residents(self) -> dict[int, Resident]:
        """By key; for who holds the lock."""
        return self._sequences

    def still_owned(self, due: Sequence[tuple[int, int, int, int]]) -> bool:
        """Whether all these pages belong to whom they did; for who holds the lock."""
        return all(
            (sequence := self._sequences.get(key)) is not None
            and number < len(sequence.pages)
            and sequence.pages[number] == page
            and sequence.written >= positions
            for key, number, page, positions in due
        )
