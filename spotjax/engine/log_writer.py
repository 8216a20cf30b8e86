"""The thread that writes the commit log: takes what was asked for, commits it, has the event loop told; tries again.

When writing fails (disk full, input/output error), requests of the group are refused and everything else is kept, in
order, and tried again until it is on disk. Nobody is told anything meanwhile.
"""

from __future__ import annotations

import logging
import queue
import sqlite3
import threading
import time
from collections.abc import Callable
from typing import Literal

from spotjax.engine.log_database import LogDatabase
from spotjax.engine.log_group import Accept, Group

log = logging.getLogger(__name__)

SYNC_SECONDS = 1.0
"""With durability ``interval``, what may be lost with the machine's power."""
RETRY_SECONDS = 0.5
"""Between tries to write when that failed."""
IDLE_SECONDS = 1.0
"""Without anything to record, after which what is left of forgotten requests is removed."""
Operation = Callable[[Group], None]
"""Adds what was asked for to a group."""


class LogWriter(threading.Thread):
    """Writes until it is told that nothing follows, and closes the database.

    Args:
      database: used by this thread alone from ``start`` on.
      durability: whether the once-a-second sync is needed.
      recorded: called from this thread with a group that is on disk.
      refused: called from this thread with requests that could not be recorded, and why.
      changed: called from this thread with why nothing can be written, or empty when it can again.
    """

    def __init__(
        self,
        database: LogDatabase,
        durability: Literal["step", "interval"],
        recorded: Callable[[Group], None],
        refused: Callable[[list[Accept], str], None],
        changed: Callable[[str], None],
    ) -> None:
        super().__init__(name="commit-log", daemon=True)
        self._database = database
        self._recorded, self._refused, self._changed = recorded, refused, changed
        self._queue: queue.SimpleQueue[Operation | None] = queue.SimpleQueue()
        self._group = Group()
        self._problem = ""
        self._closing = False
        self._untidy = True
        self._retry_at = 0.0
        self._sync_at: float | None = None
        self._interval = durability == "interval"

    def put(self, operation: Operation | None) -> None:
        """Queues what is to be recorded next, None if nothing follows. From any thread, never waits."""
        self._queue.put(operation)

    def run(self) -> None:
        """The thread."""
        while not self._closing:
            idle = not self._collect()
            if self._problem and time.monotonic() < self._retry_at and not self._closing:
                continue
            self._attempt(idle)
        if self._problem:
            kept = len(self._group.then)
            log.error("%s is closed; %d steps could not be written: %s", self._database, kept, self._problem)
            self._refused(self._group.refuse(), self._problem)
        try:
            self._database.close()
        except (sqlite3.Error, OSError) as error:
            log.warning("%s was not closed in order, which takes nothing from it: %s", self._database, error)

    def _collect(self) -> bool:
        """Waits for something to do and takes all that is queued. Returns whether there was something."""
        try:
            operation = self._queue.get(timeout=self._patience())
            while operation is not None:
                operation(self._group)
                operation = self._queue.get_nowait()
        except queue.Empty:
            return bool(self._group.then or self._group.accepts or self._group.writes)
        self._closing = True
        return True

    def _patience(self) -> float | None:
        """Seconds until there is something to do though nothing is asked for."""
        now = time.monotonic()
        if self._problem:  # a sync that is due waits, too
            return max(0.0, self._retry_at - now)
        waits = []
        if self._untidy:
            waits.append(IDLE_SECONDS)
        if self._sync_at is not None:
            waits.append(self._sync_at - now)
        return max(0.0, min(waits)) if waits else None

    def _attempt(self, idle: bool) -> None:
        """Writes the group and does what is due besides."""
        try:
            if self._group.writes or self._problem:
                self._database.write(self._group)
                self._untidy = True
                if self._interval and self._sync_at is None:
                    self._sync_at = time.monotonic() + SYNC_SECONDS
            group, self._group = self._group, Group()
            self._recorded(group)
            self._maintain(idle)
        except (sqlite3.Error, OSError) as error:
            self._failed(str(error))
        except Exception as error:  # a thread that ends here would leave everybody waiting, and nobody would know why
            if repr(error) != self._problem:  # it is tried again and again
                log.exception("%s: this should not happen", self._database)
            self._failed(repr(error))
        else:
            if self._problem:
                log.warning("%s is written again", self._database)
                self._problem = ""
                self._changed("")

    def _maintain(self, idle: bool) -> None:
        self._database.maintain()
        if idle and self._untidy:
            while self._queue.empty() and self._untidy:
                self._untidy = self._database.tidy()
        if self._sync_at is not None and (time.monotonic() >= self._sync_at or self._closing):
            self._database.sync()
            self._sync_at = None

    def _failed(self, problem: str) -> None:
        self._retry_at = time.monotonic() + RETRY_SECONDS
        if problem != self._problem:
            if not self._problem:
                log.error("%s cannot be written: %s; nothing is accepted or told until it can", self._database, problem)
            self._problem = problem
            self._changed(problem)
        if self._group.accepts:
            self._refused(self._group.refuse(), problem)
