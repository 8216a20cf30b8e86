"""The truth: accepted requests and their committed tokens. A token reaches a client only after ``append`` returned.

Here the interface and the in-memory log. What is on devices is a cache of what is written here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from spotjax.engine.generation import GenerationRequest
from spotjax.engine.request import RequestState
from spotjax.errors import UnknownRequest


class CommitLog(Protocol):
    """Keeps the generation state of every accepted request."""

    def accept(self, request: GenerationRequest, states: Sequence[RequestState]) -> None:
        """Records a request and its sequences; from here on it is never lost."""
        ...

    def append(self, states: Sequence[RequestState]) -> None:
        """Records one step: the new state of every sequence that gained a token or ended."""
        ...

    def states(self, request_id: str) -> Sequence[RequestState]:
        """The sequences of a request, by choice.

        Raises:
          UnknownRequest: it was never accepted, or is forgotten.
        """
        ...

    def forget(self, request_id: str) -> None:
        """Drops a finished request."""
        ...

    def replay(self) -> Iterator[tuple[GenerationRequest, Sequence[RequestState]]]:
        """All requests in order of acceptance, with all that is committed of them."""
        ...


class MemoryCommitLog:
    """A log that lives as long as its process."""

    def __init__(self) -> None:
        self._requests: dict[str, GenerationRequest] = {}
        self._states: dict[str, list[RequestState]] = {}

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    def accept(self, request: GenerationRequest, states: Sequence[RequestState]) -> None:
        self._requests[request.request_id] = request
        self._states[request.request_id] = list(states)

    def append(self, states: Sequence[RequestState]) -> None:
        for state in states:
            self._states[state.request_id][state.choice] = state

    def states(self, request_id: str) -> Sequence[RequestState]:
        try:
            return tuple(self._states[request_id])
        except KeyError:
            raise UnknownRequest(f"request {request_id!r} is not known; it may be past its retention") from None

    def forget(self, request_id: str) -> None:
        self._requests.pop(request_id, None)
        self._states.pop(request_id, None)

    def replay(self) -> Iterator[tuple[GenerationRequest, Sequence[RequestState]]]:
        for request_id, request in list(self._requests.items()):
            yield request, tuple(self._states[request_id])
