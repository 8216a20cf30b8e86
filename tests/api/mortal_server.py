"""A server that dies at chosen points of its life and comes back on its port with what its log had."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Collection, Iterable, Sequence
from types import TracebackType
from typing import Self

from scripted_server import MODEL, Steps

from spotjax.api.server import ApiServer
from spotjax.engine.generation import Delta, GenerationRequest
from spotjax.testing.scripted_generation import ScriptedRequest
from spotjax.testing.scripted_service import ScriptedService

LOADING_SECONDS = 0.03


class MortalService(ScriptedService):
    """A scripted service that passes points of its server's life, and commits a token for each delta it sent."""

    def __init__(self, server: "MortalServer", log: Iterable[ScriptedRequest]) -> None:
        self._server, self._steps = server, Steps()
        super().__init__(delay=self._steps, record=lambda: server.passes("taken"), log=log)

    def submit(self, request: GenerationRequest) -> Awaitable[None]:
        return self._submitted(super().submit(request))

    async def _submitted(self, recorded: Awaitable[None]) -> None:
        await recorded
        await self._server.passes("recorded")

    def stream(self, request_id: str, offsets: Sequence[int] = ()) -> AsyncIterator[Delta]:
        return self._sent(super().stream(request_id, offsets))

    async def _sent(self, deltas: AsyncIterator[Delta]) -> AsyncIterator[Delta]:
        await self._server.passes("opened")
        self._steps.let(1)
        async for delta in deltas:
            yield delta
            await self._server.passes("sent")
            self._steps.let(1)


class MortalServer:
    """Lives again and again.

    Attributes:
      address: the same in every life.
      points: what all lives passed so far: ``taken`` (a request, not on record), ``recorded`` (not told), ``opened``
        (a stream, told to be accepted), ``sent`` (a delta).
      loses_log: it comes back with nothing.
    """

    def __init__(self, deaths: Collection[int] = (), loses_log: bool = False) -> None:
        """A server that dies when it has passed so many points."""
        self.address = "127.0.0.1:0"
        self.points: list[str] = []
        self.loses_log = loses_log
        self._deaths = frozenset(deaths)
        self._next_life: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        await self.live([])
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._next_life is not None:
            await self._next_life
        await self.die()

    async def live(self, log: Iterable[ScriptedRequest]) -> None:
        """Answers, then loads, then serves."""
        self.server = ApiServer()
        self.address = f"127.0.0.1:{await self.server.start(self.address)}"
        await asyncio.sleep(LOADING_SECONDS if self.points else 0)
        self.service = MortalService(self, log)
        await self.server.attach(self.service, MODEL)

    async def die(self) -> list[ScriptedRequest]:
        """Answers nobody any more; returns what is on record."""
        log = [] if self.loses_log else list(self.service.requests.values())
        await self.server.stop()
        await self.service.stop()
        return log

    async def passes(self, point: str) -> None:
        """Goes on, or dies here."""
        self.points.append(point)
        if len(self.points) - 1 in self._deaths:
            self._next_life = asyncio.create_task(self._live_again())
            await asyncio.Event().wait()  # the dead do nothing; stopping the server ends this

    async def _live_again(self) -> None:
        await self.live(await self.die())
