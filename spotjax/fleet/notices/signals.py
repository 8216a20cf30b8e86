"""SIGTERM and SIGINT as notice: what Kubernetes, Slurm, systemd, ``docker stop`` and a person at the keyboard send."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable

from spotjax.fleet.notices.notice import Notice, NoticeKind, Withdrawn

NUMBERS = (signal.SIGTERM, signal.SIGINT)
SAME_SECONDS = 0.5
"""Within which signals are one wish: a launcher passes on what its job's processes were sent as well."""


def end_at_once() -> None:
    """Ends this process without anything further."""
    os._exit(1)


class SignalSource:
    """The first signal is the notice, a later one is no wish to wait. Handles them from its making until it is closed.

    Args:
      instance: that the notice is about.
      clock: monotonic seconds.
      grace_seconds: that the machine, or this process, lives after the signal.
      again: called at every further signal that is not the first once more.
    """

    name = "signal"

    def __init__(
        self,
        instance: str,
        clock: Callable[[], float],
        grace_seconds: float,
        again: Callable[[], None] = end_at_once,
    ) -> None:
        self._instance, self._clock, self._grace, self._again = instance, clock, grace_seconds, again
        self._loop = asyncio.get_running_loop()
        self._came = asyncio.Queue[Notice]()
        self._noticed_at: float | None = None
        for number in NUMBERS:
            self._loop.add_signal_handler(number, self._received, number)

    async def wait(self) -> Notice | Withdrawn:
        """See ``NoticeSource.wait``."""
        return await self._came.get()

    async def close(self) -> None:
        """Leaves signals to their default handling."""
        for number in NUMBERS:
            self._loop.remove_signal_handler(number)

    def _received(self, number: signal.Signals) -> None:
        now = self._clock()
        if self._noticed_at is None:
            self._noticed_at = now
            notice = Notice(self.name, NoticeKind.PREEMPT, self._instance, now + self._grace, number.name)
            self._came.put_nowait(notice)
        elif now - self._noticed_at > SAME_SECONDS:
            self._again()
