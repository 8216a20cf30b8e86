"""How far one copier of a stage's KV has come: what is to be copied next, and under which name. Holds no KV."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import NamedTuple

from spotjax.worker.ledger import Resident, StageLedger


class DuePage(NamedTuple):
    """A page to be copied.

    Attributes:
      sequence: its key.
      number: of the page in the sequence.
      page: in the stage.
      positions: of the sequence that are copied with it and the pages before it.
    """

    sequence: int
    number: int
    page: int
    positions: int


class Copying:
    """Progress of copying one stage to one place.

    Attributes:
      ledger: of the stage.
      source: name of what is copied; what comes under another name is not to be mixed with it.
    """

    def __init__(self, ledger: StageLedger) -> None:
        self.ledger = ledger
        self._most: dict[int, int] | None = None
        self.restart()

    def restart(self) -> None:
        """Nothing is copied yet: whoever had it has lost it."""
        self.source = uuid.uuid4().hex
        self._copied: dict[int, tuple[Resident, int]] = {}

    def freeze(self) -> None:
        """What is written from now on is not to be copied: so there is an end to it though steps go on."""
        with self.ledger.lock:
            if self._most is None:
                self._most = {key: one.written for key, one in self.ledger.residents().items()}

    def due(self, limit: int, *, full: bool = False) -> list[DuePage]:
        """What is to be copied next.

        Whole sequences as far as the limit goes, those with most to copy last, so that all stay close behind.

        Args:
          limit: pages at most.
          full: only pages that are full; others would have to be copied again.
        """
        size = self.ledger.page_size
        with self.ledger.lock:
            residents = self.ledger.residents()
            self._copied = {key: one for key, one in self._copied.items() if residents.get(key) is one[0]}
            behind = [
                (written - copied, key, one, copied, written)
                for key, one in residents.items()
                if (written := self._wanted(key, one, size if full else 1))
                > (copied := self._copied[key][1] if key in self._copied else 0)
            ]
            found: list[DuePage] = []
            for _, key, one, copied, written in sorted(behind, key=lambda entry: entry[:2]):
                for number in range(copied // size, -(-written // size)):
                    if len(found) == limit:
                        return found
                    found.append(DuePage(key, number, one.pages[number], min(written, (number + 1) * size)))
            return found

    def _wanted(self, key: int, one: Resident, unit: int) -> int:
        """Positions of a sequence that are to be copied, a multiple of a unit."""
        written = one.written if self._most is None else min(one.written, self._most.get(key, 0))
        return written // unit * unit

    def copied(self, due: Sequence[DuePage]) -> None:
        """These are where they should be, as far as they are still what they were."""
        with self.ledger.lock:
            for key, number, page, positions in due:
                one = self.ledger.residents().get(key)
                if one is not None and one.pages[number : number + 1] == (page,) and one.written >= positions:
                    before = self._copied.get(key, (one, 0))
                    if before[0] is one:
                        self._copied[key] = one, max(before[1], positions)
