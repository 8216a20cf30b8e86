"""What whoever measures a service is told by its engine, and one who does not listen. What comes of it is in telemetry.

All calls come from the event loop's thread, many of them once for each step: they must return within microseconds, and
never raise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from spotjax.engine.generation import GenerationRequest
from spotjax.engine.request import RequestState


@dataclass(frozen=True, slots=True)
class Work:
    """What schedulers have done, counted.

    Attributes:
      prefilled: positions of prefill spans whose KV was computed.
      queried: positions of the sequences that were let in while there was a prefix cache to ask.
      reused: of these, how many had their KV in it.
      recomputed: positions whose KV was computed although it had been there before.
      preempted: times that a sequence lost its KV to another for lack of pages.
    """

    prefilled: int = 0
    queried: int = 0
    reused: int = 0
    recomputed: int = 0
    preempted: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.prefilled + other.prefilled,
            self.queried + other.queried,
            self.reused + other.reused,
            self.recomputed + other.recomputed,
            self.preempted + other.preempted,
        )


NO_WORK = Work()


class EngineObserver(Protocol):
    """Follows requests and steps. Every ``now`` is in monotonic seconds."""

    def arrived(self, request: GenerationRequest, now: float) -> None:
        """A request was taken in, and is about to be recorded."""
        ...

    def recalled(self, request: GenerationRequest, states: Sequence[RequestState]) -> None:
        """A request of an earlier run goes on from these states of its sequences; when it arrived is not known."""
        ...

    def withdrawn(self, request_id: str) -> None:
        """It could not be recorded after all, so it was never accepted."""
        ...

    def begun(self, state: RequestState, now: float) -> None:
        """A sequence was let into a replica, for the first time or after it had lost its place."""
        ...

    def stepped(self, prefill: bool, seconds: float) -> None:
        """A step came back: how long it took by itself, not counting the steps that it waited for."""
        ...

    def recorded(self, seconds: float) -> None:
        """What a step came to is in the commit log: how long that took."""
        ...

    def committed(self, states: Sequence[RequestState], now: float) -> None:
        """Clients may see these states from now on. Each follows the one that was told of its sequence before."""
        ...


class Unobserved:
    """Nobody listens."""

    def arrived(self, request: GenerationRequest, now: float) -> None:
        """See ``EngineObserver.arrived``."""

    def recalled(self, request: GenerationRequest, states: Sequence[RequestState]) -> None:
        """See ``EngineObserver.recalled``."""

    def withdrawn(self, request_id: str) -> None:
        """See ``EngineObserver.withdrawn``."""

    def begun(self, state: RequestState, now: float) -> None:
        """See ``EngineObserver.begun``."""

    def stepped(self, prefill: bool, seconds: float) -> None:
        """See ``EngineObserver.stepped``."""

    def recorded(self, seconds: float) -> None:
        """See ``EngineObserver.recorded``."""

    def committed(self, states: Sequence[RequestState], now: float) -> None:
        """See ``EngineObserver.committed``."""
