"""What happens to requests, steps and meshes, as counts and histograms. A ``fleet.observer.Observer``.

Plain numbers, changed on the event loop's thread and read there when somebody scrapes. Follows every sequence that has
not ended, because a latency is between two events of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from spotjax.engine.generation import GenerationRequest
from spotjax.engine.request import FinishReason, RequestState
from spotjax.fleet.observer import Migration
from spotjax.telemetry import metrics
from spotjax.telemetry.histogram import Histogram

COMPLETE = (FinishReason.STOP, FinishReason.LENGTH)
"""Ends that are not the client's doing."""


@dataclass(slots=True)
class Times:
    """When what happened to a sequence, in monotonic seconds.

    Attributes:
      begun: a replica took it up.
      first, last: its first and its newest token that this process committed.
      tokens: committed so far, those of an earlier run included.
    """

    begun: float | None = None
    first: float | None = None
    last: float | None = None
    tokens: int = 0


@dataclass(slots=True)
class Followed:
    """A request that has not ended.

    Attributes:
      arrived: monotonic seconds; None if it came to an earlier process.
      times: of its sequences, by choice.
      open: sequences that have not ended.
    """

    arrived: float | None
    times: list[Times]
    open: int


class Traces(Protocol):
    """Is told of the few events that spans are made of. See ``telemetry.tracing``."""

    def arrived(self, request: GenerationRequest, now: float) -> None:
        """See ``EngineObserver.arrived``."""
        ...

    def withdrawn(self, request_id: str) -> None:
        """See ``EngineObserver.withdrawn``."""
        ...

    def ended(self, state: RequestState, times: Times, now: float, last: bool) -> None:
        """A sequence has ended; ``last`` if it was the last of its request."""
        ...

    def migrated(self, migration: Migration) -> None:
        """See ``Observer.migrated``."""
        ...


class Recorder:
    """Counts.

    Args:
      traces: is told of what makes spans, if anybody wants them.

    Attributes:
      prompt_tokens, generation_tokens: see the metrics of these names.
      success: sequences that ended, by finish reason.
      queue_time, first_token, inter_token, whole: latencies of sequences.
      steps: of prefill steps and of decode steps.
      commits: from a step's result to the log having it.
      migrations: by path and outcome.
      migration_time, migration_pause: of those that led to a new mesh.
      migration_bytes: by source and content.
      resumed: sequences that were stopped and went on.
    """

    def __init__(self, traces: Traces | None = None) -> None:
        self._traces = traces
        self._followed: dict[str, Followed] = {}
        self.prompt_tokens = self.generation_tokens = self.resumed = 0
        self.success: Counter[FinishReason] = Counter()
        self.queue_time = Histogram(metrics.QUEUE)
        self.first_token, self.inter_token = Histogram(metrics.FIRST_TOKEN), Histogram(metrics.BETWEEN_TOKENS)
        self.whole, self.commits = Histogram(metrics.WHOLE), Histogram(metrics.COMMIT)
        self.steps = {True: Histogram(metrics.STEP), False: Histogram(metrics.STEP)}
        self.migrations: Counter[tuple[str, str]] = Counter()
        self.migration_time, self.migration_pause = Histogram(metrics.MIGRATION), Histogram(metrics.MIGRATION)
        self.migration_bytes: Counter[tuple[str, str]] = Counter()

    # -- an Observer

    def arrived(self, request: GenerationRequest, now: float) -> None:
        """See ``EngineObserver.arrived``."""
        self._followed[request.request_id] = Followed(now, [Times() for _ in range(request.n)], request.n)
        if self._traces is not None:
            self._traces.arrived(request, now)

    def recalled(self, request: GenerationRequest, states: Sequence[RequestState]) -> None:
        """See ``EngineObserver.recalled``."""
        times = [Times(tokens=len(state.tokens)) for state in states]
        self._followed[request.request_id] = Followed(None, times, sum(state.finish is None for state in states))

    def withdrawn(self, request_id: str) -> None:
        """See ``EngineObserver.withdrawn``."""
        self._followed.pop(request_id, None)
        if self._traces is not None:
            self._traces.withdrawn(request_id)

    def begun(self, state: RequestState, now: float) -> None:
        """See ``EngineObserver.begun``."""
        followed = self._followed.get(state.request_id)
        if followed is None or (times := followed.times[state.choice]).begun is not None:
            return
        times.begun = now
        if not times.tokens:
            self.prompt_tokens += len(state.prompt)
            if followed.arrived is not None:
                self.queue_time.observe(now - followed.arrived)

    def stepped(self, prefill: bool, seconds: float) -> None:
        """See ``EngineObserver.stepped``."""
        self.steps[prefill].observe(seconds)

    def recorded(self, seconds: float) -> None:
        """See ``EngineObserver.recorded``."""
        self.commits.observe(seconds)

    def committed(self, states: Sequence[RequestState], now: float) -> None:
        """See ``EngineObserver.committed``. Most sequences of a step have waited equally long."""
        since, alike = now, 0
        for state in states:
            if (followed := self._followed.get(state.request_id)) is None:
                continue
            times = followed.times[state.choice]
            if new := len(state.tokens) - times.tokens:
                times.tokens += new
                self.generation_tokens += new
                last, times.last = times.last, now
                if last is None:
                    self._first(followed, times, new, now)
                elif last == since:
                    alike += new
                else:
                    self.inter_token.observe(now - since, alike)
                    since, alike = last, new
            if state.finish is not None:
                self._ended(followed, times, state, now)
        self.inter_token.observe(now - since, alike)

    def migrated(self, migration: Migration) -> None:
        """See ``Observer.migrated``."""
        self.migrations[migration.path, migration.outcome] += 1
        moved = migration.bytes
        self.migration_bytes["instance", "parameters"] += moved.parameters_moved
        self.migration_bytes["checkpoint", "parameters"] += moved.parameters_loaded
        self.migration_bytes["instance", "kv"] += moved.kv_precopied + moved.kv_moved
        if migration.outcome == "switched":
            self.migration_time.observe(migration.ended - migration.began)
            self.migration_pause.observe(migration.pause_seconds)
            self.resumed += len(migration.paused)
        if self._traces is not None:
            self._traces.migrated(migration)

    # -- the rest

    def _first(self, followed: Followed, times: Times, new: int, now: float) -> None:
        """The first that this process commits of a sequence."""
        times.first = now
        if followed.arrived is not None and times.tokens == new:
            self.first_token.observe(now - followed.arrived)

    def _ended(self, followed: Followed, times: Times, state: RequestState, now: float) -> None:
        assert state.finish is not None, "it has ended"
        self.success[state.finish] += 1
        if followed.arrived is not None and state.finish in COMPLETE:
            self.whole.observe(now - followed.arrived)
        followed.open -= 1
        if self._traces is not None:
            self._traces.ended(state, times, now, not followed.open)
        if not followed.open:
            del self._followed[state.request_id]
