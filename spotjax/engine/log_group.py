"""What is recorded in one transaction, and who is told afterwards. Pure.

Operations are added in the order in which they were asked for. Of several states of a sequence only the last has to be
written, so a group that waits for a full disk grows with its tokens and not with its steps.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from spotjax.engine.generation import GenerationRequest
from spotjax.engine.log_records import AcceptedRecord, encode
from spotjax.engine.request import RequestState


@dataclass(frozen=True)
class Accept:
    """A request to record.

    Attributes:
      request_id: of the request.
      content: its encoded record.
      states: of its sequences, by choice.
      done: is told the outcome, None if nobody waits for it.
    """

    request_id: str
    content: bytes
    states: Sequence[RequestState]
    done: asyncio.Future[None] | None = None

    @classmethod
    def of(
        cls,
        request: GenerationRequest,
        states: Sequence[RequestState],
        key: int,
        done: asyncio.Future[None] | None = None,
    ) -> Accept:
        """Encodes the request, so that one that cannot be is an error of who asks, and not of the writer."""
        return cls(request.request_id, encode(AcceptedRecord.of(request, states, key)), tuple(states), done)


@dataclass
class Group:
    """Operations that become durable together.

    Attributes:
      forgotten: requests from before this group that are dropped.
      accepted: requests to record, by id.
      states: last state of each sequence that changed, by request and choice.
      epoch: to record, None if it has not changed.
      accepts: of this group, recorded or already forgotten again, to be told.
      then: to be called when all this is recorded, in order.
    """

    forgotten: set[str] = field(default_factory=set)
    accepted: dict[str, Accept] = field(default_factory=dict)
    states: dict[tuple[str, int], RequestState] = field(default_factory=dict)
    epoch: int | None = None
    accepts: list[Accept] = field(default_factory=list)
    then: list[Callable[[], None]] = field(default_factory=list)

    @property
    def writes(self) -> bool:
        """Whether there is anything to write."""
        return bool(self.forgotten or self.accepted or self.states or self.epoch is not None)

    def accept(self, accept: Accept) -> None:
        """A request was accepted."""
        self.accepted[accept.request_id] = accept
        self.accepts.append(accept)

    def append(self, states: Iterable[RequestState], then: Callable[[], None]) -> None:
        """A step came back."""
        for state in states:
            self.states[state.request_id, state.choice] = state
        self.then.append(then)

    def forget(self, request_id: str) -> None:
        """A request is of no interest any more."""
        self._drop_states({request_id})
        if self.accepted.pop(request_id, None) is None:
            self.forgotten.add(request_id)

    def refuse(self) -> list[Accept]:
        """Takes out all requests, with what came of them since. Returns those that have to be told."""
        refused, self.accepts = self.accepts, []
        self._drop_states(set(self.accepted))
        self.accepted = {}
        return refused

    def _drop_states(self, request_ids: set[str]) -> None:
        self.states = {key: state for key, state in self.states.items() if key[0] not in request_ids}
