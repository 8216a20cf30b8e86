"""Which KV pages are on the prepared mesh already: copied in rounds while decoding goes on, so that little is left.

Copying in rounds, each what was written during the one before, is how virtual machines move (Clark et al. 2005). Which
pages are full is worked out in ``handover``, and the bytes are the cluster's to move. A page that was full when it was
copied is still the same as long as it has not been given away again.
"""

from __future__ import annotations

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
        self._lives: dict[tuple[int, int], int] = {}
        """Old replica and page to the life of the page that was copied."""

    @property
    def copied(self) -> CopiedPages:
        """What need not move any more as long as it is where it was."""
        return frozenset(at for at, life in self._lives.items() if self._life(at) == life)

    async def round(self, heirs: Mapping[int, int]) -> Traffic:
        """Copies the pages that are full and were not copied yet.

        Args:
          heirs: old replica to the new one that goes on with its page numbers, of those that are intact.

        Raises:
          InstanceLost: see ``Cluster.copy_pages``.
        """
        transfers: list[PageTransfer] = []
        taken: dict[tuple[int, int], int] = {}
        copied = self.copied
        for transfer in self._dispatcher.full_pages(heirs):
            new = [
                (pair, owner)
                for pair, owner in zip(transfer.pages, transfer.owners, strict=True)
                if (transfer.old, pair[0]) not in copied
            ]
            taken |= {(transfer.old, page): self._life((transfer.old, page)) for (page, _), _ in new}
            if new:
                pairs, owners = zip(*new, strict=True)
                transfers.append(PageTransfer(transfer.old, transfer.new, pairs, owners))
        if not transfers:
            return Traffic()
        traffic = await self._cluster.copy_pages(transfers)
        self.bytes_moved += traffic.moved
        self._lives |= taken
        return traffic

    def _life(self, at: tuple[int, int]) -> int:
        replica, page = at
        return self._dispatcher.replicas[replica].scheduler.pages.life(page)
