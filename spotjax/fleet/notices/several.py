"""Several sources as one: whatever any of them says is said, nothing is lost while nobody listens."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from spotjax.fleet.notices.notice import Notice, NoticeSource, Withdrawn


class Several:
    """A ``NoticeSource`` of several that speak for themselves; what they mean together is not decided here."""

    def __init__(self, name: str, sources: Sequence[NoticeSource]) -> None:
        self._name, self._sources = name, tuple(sources)
        self._listening: dict[NoticeSource, asyncio.Task[Notice | Withdrawn]] = {}

    @property
    def name(self) -> str:
        """Of all of them together."""
        return self._name

    async def wait(self) -> Notice | Withdrawn:
        """The next thing that one of them says. Cancelling it does not stop them from listening."""
        for source in self._sources:
            if source not in self._listening:
                self._listening[source] = asyncio.create_task(source.wait(), name=f"notices of {source.name}")
        await asyncio.wait(self._listening.values(), return_when=asyncio.FIRST_COMPLETED)
        speaker = next(source for source, task in self._listening.items() if task.done())
        return self._listening.pop(speaker).result()

    async def close(self) -> None:
        """Stops listening and closes the sources."""
        tasks = tuple(self._listening.values())
        self._listening.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for source in self._sources:
            await source.close()
