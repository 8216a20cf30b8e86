"""What a replica is to the system that owns it, whatever its batching. The engines have files of their own."""

from __future__ import annotations

from typing import NamedTuple, Protocol


class Progress(NamedTuple):
    """A sequence that was taken from a replica.

    Attributes:
      request: its number.
      computed: positions whose KV was there, 0 for one that waited or whose prompt was not finished.
    """

    request: int
    computed: int


class SimulatedReplica(Protocol):
    """A replica that serves requests in simulated time; it writes into the book what becomes of them."""

    @property
    def load(self) -> int:
        """Sequences that wait or run."""
        ...

    def add(self, request: int, computed: int = 0) -> None:
        """Queues a request; so many positions of it have their KV here already, the rest is computed."""
        ...

    def stop(self) -> list[Progress]:
        """Stops now, at the token boundary that was passed last, and gives up everything, oldest first."""
        ...
