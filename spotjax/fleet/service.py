"""What the API needs of a controller. The real one is ``fleet.controller``; ``spotjax.testing`` has a scripted one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import Protocol

from spotjax.engine.generation import Delta, GenerationRequest
from spotjax.fleet.status import FleetEvent, FleetStatus, Reconfiguration, Saved


class UseObserver(Protocol):
    """Wants to know how much the owners of requests use, as it happens. ``owner`` is ``GenerationRequest.owner``."""

    def began(self, owner: str) -> None:
        """A request of it was taken."""
        ...

    def generated(self, owner: str, tokens: int) -> None:
        """Output tokens of it were committed."""
        ...

    def ended(self, owner: str) -> None:
        """A request of it has ended, or was not accepted after all."""
        ...


class GenerationService(Protocol):
    """Takes requests and streams their tokens."""

    def submit(self, request: GenerationRequest) -> Awaitable[None]:
        """Takes a request, under an id that is its own from here on.

        Returns: what is done once the request is accepted, that is on record: from then on it is never lost. Raises
          LogUnavailable if it cannot be recorded; then it is not accepted and its id is free again.

        Raises (the call itself, before anything is recorded):
          RequestExists: a request of this id was taken before. Told even when no request at all would be taken, so that
            a client whose call broke learns that the request is there.
          InvalidRequest: it can never fit.
          Overloaded: the queue is full.
          Draining: the server is about to exit.
        """
        ...

    def accepted(self, request_id: str) -> GenerationRequest:
        """A request as it was taken, running or finished.

        Raises:
          UnknownRequest: no such request is retained.
        """
        ...

    def stream(self, request_id: str, offsets: Sequence[int] = ()) -> AsyncIterator[Delta]:
        """Committed output of a request from ``offsets`` on (tokens already seen, per choice; default none).

        Ends after the last choice finished. Several streams of one request are independent.

        Raises:
          UnknownRequest: no such request is retained (raised by the call, not by the iterator).
          InvalidRequest: an offset is beyond what was generated.
        """
        ...

    def cancel(self, request_id: str, reason: str = "cancelled") -> bool:
        """Ends a request at the next token boundary, with finish reason ``cancelled`` or ``deadline``.

        Returns: False when it had already finished.

        Raises:
          UnknownRequest: no such request is retained.
        """
        ...


class FleetService(Protocol):
    """Shows and changes the fleet."""

    def status(self) -> FleetStatus:
        """A snapshot."""
        ...

    def recent(self) -> Sequence[FleetEvent]:
        """Recent events, the oldest first."""
        ...

    def watch(self, after: int = 0) -> AsyncIterator[FleetEvent]:
        """Recent events beyond the number ``after``, then new ones as they happen; ends when the server stops."""
        ...

    async def preempt(self, instance: str, grace_seconds: float) -> Reconfiguration:
        """Takes an instance away after ``grace_seconds``; 0 takes it at once, unannounced. Returns when it is gone.

        Raises:
          UnknownInstance: no such instance is alive.
        """
        ...

    async def release(self, instance: str) -> Reconfiguration:
        """Moves the mesh off an instance without a deadline and lets it leave. Returns when it is gone.

        Raises:
          UnknownInstance: no such instance is alive.
          NoFeasibleShape: no mesh fits without it; nothing has changed.
        """
        ...

    async def add(self, count: int) -> Reconfiguration:
        """Lets ``count`` instances join.

        Raises:
          NoSpareDevices: fewer than ``count`` instances' worth of devices are left.
        """
        ...

    async def save(self, directory: str, *, parameters: bool, state: bool, seconds: float) -> Saved:
        """Writes a checkpoint while serving goes on, one at a time.

        Args:
          directory: path or URL that all instances write to.
          parameters: save what the model consists of.
          state: save the requests with their tokens, and the KV of those that are not finished.
          seconds: KV for which there is no time is left out.

        Raises:
          CheckpointError: it cannot be written, or the mesh changed meanwhile; nothing of it counts, unless the message
            says otherwise. Where a complete checkpoint is, its parameters are not written over.
        """
        ...


class Service(GenerationService, FleetService, Protocol):
    """Both halves, as one server offers them."""

    def observe(self, observer: UseObserver) -> None:
        """Tells the observer what requests use from now on, and of those that are running at once."""
        ...

    async def drain(self, seconds: float) -> bool:
        """Takes no new requests and waits for the accepted ones, at most ``seconds``. Returns whether all finished."""
        ...
