"""Saves KV pages of sequences in the background, so that after a deadline all that was finished can be used.

Frames come as they go to a ``BackupStore`` (``worker.backup`` can push them here too) and are gathered into units, as
saving one costs tens of milliseconds. ``saved_kv`` reads them.
"""

from __future__ import annotations

import concurrent.futures
import logging
import re
import threading
from collections import deque

import numpy as np
from etils import epath

from spotjax.checkpoint.kv_format import KvFormat
from spotjax.checkpoint.kv_units import UnitBuffer
from spotjax.checkpoint.saves import make_private
from spotjax.checkpoint.unit_saver import UnitSaver
from spotjax.errors import CheckpointError, ConfigError
from spotjax.protocol.backup import BackupHeader

log = logging.getLogger(__name__)

UNIT_BYTES = 32 << 20
"""Of KV in a unit: enough for most of the disk's bandwidth, little enough to lose at a deadline."""
_WAITING_UNITS = 1
"""Complete ones in memory, the one that is being saved included, before callers are held up."""


class KvWriter:
    """Saves KV pages into a directory that other writers save into too, each under its own name. Thread-safe.

    Memory: at most three units, and the copy that Orbax makes of the one it saves, if callers wait for each frame's
    future. A writer that could not save a unit takes nothing more: what comes later is of no use without it.

    Args:
      directory: of all writers; any path that etils and tensorstore know.
      name: of this writer; no other process may use it at the same time.
      form: what comes. Frames of another service come late and are dropped.
      unit_bytes: of KV in a unit.

    Raises:
      ConfigError: the name cannot be that of a directory, or this process is one of several of a TPU slice.

    Attributes:
      saved_bytes: of KV so far.
    """

    def __init__(self, directory: epath.PathLike, name: str, form: KvFormat, unit_bytes: int = UNIT_BYTES) -> None:
        if not re.fullmatch(r"[\w-][\w.-]*", name):
            raise ConfigError(f"{name!r} cannot be the name of a directory")
        self._directory = epath.Path(directory) / name
        self._form, self._rows = form, max(1, unit_bytes // form.row_bytes)
        self.saved_bytes = 0
        self._saver = UnitSaver()
        self._open: UnitBuffer | None = None
        self._complete: deque[UnitBuffer] = deque()
        self._held_up: list[concurrent.futures.Future[None]] = []
        self._problem: CheckpointError | None = None
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="kv-writer", daemon=True)
        self._thread.start()

    def put(self, header: BackupHeader, content: np.ndarray) -> concurrent.futures.Future[None]:
        """Takes a copy of pages.

        Args:
          header: which.
          content: bytes as ``KvMover.host_pages`` lays them out.

        Returns:
          Done when there is room for more, cancelled if the writer is closed before. It says nothing about what is
          saved; ``flush`` does.

        Raises:
          CheckpointError: a unit could not be saved.
          ValueError: the bytes are not those of so many pages, or the model has no such layers.
        """
        (start, stop), form = header.layers, self._form
        if not 0 <= start < stop <= form.layers:
            raise ValueError(f"layers {header.layers} of a model that has {form.layers}")
        pages = content.view(form.dtype).reshape(stop - start, 2, len(header.pages), form.elements)
        rows, room = (stop - start) * len(header.pages), concurrent.futures.Future[None]()
        with self._changed:
            self._check()
            if header.service == form.service and rows:
                if self._open is not None and self._open.room < rows:
                    self._end_unit()
                if self._open is None:
                    self._open = UnitBuffer(form, max(self._rows, rows))
                self._open.add(header, pages)
            self._held_up.append(room)
            self._let_go()
        return room

    def flush(self) -> None:
        """Saves all that was put, and waits for it.

        Raises:
          CheckpointError: a unit could not be saved, or the writer was stopped.
        """
        with self._changed:
            self._end_unit()
            self._changed.wait_for(lambda: not self._complete or self._closing or self._problem is not None)
            self._check()

    def stop(self) -> None:
        """Gives up what was not flushed, but for the unit that is being saved. Returns at once, and so do waiters."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            for room in self._held_up:
                room.cancel()
            self._held_up.clear()

    def close(self) -> None:
        """The same, and waits for the end of that unit."""
        self.stop()
        self._thread.join()

    def _check(self) -> None:
        if self._closing:
            raise CheckpointError(f"the writer of {self._directory} is closed")
        if self._problem is not None:
            raise self._problem

    def _end_unit(self) -> None:
        """The open unit is complete; for who holds the lock."""
        if self._open is not None:
            self._complete.append(self._open)
            self._open = None
            self._changed.notify_all()

    def _let_go(self) -> None:
        """Lets callers put more if there is room; for who holds the lock."""
        while self._held_up and (len(self._complete) <= _WAITING_UNITS or self._problem is not None):
            room = self._held_up.pop(0)
            if room.set_running_or_notify_cancel():
                room.set_result(None)

    def _run(self) -> None:
        number = 0
        while (unit := self._next()) is not None:
            problem = None
            try:
                number = number or self._first_number()
                self._saver.save(self._directory / f"{number:06d}", unit)
                number, self.saved_bytes = number + 1, self.saved_bytes + unit.count * self._form.row_bytes
            except Exception as error:  # whatever Orbax, tensorstore and the file system raise
                log.error("KV could not be saved in %s: %s", self._directory, error)
                problem = CheckpointError(f"KV could not be saved in {self._directory}: {error}")
            with self._changed:
                self._problem = problem
                self._complete.popleft()
                self._let_go()
                self._changed.notify_all()
        self._saver.close()

    def _next(self) -> UnitBuffer | None:
        """The next unit to save, None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._complete or self._closing)
            return None if self._closing or self._problem is not None else self._complete[0]

    def _first_number(self) -> int:
        """Behind what an earlier writer of that name has left, complete or not."""
        make_private(self._directory)
        return 1 + max((int(path.name[:6]) for path in self._directory.iterdir() if path.name[:6].isdigit()), default=0)
