"""A change of the mesh that a simulated Spotjax is making: how far it has come, and what is left. Makes nothing."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from spotjax.fleet.change import KvChange
from spotjax.planner.kv_cohorts import KvCohort
from spotjax.planner.links import Links
from spotjax.reshard.transfer import Preparation


@dataclass(eq=False)
class Underway:
    """A change that is being made.

    Attributes:
      preparation: its plan.
      reason: one line.
      started: when it was planned.
      leaving: instances of the old mesh that were not ready then.
      needed: instances without which it cannot be done.
      links: bandwidths of all that were there.
      moving: decoding has stopped, and there is no way back.
      waited: decoding went on after everything was prepared.
      copied: full pages of each request that are in place already.
      too_late: requests for whose KV there is no time.
    """

    preparation: Preparation
    reason: str
    started: float
    leaving: frozenset[str]
    needed: frozenset[str]
    links: Links
    moving: bool = False
    waited: bool = False
    copied: dict[int, int] = field(default_factory=dict)
    too_late: frozenset[int] = frozenset()

    def left_to_move(self, kv: KvChange) -> dict[str, float]:
        """By cohort, the share of its pages that is not in place yet."""
        return {
            cohort.name: sum(
                live.pages - (self.copied.get(live.key, 0) if self._is_inherited(cohort) else 0)
                for live in cohort.sequences
            )
            / cohort.pages
            for cohort in kv.cohorts
        }

    def full_pages(
        self, kv: KvChange, running: Collection[int], page_size: int
    ) -> tuple[dict[str, float], dict[int, int]]:
        """What can be copied before the stop, as in the server: full pages that go to the heir of their replica.

        Returns: by cohort, the share of its pages that is full and not in place yet; full pages of each request.
        """
        shares: dict[str, float] = {}
        full: dict[int, int] = {}
        for cohort in kv.cohorts:
            if cohort.old in running and self._is_inherited(cohort):
                new = {live.key: live.progress // page_size for live in cohort.sequences}
                shares[cohort.name] = sum(pages - self.copied.get(key, 0) for key, pages in new.items()) / cohort.pages
                full |= new
        return shares, full

    def _is_inherited(self, cohort: KvCohort) -> bool:
        return self.preparation.heirs.get(cohort.old) == cohort.new
