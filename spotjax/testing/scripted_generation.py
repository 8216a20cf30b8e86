"""The half of ``ScriptedService`` that generates: tokens are a pure function of prompt, seed, choice and position.

Owns acceptance, commits, streams and what a service that takes a dead one's place has of it.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, replace

from spotjax.engine.generation import Delta, GenerationRequest, Usage
from spotjax.engine.request import FinishReason, Logprobs
from spotjax.errors import Draining, InvalidRequest, LogUnavailable, Overloaded, RequestExists, UnknownRequest
from spotjax.fleet.service import UseObserver


def scripted_token(prompt: Sequence[int], seed: int, choice: int, position: int) -> int:
    """The token that ``ScriptedService`` generates there: always the byte of a lower-case letter."""
    key = repr((tuple(prompt), seed, choice, position)).encode()
    return ord("a") + hashlib.blake2b(key, digest_size=1).digest()[0] % 26


def scripted_tokens(request: GenerationRequest, choice: int) -> tuple[tuple[int, ...], str, FinishReason]:
    """All tokens of a choice, its text and why it ends, as the engine would have it: stop text and all."""
    sampling = request.sampling
    tokens: list[int] = []
    for position in range(sampling.max_tokens):
        tokens.append(scripted_token(request.prompt, sampling.seed, choice, position))
        text = bytes(tokens).decode()
        for stop in sampling.stop:
            if text.endswith(stop):
                return tuple(tokens), text.removesuffix(stop), FinishReason.STOP
        if tokens[-1] in sampling.stop_token_ids:
            return tuple(tokens), text[:-1], FinishReason.STOP
    return tuple(tokens), bytes(tokens).decode(), FinishReason.LENGTH


@dataclass
class ScriptedRequest:
    """A request and how far it is.

    Attributes:
      request: as taken.
      script: per choice: tokens, text, finish reason.
      committed: tokens that streams may show, the same for every choice (shorter ones ended before).
      ended: set when it was cancelled.
      recorded: it is accepted: a service that takes this one's place will have it.
      refused: it could not be recorded after all.
    """

    request: GenerationRequest
    script: list[tuple[tuple[int, ...], str, FinishReason]]
    committed: int = 0
    ended: FinishReason | None = None
    recorded: bool = False
    refused: bool = False

    @property
    def finished(self) -> bool:
        """Whether no more tokens come."""
        return self.ended is not None or self.committed >= max(len(tokens) for tokens, _, _ in self.script)

    def delta(self, choice: int, offset: int) -> Delta | None:
        """What a stream that has seen ``offset`` tokens of a choice gets next, or None if there is nothing yet."""
        tokens, text, reason = self.script[choice]
        known = min(self.committed, len(tokens))
        finish = reason if known == len(tokens) else self.ended
        if known == offset and finish is None:
            return None
        sampling = self.request.sampling
        entry = Logprobs(-1.0, tuple((token, -1.0 - token) for token in range(sampling.logprobs or 0)))
        return Delta(
            request_id=self.request.request_id,
            choice=choice,
            offset=offset,
            tokens=tokens[offset:known],
            text=text[offset:known],
            logprobs=() if sampling.logprobs is None else (entry,) * (known - offset),
            finish=finish,
            usage=None if finish is None else Usage(len(self.request.prompt), known),
        )


class Signal:
    """Wakes everybody who waits."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def fire(self) -> None:
        """Wakes those who wait now."""
        self._event.set()
        self._event = asyncio.Event()

    async def wait(self) -> None:
        """Waits for the next ``fire``."""
        await self._event.wait()


class ScriptedGeneration:
    """A ``GenerationService`` without engine or devices.

    Attributes:
      overloaded: refuse new requests as if the queue were full.
      requests: everything taken, by id.
    """

    def __init__(
        self,
        delay: Callable[[], Awaitable[object]] | None = None,
        record: Callable[[], Awaitable[object]] | None = None,
        log: Iterable[ScriptedRequest] = (),
    ) -> None:
        """A service that goes on with what is on record.

        Args:
          delay: awaited before each token of each request; a semaphore's ``acquire`` lets tests count them out.
          record: awaited before a request is on record; may raise ``LogUnavailable``.
          log: requests of a service that died; those that it had not recorded are lost.
        """
        self.overloaded = False
        self.requests = {state.request.request_id: replace(state) for state in log if state.recorded}
        self._delay, self._record = delay, record
        self._draining = False
        self._stopped = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = Signal()
        self._observer: UseObserver | None = None
        for state in self.requests.values():
            self._start(self._run(state))

    def submit(self, request: GenerationRequest) -> Awaitable[None]:
        """Takes a request; once it is on record, starts to commit its tokens."""
        if request.request_id in self.requests:
            raise RequestExists(request.request_id)
        if self._draining:
            raise Draining("the server is draining and takes no new requests; try another one")
        if self.overloaded:
            raise Overloaded("the queue is full", retry_after=1.5)
        script = [scripted_tokens(request, choice) for choice in range(request.n)]
        state = self.requests[request.request_id] = ScriptedRequest(request, script)
        if self._observer is not None:
            self._observer.began(request.owner)
        return self._start(self._accept(state))

    def accepted(self, request_id: str) -> GenerationRequest:
        """The request as it was taken."""
        return self._find(request_id).request

    def stream(self, request_id: str, offsets: Sequence[int] = ()) -> AsyncIterator[Delta]:
        """Output from ``offsets`` on."""
        state = self._find(request_id)
        if offsets and len(offsets) != state.request.n:
            raise InvalidRequest("offsets", f"one for each of the {state.request.n} choices, got {len(offsets)}")
        for choice, offset in enumerate(offsets):
            known = min(state.committed, len(state.script[choice][0]))
            if offset > known:
                raise InvalidRequest(f"offsets[{choice}]", f"must be in [0, {known}], got {offset}")
        return self._stream(state, list(offsets) or [0] * state.request.n)

    def cancel(self, request_id: str, reason: str = "cancelled") -> bool:
        """Ends a request."""
        state = self._find(request_id)
        if state.finished:
            return False
        state.ended = FinishReason(reason)
        self._changed.fire()
        return True

    def observe(self, observer: UseObserver) -> None:
        """Tells what requests use."""
        self._observer = observer
        for state in self.requests.values():
            if not state.finished:
                observer.began(state.request.owner)

    async def stop(self) -> None:
        """Ends every stream where it is, as a server does that goes away."""
        self._stopped = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._changed.fire()

    async def _finish(self, seconds: float) -> bool:
        """Takes no new requests and waits for the others."""
        self._draining = True
        _, late = await asyncio.wait(self._tasks, timeout=seconds) if self._tasks else (set(), set())
        return not late

    def _unfinished(self) -> int:
        return sum(not state.finished for state in self.requests.values())

    def _find(self, request_id: str) -> ScriptedRequest:
        if request_id not in self.requests:
            raise UnknownRequest(f"no request {request_id!r} is known: it never was, or it finished too long ago")
        return self.requests[request_id]

    def _start(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _accept(self, state: ScriptedRequest) -> None:
        if self._record is not None:
            try:
                await self._record()
            except LogUnavailable:
                del self.requests[state.request.request_id]
                state.refused = True
                self._tell_ended(state)
                self._changed.fire()
                raise
        state.recorded = True
        self._start(self._run(state))

    async def _run(self, state: ScriptedRequest) -> None:
        while not state.finished:
            if self._delay is not None:
                await self._delay()
            if not state.finished:
                state.committed += 1
                if self._observer is not None:
                    gained = sum(state.committed <= len(tokens) for tokens, _, _ in state.script)
                    self._observer.generated(state.request.owner, gained)
                self._changed.fire()
            await asyncio.sleep(0)
        self._tell_ended(state)

    def _tell_ended(self, state: ScriptedRequest) -> None:
        if self._observer is not None:
            self._observer.ended(state.request.owner)

    async def _stream(self, state: ScriptedRequest, offsets: list[int]) -> AsyncIterator[Delta]:
        unfinished = set(range(state.request.n))
        while unfinished:
            while not (ready := [delta for c in sorted(unfinished) if (delta := state.delta(c, offsets[c]))]):
                if self._stopped:
                    return
                if state.refused:
                    name = state.request.request_id
                    raise UnknownRequest(f"request {name!r} could not be recorded; send it again")
                await self._changed.wait()
            for delta in ready:
                offsets[delta.choice] += len(delta.tokens)
                if delta.finish is not None:
                    unfinished.discard(delta.choice)
                yield delta
