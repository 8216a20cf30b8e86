"""What tests of notice sources share: a source on a stand-in of its platform, in virtual time, and what it says."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx
from virtual_time import run

from spotjax.fleet.notices.notice import Notice, NoticeSource, Withdrawn
from spotjax.testing.metadata_faults import Fault, Request
from spotjax.testing.metadata_server import Metadata, MetadataTransport

PLATFORM = TypeVar("PLATFORM", bound=Metadata)
SOURCE = TypeVar("SOURCE", bound=NoticeSource)
EPOCH = 1.8e9
"""Unix seconds at monotonic second 0, so that both clocks tell the same."""
URL = "http://metadata"


def now() -> float:
    """Monotonic seconds."""
    return asyncio.get_running_loop().time()


def wall() -> float:
    """Unix seconds."""
    return EPOCH + now()


@dataclass
class Heard:
    """What a source said, and when, in monotonic seconds."""

    words: list[tuple[float, Notice | Withdrawn]] = field(default_factory=list)
    requests: list[tuple[float, Request]] = field(default_factory=list)

    def asked(self, path: str) -> list[float]:
        """When a path was asked for."""
        return [moment for moment, request in self.requests if request.path.endswith(path)]

    def kinds(self) -> list[str]:
        """Sources and kinds of what was said, in order."""
        return [
            f"{word.source} {word.kind}" if isinstance(word, Notice) else f"{word.source} withdrawn"
            for _, word in self.words
        ]


def listen(
    platform: Callable[[], PLATFORM],
    source: Callable[[httpx.AsyncClient], SOURCE],
    script: Callable[[PLATFORM, SOURCE, Heard], Coroutine[Any, Any, None]],
    fault: Callable[[Request], Fault | None] = lambda request: None,
) -> Heard:
    """Listens to a source while a script makes its platform say things; ends when the script does."""

    async def main() -> Heard:
        heard = Heard()
        metadata = platform()

        def spoil(request: Request) -> Fault | None:
            heard.requests.append((now(), request))
            return fault(request)

        async with httpx.AsyncClient(transport=MetadataTransport(metadata, spoil)) as client:
            listened = source(client)

            async def hear() -> None:
                while True:
                    word = await listened.wait()
                    heard.words.append((now(), word))

            hearing = asyncio.create_task(hear())
            playing = asyncio.create_task(script(metadata, listened, heard))
            try:
                await asyncio.wait([hearing, playing], return_when=asyncio.FIRST_COMPLETED)
                if hearing.done():
                    hearing.result()
                playing.result()
            finally:
                hearing.cancel()
                playing.cancel()
                await asyncio.gather(hearing, playing, return_exceptions=True)
                await listened.close()
        return heard

    return run(main())


async def until(condition: Callable[[], bool], seconds: float) -> None:
    """Waits until something holds, looking often."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)
