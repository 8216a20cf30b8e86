"""What is left of the KV of a replica that lost an instance: copies on another one, but for what came last.

A model of ``worker.backup``: rounds every tenth of a second, within a bandwidth for each instance. Copies nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from spotjax.fleet.keepers import choose_keepers
from spotjax.meshes.placement import Placement
from spotjax.sim.replica import Progress
from spotjax.sim.requests import RequestBook


@dataclass(frozen=True)
class Backups:
    """How KV is backed up.

    Attributes:
      position_bytes: KV of one position in all layers.
      bandwidth: bytes per second that each instance spends on it.
      lag_seconds: between rounds; what was computed in the last of these is lost.
      step_seconds: shortest time between two tokens of a sequence on a mesh.
    """

    position_bytes: int
    bandwidth: float
    lag_seconds: float
    step_seconds: Callable[[Placement], float]

    def positions(
        self, now: float, since: float, book: RequestBook, stopped: Sequence[Progress], placement: Placement
    ) -> dict[int, int]:
        """Positions of each request of a replica of which there are copies when it loses an instance.

        Args:
          now: simulated seconds.
          since: when the replica began, with nothing copied.
          book: says when each had its first token; its prompt is copied from then on.
          stopped: what was on the replica.
          placement: of the mesh.
        """
        running = [progress for progress in stopped if progress.computed]
        longest = max(stop - start for start, stop in placement.layers)
        rate = self.bandwidth * placement.layers[-1][1] / (self.position_bytes * longest)
        late = int(self.lag_seconds / self.step_seconds(placement)) + 1
        together = (now - since) * rate / max(1, len(running))
        copied = {}
        for request, computed in running:
            alone = (now - book.first_token[request]) * rate
            if alone > 0:  # False before there is a token: nan
                copied[request] = max(0, int(min(computed - late, alone, together)))
        return copied


def keepers_of(lost: Collection[str], placement: Placement, others: Iterable[str]) -> dict[str, str]:
    """Who had the copies of some instances' KV just before they were lost together."""
    used = {device.instance for device in placement.devices.values()}
    keepers = choose_keepers(used, dict.fromkeys([*others, *lost], ""))
    return {name: keeper for name, keeper in keepers.items() if name in lost and keeper not in lost}
