"""The truth: accepted requests and their committed tokens. A token reaches a client only after it is recorded here.

Here the interface and the log that lives in memory; the one on disk is in ``durable_log``. What is on devices is a
cache of what is written here.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from spotjax.engine.generation import GenerationRequest
from spotjax.engine.request import RequestState


@dataclass(frozen=True)
class RecordedRequest:
    """All that a log has of one request.

    Attributes:
      request: as accepted.
      states: of its sequences, by choice, with all tokens that were recorded.
      key: of the first of its sequences; the others' follow.
    """

    request: GenerationRequest
    states: tuple[RequestState, ...]
    key: int

    @property
    def goes_on(self) -> bool:
        """Whether it does when the log is opened: it has not ended, and does not end with its client's connection."""
        return self.request.resumable and any(state.finish is None for state in self.states)


class CommitLog(Protocol):
    """Keeps the generation state of every accepted request. For the event loop's thread.

    Attributes:
      on_change: called when ``problem`` changes.
    """

    on_change: Callable[[], None]

    @property
    def identity(self) -> str:
        """Of the service whose log this is: new for a new log, the same whenever it is opened again."""
        ...

    @property
    def epoch(self) -> int:
        """The last that was recorded, 0 in a new log."""
        ...

    @property
    def problem(self) -> str:
        """Why nothing can be recorded at the moment, empty if all is well."""
        ...

    def accept(self, request: GenerationRequest, states: Sequence[RequestState], key: int) -> Awaitable[None]:
        """Records a request and its sequences; once awaited, it is never lost.

        Args:
          request: what was asked for.
          states: of its sequences, by choice.
          key: of the first of them; the others' follow.

        Raises:
          LogUnavailable: it could not be recorded, and is not.
        """
        ...

    def append(self, states: Sequence[RequestState], then: Callable[[], None]) -> None:
        """Records one step: the new state of every sequence that gained tokens or ended.

        What cannot be recorded at once is kept and tried again.

        Args:
          states: in any order.
          then: called when these may be told to clients, at once or later, in the order of calls.
        """
        ...

    def forget(self, request_id: str) -> None:
        """Drops a finished request."""
        ...

    def begin_epoch(self, epoch: int) -> None:
        """Records that a mesh of that epoch is about to be."""
        ...

    def replay(self) -> Iterator[RecordedRequest]:
        """All requests that were there when the log was opened, in order of acceptance."""
        ...

    async def close(self) -> None:
        """Records what is still to be recorded, as far as that is possible, and lets go."""
        ...


class MemoryCommitLog:
    """A log that lives as long as its process and remembers nothing from before: the process holds it all anyway."""

    problem = ""

    def __init__(self) -> None:
        self.identity = uuid.uuid4().hex
        self.epoch = 0
        self.on_change: Callable[[], None] = lambda: None

    def accept(self, request: GenerationRequest, states: Sequence[RequestState], key: int) -> Awaitable[None]:
        """See ``CommitLog.accept``."""
        done = asyncio.get_running_loop().create_future()
        done.set_result(None)
        return done

    def append(self, states: Sequence[RequestState], then: Callable[[], None]) -> None:
        """See ``CommitLog.append``."""
        then()

    def forget(self, request_id: str) -> None:
        """See ``CommitLog.forget``."""

    def begin_epoch(self, epoch: int) -> None:
        """See ``CommitLog.begin_epoch``."""
        self.epoch = epoch

    def replay(self) -> Iterator[RecordedRequest]:
        """See ``CommitLog.replay``."""
        return iter(())

    async def close(self) -> None:
        """See ``CommitLog.close``."""
