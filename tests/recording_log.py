"""A commit log that lives in memory but outlives its controller, so that another one can go on from it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace

from spotjax.engine.commit_log import RecordedRequest
from spotjax.engine.generation import GenerationRequest
from spotjax.engine.request import RequestState
from spotjax.errors import LogUnavailable


class RecordingLog:
    """Records in order, each thing after a number of turns of the event loop; then says so.

    Args:
      delay: turns that the next thing takes.

    Attributes:
      recorded: every request that was accepted and not forgotten, as it would be found after a crash.
      full: nothing can be recorded while this is set.
      told: output tokens of every sequence that may have been told to clients.
    """

    def __init__(self, delay: Callable[[], int] = lambda: 0) -> None:
        self.identity, self.epoch, self.full = "service", 0, False
        self.recorded: dict[str, RecordedRequest] = {}
        self.told: dict[tuple[str, int], tuple[int, ...]] = {}
        self.on_change: Callable[[], None] = lambda: None
        self._delay = delay
        self._opened: tuple[RecordedRequest, ...] = ()
        self._queue: deque[tuple[Callable[[], None], Callable[[], None]]] = deque()
        self._writing: asyncio.Task[None] | None = None

    @property
    def problem(self) -> str:
        return "the disk is full" if self.full else ""

    def states(self, name: str) -> tuple[RequestState, ...]:
        return self.recorded[name].states

    def after_a_crash(self) -> RecordingLog:
        """What another controller finds: nothing that was only asked for."""
        other = RecordingLog(self._delay)
        other.epoch, other.recorded, other.told = self.epoch, dict(self.recorded), dict(self.told)
        other._opened = tuple(self.recorded.values())
        self._queue.clear()
        if self._writing is not None:
            self._writing.cancel()
        return other

    def accept(self, request: GenerationRequest, states: Sequence[RequestState], key: int) -> Awaitable[None]:
        if self.full:
            raise LogUnavailable(self.problem)
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def record() -> None:
            self.recorded[request.request_id] = RecordedRequest(request, tuple(states), key)

        def tell() -> None:
            if not done.done():
                done.set_result(None)

        self._later(record, tell)
        return done

    def append(self, states: Sequence[RequestState], then: Callable[[], None]) -> None:
        def record() -> None:
            for state in states:
                entry = self.recorded[state.request_id]
                before = entry.states[state.choice]
                assert before.finish is None, "a sequence goes on after its end"
                assert state.tokens[: len(before.tokens)] == before.tokens, "a committed token changed"
                of = tuple(state if one.choice == state.choice else one for one in entry.states)
                self.recorded[state.request_id] = replace(entry, states=of)

        def tell() -> None:
            for state in states:
                known = self.told.get((state.request_id, state.choice), ())
                assert state.tokens[: len(known)] == known, "a token that a client has seen changed"
                self.told[state.request_id, state.choice] = state.tokens
            then()

        self._later(record, tell)

    def forget(self, request_id: str) -> None:
        self._later(lambda: self.recorded.pop(request_id, None), lambda: None)

    def begin_epoch(self, epoch: int) -> None:
        assert epoch >= self.epoch, "epochs count upwards"
        self.epoch = epoch

    def replay(self) -> Iterator[RecordedRequest]:
        return iter(self._opened)

    async def close(self) -> None:
        while self._writing is not None and not self._writing.done():
            await asyncio.sleep(0)

    def _later(self, record: Callable[[], object], tell: Callable[[], None]) -> None:
        if not self._queue and (self._writing is None or self._writing.done()) and not self.full:
            turns = self._delay()
            if not turns:
                record()
                tell()
                return
            self._queue.append((lambda: record() and None, tell))
            self._writing = asyncio.create_task(self._write(turns))
            return
        self._queue.append((lambda: record() and None, tell))
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write(0))

    async def _write(self, turns: int) -> None:
        while self._queue:
            for _ in range(turns):
                await asyncio.sleep(0)
            while self.full:
                await asyncio.sleep(0)
            record, tell = self._queue.popleft()
            record()
            turns = self._delay()
            if turns % 2:  # recorded, but nobody knows yet
                await asyncio.sleep(0)
            tell()
