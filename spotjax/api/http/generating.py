"""What a call over HTTP generates: one request of ``GenerationService`` for each prompt, taken in or taken up again.

Owns names: a call with an ``Idempotency-Key`` has its requests named after the key and the caller. Whoever sends it
again, to this server or to one that took its place on the same log, gets the same requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from starlette.requests import Request

from spotjax.api.access.caller_service import CallerService
from spotjax.api.access.current import current_caller
from spotjax.api.errors import Unavailable
from spotjax.api.generation import abandon
from spotjax.api.http.errors import KeyReused, RequestCancelled
from spotjax.api.http.progress import FIELD, Progress
from spotjax.engine.generation import Delta, GenerationRequest
from spotjax.engine.request import FinishReason
from spotjax.engine.structure import StructureFailed
from spotjax.errors import InvalidRequest, RequestExists, UnknownRequest

log = logging.getLogger(__name__)

KEY = "Idempotency-Key"
MAX_KEY = 255
STOPPED = "the server stopped before the request finished"


@dataclass(frozen=True)
class Sender:
    """What headers say of a call that may have been sent before.

    Attributes:
      key: of the client for this call; empty for none.
      event: id of the last event that it has; empty for none.
    """

    key: str = ""
    event: str = ""

    @classmethod
    def of(cls, request: Request, streams: bool) -> Sender:
        """Raises InvalidRequest for what is no key, and for events of what is no stream."""
        key, event = request.headers.get(KEY, ""), request.headers.get(FIELD, "")
        if len(key) > MAX_KEY or not key.isascii() or not key.isprintable():
            raise InvalidRequest(KEY, f"must be 1 to {MAX_KEY} printable characters of ASCII")
        if event and not streams:
            raise InvalidRequest(FIELD, "has no meaning without stream")
        return cls(key, event)

    def base(self) -> str:
        """Names the call: its requests are named after it."""
        if not self.key:
            return secrets.token_hex(16)
        told = f"{current_caller().name}\0{self.key}".encode()
        return f"k{hashlib.blake2b(told, digest_size=16).hexdigest()}"


class Generating:
    """The requests of one call.

    Args:
      service: as the caller sees it.
      requests: as the body asks for, one for each prompt.
      progress: what of their output the client has.
      taken_up: they were sent before, and the client has events of them.
      seeded: the client chose the seed.
    """

    def __init__(
        self,
        service: CallerService,
        requests: Sequence[GenerationRequest],
        progress: Progress,
        *,
        taken_up: bool = False,
        seeded: bool = True,
    ) -> None:
        self.progress = progress
        self._service, self._requests, self._taken_up, self._seeded = service, requests, taken_up, seeded
        self._finished = False
        self._sent: dict[str, asyncio.Future[None]] = {}
        self._streams: list[AsyncIterator[Delta]] = []

    async def accept(self) -> None:
        """Takes the requests in; returns when they are on record. Those that are there already are taken up.

        Raises:
          KeyReused: one of them is there, and asks for something else.
          UnknownRequest: the client has events of one that is not there.
          SpotjaxError: see ``GenerationService.submit``.
        """
        try:
            for request in self._requests:
                self._submit(request)
            await asyncio.gather(*map(asyncio.shield, self._sent.values()))  # who leaves undoes nothing
        except BaseException:
            self.leave()
            raise
        n = self._requests[0].n
        self._streams = [
            self._service.stream(request.request_id, [max(0, t) for t in self.progress.tokens[at * n : (at + 1) * n]])
            for at, request in enumerate(self._requests)
        ]
        for request in self._requests:
            log.info("accepted", extra={"request": request.request_id, "prompt_tokens": len(request.prompt)})

    def _submit(self, request: GenerationRequest) -> None:
        name = request.request_id
        if not self._taken_up:
            with contextlib.suppress(RequestExists):
                self._sent[name] = asyncio.ensure_future(self._service.submit(request))
                return
        known = self._service.accepted(name)
        if not same(known, request, self._seeded):
            raise KeyReused(FIELD if self._taken_up else KEY, f"is of request {name}, whose body was another one")

    def leave(self) -> None:
        """The client is gone, or has it all: ends what nobody will ask for."""
        if not self._finished and not self._requests[0].resumable:
            for name, recorded in self._sent.items():
                recorded.add_done_callback(partial(self._abandon, name))

    def _abandon(self, name: str, recorded: asyncio.Future[None]) -> None:
        if not recorded.cancelled() and recorded.exception() is None:
            abandon(self._service, name, FinishReason.CANCELLED)

    async def deltas(self) -> AsyncGenerator[tuple[int, Delta], None]:
        """Output that the client does not have, with the number of the choice among those of all prompts.

        Raises:
          Unavailable: the server stops before the requests are finished.
          RequestCancelled: somebody ended one of them.
          StructureFailed: the output cannot be kept to its structure any further.
        """
        n = self._requests[0].n
        unfinished = set(range(n * len(self._requests)))
        async with contextlib.aclosing(merged(self._streams)) as following:
            async for at, delta in following:
                if delta.finish is not None:
                    unfinished.discard(at * n + delta.choice)
                    if delta.finish in (FinishReason.CANCELLED, FinishReason.DEADLINE):
                        raise RequestCancelled(f"request {delta.request_id} was ended: {delta.finish}")
                    if delta.finish is FinishReason.ERROR:
                        raise StructureFailed(f"request {delta.request_id}: its structure could not be followed")
                yield at * n + delta.choice, delta
        if unfinished:
            raise Unavailable(STOPPED)
        self._finished = True

    async def seen(self, choice: int) -> tuple[int, ...]:
        """The tokens of a choice that the client has."""
        n, count = self._requests[0].n, max(0, self.progress.tokens[choice])
        tokens: tuple[int, ...] = ()
        async with closed(self._service.stream(self._requests[choice // n].request_id)) as deltas:
            while len(tokens) < count:
                if (delta := await anext(deltas, None)) is None:
                    raise Unavailable(STOPPED)
                if delta.choice == choice % n:
                    tokens += delta.tokens
        return tokens[:count]


def require_number(service: CallerService, base: str, prompts: int) -> None:
    """Raises KeyReused if the call of this name came with one prompt instead of several, or with more of them."""
    for other in [base, f"{base}-{prompts}"] if prompts > 1 else [f"{base}-0"]:
        with contextlib.suppress(UnknownRequest):
            service.accepted(other)
            raise KeyReused(KEY, f"is of a body with another number of prompts than {prompts}")


def same(known: GenerationRequest, sent: GenerationRequest, seeded: bool) -> bool:
    """Whether two requests ask for the same; their seeds count if they were not drawn."""
    sampling = sent.sampling if seeded else replace(sent.sampling, seed=known.sampling.seed)
    return (known.prompt, known.n, known.sampling) == (sent.prompt, sent.n, sampling)


@contextlib.asynccontextmanager
async def closed(stream: AsyncIterator[Delta]) -> AsyncIterator[AsyncIterator[Delta]]:
    """The stream, which is followed no longer at the end."""
    try:
        yield stream
    finally:
        if isinstance(stream, AsyncGenerator):
            await stream.aclose()


async def merged(streams: Sequence[AsyncIterator[Delta]]) -> AsyncGenerator[tuple[int, Delta], None]:
    """Deltas of all streams as they come, each with the number of its stream. No more than one of each waits."""
    if len(streams) == 1:
        async with closed(streams[0]) as only:
            async for delta in only:
                yield 0, delta
        return
    ready: asyncio.Queue[tuple[int, Delta | Exception | None]] = asyncio.Queue(maxsize=1)

    async def follow(at: int) -> None:
        end = None
        try:
            async with closed(streams[at]) as stream:
                async for delta in stream:
                    await ready.put((at, delta))
        except Exception as error:
            end = error
        await ready.put((at, end))

    tasks = [asyncio.create_task(follow(at)) for at in range(len(streams))]
    try:
        left = len(streams)
        while left:
            at, told = await ready.get()
            if isinstance(told, Exception):
                raise told
            if told is None:
                left -= 1
            else:
                yield at, told
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
