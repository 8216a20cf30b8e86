"""How requests come in: checked, recorded, queued; new ones from clients, and those that the log has from before."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass

from spotjax.engine.commit_log import CommitLog
from spotjax.engine.generation import GenerationRequest
from spotjax.engine.request import FinishReason, RequestState
from spotjax.engine.scheduler import Limits
from spotjax.engine.sequence import Sequence as ScheduledSequence
from spotjax.errors import CommitLogError, InvalidRequest, LogUnavailable, Overloaded, RequestExists
from spotjax.fleet.dispatch import Dispatcher
from spotjax.fleet.observer import Observer, Unobserved
from spotjax.fleet.requests import AcceptedRequest, RequestTable


@dataclass(frozen=True)
class ServiceLimits:
    """What the service accepts.

    Attributes:
      max_positions: longest prompt and output together, in tokens.
      pages: KV pages of one replica, page 0 included.
      page_size: positions per page.
      queue: sequences that may wait before requests are refused.
      retain_seconds: how long finished requests can be resumed.
      replica: limits of one replica by the depth of its pipeline.
      prefix_cache: whether prompts that begin alike share KV.
    """

    max_positions: int
    pages: int
    page_size: int
    queue: int
    retain_seconds: float
    replica: Callable[[int], Limits]
    prefix_cache: bool = False

    @property
    def longest(self) -> int:
        """Positions that a sequence can have: there must be pages for them, too."""
        return min(self.max_positions, (self.pages - 1) * self.page_size)


class Admission:
    """The way in.

    Args:
      log: where requests are recorded before they count as accepted.
      requests: those that are.
      dispatcher: queues their sequences.
      limits: what is accepted.
      end_tokens: tokens of the model that end generation.
      ended: told of sequences that ended before they began.
      clock: monotonic seconds.
      observer: is told of requests.
    """

    def __init__(
        self,
        log: CommitLog,
        requests: RequestTable,
        dispatcher: Dispatcher,
        limits: ServiceLimits,
        end_tokens: frozenset[int],
        ended: Callable[[Sequence[RequestState]], None],
        clock: Callable[[], float] = time.monotonic,
        observer: Observer | None = None,
    ) -> None:
        self._log, self._requests, self._dispatcher, self._limits = log, requests, dispatcher, limits
        self._end_tokens, self._ended = end_tokens, ended
        self._clock, self._observer = clock, observer or Unobserved()
        self._keys = itertools.count()
        self._recording: dict[str, asyncio.Task[None]] = {}

    @property
    def recording(self) -> int:
        """Sequences that are not queued yet."""
        return sum(self._requests.get(name).request.n for name in self._recording)

    def submit(self, request: GenerationRequest) -> Awaitable[None]:
        """Takes a request in; once awaited, it is never lost.

        Raises: see ``GenerationService.submit``.
        """
        self._check(request)
        states = [
            RequestState(request.request_id, choice, request.prompt, request.sampling, self._end_tokens)
            for choice in range(request.n)
        ]
        sequences = tuple(ScheduledSequence(next(self._keys), state) for state in states)
        recorded = self._log.accept(request, states, sequences[0].key)
        accepted = AcceptedRequest(request, sequences)
        self._requests.add(accepted)
        self._observer.arrived(request, self._clock())
        task = asyncio.create_task(self._queue(accepted, recorded))
        self._recording[request.request_id] = task
        return asyncio.shield(task)  # whoever waits may go away

    def cancel(self, accepted: AcceptedRequest, reason: FinishReason) -> None:
        """Ends all of a request's sequences, at the next token boundary at the latest."""
        unfinished = [sequence for sequence in accepted.sequences if sequence.state.finish is None]
        if accepted.request.request_id in self._recording:
            for sequence in unfinished:
                sequence.state = sequence.state.finished(reason)
        else:
            self._ended([s.state for s in unfinished if self._dispatcher.cancel(s, reason)])

    def recall(self, now: float) -> dict[int, ScheduledSequence]:
        """Takes in what the log has from before. Unfinished sequences wait; those without a client to come back end.

        Returns: those that wait, by key.

        Raises:
          CommitLogError: one can never end within the limits that there are now.
        """
        waiting: dict[int, ScheduledSequence] = {}
        for recorded in self._log.replay():
            sequences = tuple(ScheduledSequence(recorded.key + n, state) for n, state in enumerate(recorded.states))
            self._keys = itertools.count(recorded.key + len(sequences))
            accepted = AcceptedRequest(recorded.request, sequences)
            self._requests.recall(accepted, now)
            unfinished = {sequence.key: sequence for sequence in sequences if sequence.state.finish is None}
            if unfinished:
                self._observer.recalled(recorded.request, recorded.states)
            for sequence in unfinished.values():
                sequence.reached = sequence.state.length - 1 if sequence.state.tokens else 0
            self._dispatcher.parked += unfinished.values()
            if recorded.request.resumable:
                self._require_room(recorded.request, unfinished)
                waiting |= unfinished
            else:
                self.cancel(accepted, FinishReason.CANCELLED)
        return waiting

    def _require_room(self, request: GenerationRequest, unfinished: Collection[int]) -> None:
        if unfinished and _positions(request) > self._limits.longest:
            raise CommitLogError(
                f"request {request.request_id} of the commit log may take {_positions(request)} positions, the "
                f"settings allow {self._limits.longest}: start with the max_model_len, kv_pages and page_size of before"
            )

    async def _queue(self, accepted: AcceptedRequest, recorded: Awaitable[None]) -> None:
        """Queues a request's sequences once it is recorded, but for those that were cancelled meanwhile."""
        try:
            await recorded
        except LogUnavailable:
            self._requests.remove(accepted)
            self._observer.withdrawn(accepted.request.request_id)
            raise
        finally:
            del self._recording[accepted.request.request_id]
        for sequence in accepted.sequences:
            if sequence.state.finish is None:
                self._dispatcher.add(sequence)
        self._ended([sequence.state for sequence in accepted.sequences if sequence.state.finish is not None])

    def _check(self, request: GenerationRequest) -> None:
        """Refuses what cannot be taken, with the limit."""
        if request.request_id in self._requests:
            raise RequestExists(request.request_id)
        longest, asked = self._limits.longest, _positions(request)
        if asked > longest:
            raise InvalidRequest(
                "sampling.max_tokens",
                f"prompt ({len(request.prompt)}) and max_tokens ({request.sampling.max_tokens}) together must be at "
                f"most {longest} tokens, got {asked}",
            )
        if request.n > self._limits.queue:
            raise InvalidRequest("n", f"must be at most {self._limits.queue}, the length of the queue, got {request.n}")
        waiting = self._dispatcher.waiting + self.recording
        if waiting + request.n > self._limits.queue:
            raise Overloaded(
                f"{waiting} sequences are waiting, at most {self._limits.queue} may; try again later", retry_after=1.0
            )


def _positions(request: GenerationRequest) -> int:
    """That a sequence of it may take."""
    return len(request.prompt) + request.sampling.max_tokens
