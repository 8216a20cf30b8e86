"""Which KV pages are on the prepared mesh already: copied in rounds while decoding goes on, so that little is left.

Copying in rounds, each what was written during the one before, is how virtual machines move (Clark et al. 2005). Which
pages are full is worked out in ``handover``, and the bytes are the cluster's to move.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from spotjax.fleet.cluster import Cluster
from spotjax.fleet.dispatch import Dispatcher
from spotjax.fleet.handover import CopiedPages
from spotjax.reshard.transfer import PageTransfer, Traffic


class Precopy:
    """The pages that were copied for one preparation.

    Args:
      dispatcher: whose sequences own the pages.
      cluster: copies them.

    Attributes:
      bytes_moved: in all rounds together.
    """

    def __init__(self, dispatcher: Dispatcher, cluster: Cluster) -> None:
        self.bytes_moved = 0
        self._dispatcher, self._cluster = dispatcher, cluster
        self._owners: dict[tuple[int, int], tuple[int, int]] = {}
        """Old replica and page to whose it was when it was copied: key of the sequence, number of the page in it."""

    @property
    def copied(self) -> CopiedPages:
        """What need not move any more as long as it is where it was."""
        return frozenset((key, number, page) for (_, page), (key, number) in self._owners.items())

    def counts(self) -> Counter[int]:
        """Copied pages of every sequence."""
        return Counter(key for key, _ in self._owners.values())

    async def round(self, heirs: Mapping[int, int]) -> Traffic:
        """Copies the pages that are full and were not copied yet.

        Args:
          heirs: old replica to the new one that goes on with its page numbers, of those that are intact.

        Raises:
          InstanceLost: see ``Cluster.copy_pages``.
        """
        transfers: list[PageTransfer] = []
        taken: dict[tuple[int, int], tuple[int, int]] = {}
        for transfer in self._dispatcher.full_pages(heirs)[0]:
            new = [
                (pair, owner)
                for pair, owner in zip(transfer.pages, transfer.owners, strict=True)
                if self._owners.get((transfer.old, pair[0])) != owner
            ]
            taken |= {(transfer.old, pair[0]): owner for pair, owner in new}
            if new:
                pairs, owners = zip(*new, strict=True)
                transfers.append(PageTransfer(transfer.old, transfer.new, pairs, owners))
        if not transfers:
            return Traffic()
        for written in taken:
            self._owners.pop(written, None)  # another sequence's page is written over
        preempted = self._preempted()
        traffic = await self._cluster.copy_pages(transfers)
        self.bytes_moved += traffic.moved
        # A sequence that lost its pages meanwhile may have them again, but what was copied can be anybody's.
        same = {old for old, count in self._preempted().items() if count == preempted[old]}
        self._owners |= {at: owner for at, owner in taken.items() if at[0] in same}
        return traffic

    def _preempted(self) -> dict[int, int]:
        return {old: replica.scheduler.preempted for old, replica in enumerate(self._dispatcher.replicas)}
