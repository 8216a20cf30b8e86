"""Listens to all sources of notices of one machine at once, whatever becomes of any of them.

What their words come to is ``standing``'s to say.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

from spotjax.fleet.notices.notice import Notice, NoticeSource
from spotjax.fleet.notices.standing import Word

log = logging.getLogger("spotjax.notices")

RESTART_SECONDS = 1.0
"""Before a source that failed is listened to again."""


class Listener:
    """Passes on what sources say. For the thread of the running event loop.

    Args:
      heard: called with each word, at once.
      restart_seconds: after a source has failed.
    """

    def __init__(self, heard: Callable[[Word], None], restart_seconds: float = RESTART_SECONDS) -> None:
        self._heard, self._restart_seconds = heard, restart_seconds
        self._listening: dict[asyncio.Task[None], NoticeSource] = {}

    def add(self, sources: Iterable[NoticeSource]) -> None:
        """Listens to these, too."""
        for source in sources:
            self._listening[asyncio.create_task(self._listen(source), name=f"notices of {source.name}")] = source

    async def close(self) -> None:
        """Listens to nobody any more."""
        for task in self._listening:
            task.cancel()
        await asyncio.gather(*self._listening, return_exceptions=True)
        closing = (source.close() for source in self._listening.values())
        for problem in await asyncio.gather(*closing, return_exceptions=True):
            if isinstance(problem, Exception):
                log.error("a source of notices does not end in order", exc_info=problem)
        self._listening.clear()

    async def _listen(self, source: NoticeSource) -> None:
        """For ever: what a source should have borne with costs its notices for a moment, and nothing else."""
        while True:
            try:
                word = await source.wait()
                level = logging.WARNING if isinstance(word, Notice) else logging.INFO
                log.log(level, "%s: %s", word.source, said(word))
                self._heard(word)
            except Exception:
                log.exception("the source %s failed; listening again", source.name)
                await asyncio.sleep(self._restart_seconds)


def said(word: Word) -> str:
    """A word for people."""
    evidence = shortened(word.evidence)
    return f"{word.kind} ({evidence})" if isinstance(word, Notice) else f"notice withdrawn ({evidence})"


def shortened(evidence: str, length: int = 200) -> str:
    """Evidence as one line that a log can bear."""
    line = " ".join(evidence.split())
    return line if len(line) <= length else f"{line[: length - 3]}..."
