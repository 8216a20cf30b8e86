"""What a source does about trouble: says it once, tries again, more slowly while it lasts. And whom it asks with what.

Nothing here takes trouble for a notice, and none lasts so long between two attempts that a notice would be missed.
"""

from __future__ import annotations

import asyncio
import logging
import random

import httpx

log = logging.getLogger("spotjax.notices")

METADATA = "http://169.254.169.254"
"""Where all large clouds have their metadata servers; on Compute Engine that is metadata.google.internal, too. Sources
take it as ``base_url``, without a path."""
SHORTEST_SECONDS, LONGEST_SECONDS = 0.2, 2.0
"""Between two attempts. The shortest notice that a cloud promises is 30 s."""
CONNECT_SECONDS = 1.0
"""The metadata server is on the machine's own host."""
ANSWERS_TO_TRUST = 30
"""In a row, after which a server that gave trouble is taken to be well again."""
ANSWER_SECONDS = 5.0
"""For an answer that is not to be waited for."""


class Patience:
    """The pauses of one source between attempts.

    Args:
      source: as in ``Notice.source``; for logs.
      shortest, longest: seconds; the first pause and the last, doubling from one to the other.
    """

    def __init__(self, source: str, shortest: float = SHORTEST_SECONDS, longest: float = LONGEST_SECONDS) -> None:
        self._source, self._shortest, self._longest = source, shortest, longest
        self._logged: set[str] = set()
        self._answers, self._pause = 0, shortest

    async def after(self, trouble: str, at_least: float = 0.0, detail: str = "") -> None:
        """Logs trouble unless it was logged, and pauses: so long, but no longer than the longest.

        Args:
          trouble: of which kind it is.
          at_least: seconds that the server asks for.
          detail: what is logged, if not the kind.
        """
        if trouble not in self._logged:
            log.warning("%s cannot be asked for notices, trying again: %s", self._source, detail or trouble)
            self._logged.add(trouble)
        self._answers = 0
        pause = max(self._pause * random.uniform(0.5, 1.0), min(at_least, self._longest))
        self._pause = min(2 * self._pause, self._longest)
        await asyncio.sleep(pause)

    def over(self) -> None:
        """An answer has come. Trouble that comes and goes is over, for logs, after so many answers in a row."""
        self._answers += 1
        self._pause = self._shortest
        if self._logged and self._answers >= ANSWERS_TO_TRUST:
            log.info("%s can be asked for notices again", self._source)
            self._logged.clear()


def metadata_client() -> httpx.AsyncClient:
    """For metadata servers: not by any proxy, and not where a redirection leads; whoever redirects is none."""
    timeout = httpx.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS)
    return httpx.AsyncClient(timeout=timeout, follow_redirects=False, trust_env=False)
