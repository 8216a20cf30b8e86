"""The accepted requests: who waits for what, and how committed output reaches the streams that follow it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field

from spotjax.engine.commit_log import CommitLog
from spotjax.engine.generation import Delta, GenerationRequest, Usage
from spotjax.engine.request import RequestState
from spotjax.engine.sequence import Sequence as ScheduledSequence
from spotjax.errors import InvalidRequest, UnknownRequest
from spotjax.fleet.service import UseObserver

DELTA_TOKENS = 1024
"""In one delta: what a reader has to catch up on comes in several, which stay below what a message may have."""


@dataclass(eq=False)
class AcceptedRequest:
    """One request on its way.

    Attributes:
      request: as accepted.
      sequences: its choices, in order.
      told: what clients may see of each: the states that the commit log has.
      changed: set and replaced whenever something was committed.
      finished_at: monotonic seconds when the last choice ended, None while one runs.
      readers: streams that follow it; it is retained until they have read it all.
      refused: the log could not take it after all.
      recalled: it is from before this process, and the log may have lost tokens that clients have seen.
    """

    request: GenerationRequest
    sequences: tuple[ScheduledSequence, ...]
    told: list[RequestState] = field(init=False)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    finished_at: float | None = None
    readers: int = 0
    refused: bool = False
    recalled: bool = False

    def __post_init__(self) -> None:
        self.told = [sequence.state for sequence in self.sequences]


class RequestTable:
    """All retained requests, and what is committed of them; a slow reader holds no memory of its own.

    Args:
      log: is told which of them are forgotten.
      retain_seconds: how long a finished request can still be read.
    """

    def __init__(self, log: CommitLog, retain_seconds: float) -> None:
        self.log = log
        self.finished = 0
        """Requests that ended."""
        self.tokens = 0
        """Output tokens that were committed."""
        self.idle = asyncio.Event()
        """Set while all are finished."""
        self.idle.set()
        self._retain = retain_seconds
        self._requests: dict[str, AcceptedRequest] = {}
        self._unfinished: dict[str, AcceptedRequest] = {}
        self._observer: UseObserver | None = None

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    def get(self, request_id: str) -> AcceptedRequest:
        """A retained request.

        Raises:
          UnknownRequest: there is none of that id.
        """
        try:
            return self._requests[request_id]
        except KeyError:
            raise UnknownRequest(
                f"request {request_id!r} is not known; finished requests are kept for {self._retain:g} s"
            ) from None

    def observe(self, observer: UseObserver) -> None:
        """See ``fleet.service.Service.observe``."""
        self._observer = observer
        for accepted in self._unfinished.values():
            observer.began(accepted.request.owner)

    def key_of(self, state: RequestState) -> int:
        """Key of the sequence that a state is of."""
        return self.get(state.request_id).sequences[state.choice].key

    def unfinished(self) -> dict[int, RequestState]:
        """Key of every sequence that has not ended to what of it is recorded."""
        return {
            sequence.key: told
            for accepted in self._unfinished.values()
            for sequence, told in zip(accepted.sequences, accepted.told, strict=True)
            if told.finish is None
        }

    def add(self, accepted: AcceptedRequest) -> None:
        """Takes up a request that the log is about to accept."""
        self._requests[accepted.request.request_id] = accepted
        self._unfinished[accepted.request.request_id] = accepted
        self.idle.clear()
        if self._observer is not None:
            self._observer.began(accepted.request.owner)

    def remove(self, accepted: AcceptedRequest) -> None:
        """The log did not accept it after all."""
        del self._requests[accepted.request.request_id]
        self._settle(accepted)
        accepted.refused = True
        accepted.changed.set()

    def recall(self, accepted: AcceptedRequest, now: float) -> None:
        """Takes up a request that the log has from before."""
        accepted.recalled = True
        self.add(accepted)
        if all(told.finish for told in accepted.told):
            accepted.finished_at = now
            self._settle(accepted)

    @property
    def running(self) -> int:
        """Requests that are not finished."""
        return len(self._unfinished)

    def committed(self, states: Iterable[RequestState], now: float) -> None:
        """These are recorded: wakes the streams of the requests whose sequences gained a token or ended."""
        for state in states:
            accepted = self._requests[state.request_id]
            gained = len(state.tokens) - len(accepted.told[state.choice].tokens)
            self.tokens += gained
            if self._observer is not None:
                self._observer.generated(accepted.request.owner, gained)
            accepted.told[state.choice] = state
            ended = state.finish is not None and accepted.finished_at is None
            if ended and all(told.finish for told in accepted.told):
                accepted.finished_at = now
                self.finished += 1
                self._settle(accepted)
            accepted.changed.set()
            accepted.changed = asyncio.Event()

    def _settle(self, accepted: AcceptedRequest) -> None:
        del self._unfinished[accepted.request.request_id]
        if self._observer is not None:
            self._observer.ended(accepted.request.owner)
        if not self._unfinished:
            self.idle.set()

    def purge(self, now: float) -> None:
        """Forgets requests that finished long enough ago and that nobody is reading."""
        for request_id, accepted in list(self._requests.items()):
            if accepted.finished_at is None or accepted.readers:
                continue
            if now - accepted.finished_at >= self._retain:
                del self._requests[request_id]
                self.log.forget(request_id)

    def stream(self, request_id: str, offsets: Sequence[int]) -> AsyncIterator[Delta]:
        """See ``fleet.service.GenerationService.stream``."""
        accepted = self.get(request_id)
        states = accepted.told
        if offsets and len(offsets) != len(states):
            raise InvalidRequest("offsets", f"one for each of the {len(states)} choices, got {len(offsets)}")
        seen = list(offsets) or [0] * len(states)
        for offset, state in zip(seen, states, strict=True):
            waits = accepted.recalled and state.finish is None  # for tokens that were lost, and are computed again
            most = state.sampling.max_tokens if waits else len(state.tokens)
            if not 0 <= offset <= most:
                raise InvalidRequest("offsets", f"must be in [0, {most}] for this choice, got {offset}")
        return self._follow(accepted, seen)

    async def _follow(self, accepted: AcceptedRequest, seen: list[int]) -> AsyncIterator[Delta]:
        """Deltas from the given token offsets on, until every choice has ended."""
        open_choices = set(range(len(seen)))
        accepted.readers += 1
        try:
            while open_choices:
                changed = accepted.changed
                for choice in sorted(open_choices):
                    state = accepted.told[choice]
                    if state.finish is not None and len(state.tokens) < seen[choice]:
                        raise InvalidRequest("offsets", f"the choice ended after {len(state.tokens)} tokens this time")
                    while len(state.tokens) > seen[choice] or state.finish is not None:
                        delta = _delta(state, seen[choice])
                        yield delta
                        seen[choice] += len(delta.tokens)
                        if delta.finish is not None:
                            open_choices.discard(choice)
                            break
                if open_choices:
                    await changed.wait()
                if accepted.refused:
                    name = accepted.request.request_id
                    raise UnknownRequest(f"request {name!r} could not be recorded; send it again")
        finally:
            accepted.readers -= 1


def _delta(state: RequestState, offset: int) -> Delta:
    """What of a sequence lies beyond ``offset`` tokens, or the first part of it."""
    text_start = state.text_ends[offset - 1] if offset else 0
    end = offset + DELTA_TOKENS
    if len(state.tokens) > end:
        tokens, logprobs = state.tokens[offset:end], state.logprobs[offset:end]
        return Delta(
            state.request_id, state.choice, offset, tokens, state.text[text_start : state.text_ends[end - 1]], logprobs
        )
    usage = Usage(len(state.prompt), len(state.tokens)) if state.finish is not None else None
    return Delta(
        state.request_id,
        state.choice,
        offset,
        state.tokens[offset:],
        state.text[text_start:],
        state.logprobs[offset:],
        state.finish,
        usage,
    )
