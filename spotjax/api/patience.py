"""How long a client waits for a server that went away or is starting, and what it tells about that."""

from __future__ import annotations

import logging
import random
import time
from dataclasses import dataclass

from spotjax.api.errors import Unavailable, Unreachable
from spotjax.errors import ConfigError

log = logging.getLogger("spotjax.client")
"""Both clients' waits, at level INFO."""

DEFAULT_PATIENCE = 120.0
"""Seconds: a controller that starts anew has read its log and loaded its model by then."""

FIRST_WAIT = 0.1
LONGEST_WAIT = 2.0


def backoff(failures: int) -> float:
    """Seconds to wait after the ``failures``-th failure in a row: doubling, bounded, jittered by a quarter."""
    return min(FIRST_WAIT * 2.0 ** min(failures - 1, 16), LONGEST_WAIT) * random.uniform(0.75, 1.25)


@dataclass(slots=True)
class Patience:
    """How long to go on trying.

    Attributes:
      seconds: from the first of several failures in a row until the last attempt, 0 or more; 0 never tries again.
      request_id: what is tried is for this request.
      failures: how many there were in a row.
      since: monotonic time of the first of them.
      told: it was told that we wait, and not yet that this is over.
    """

    seconds: float
    request_id: str = ""
    failures: int = 0
    since: float = 0.0
    told: bool = False

    def __post_init__(self) -> None:
        if not self.seconds >= 0:
            raise ConfigError(f"patience must be 0 or more seconds, got {self.seconds:g}")

    def wait_after(self, error: Exception) -> float:
        """Counts a failure. Seconds to wait before the next attempt; raises the error if there is to be none."""
        now = time.monotonic()
        if self.failures == 0:
            self.since = now
        left = self.since + self.seconds - now
        if left <= 0:
            raise error
        self.failures += 1
        if isinstance(error, Unavailable) and not self.told:
            self.told = True
            reason = f"waiting for the server: {error}"
            self._tell("connection lost; waiting for the server" if isinstance(error, Unreachable) else reason)
        return min(backoff(self.failures), left)

    def tell_end(self, message: str) -> None:
        """Tells that a wait is over, if there was one."""
        if self.told:
            self.told = False
            self._tell(message)

    def renew(self) -> None:
        """Something worked: the next failure is the first one in a row."""
        self.failures = 0

    def _tell(self, message: str) -> None:
        log.info(message, extra={"request": self.request_id})
