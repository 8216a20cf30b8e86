"""Saves the KV of this worker's stages into a checkpoint, while steps go on, until a deadline."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from spotjax.checkpoint.kv import KvWriter
from spotjax.checkpoint.kv_format import KvFormat
from spotjax.reshard.kv import KvMover
from spotjax.worker.backup import FAILURES, Backup
from spotjax.worker.ledger import StageLedger


class KvSave:
    """One save. Copying begins at once, in the background: what is behind when it ends is little.

    Args:
      kv: reads pages.
      path: directory of the save.
      name: of this worker.
      form: of its KV.
    """

    def __init__(self, kv: KvMover, path: str, name: str, form: KvFormat) -> None:
        self.path = path
        self._writer = KvWriter(path, name, form)
        self._copier = Backup(kv, form.service, self._writer.put, bandwidth=0, full=True)
        self._over = threading.Event()
        self._finishing = False

    @property
    def bytes(self) -> int:
        """Of KV, that are saved."""
        return self._writer.saved_bytes

    def install(self, ledgers: Iterable[StageLedger]) -> None:
        """The KV of these stages is to be saved."""
        self._copier.install(ledgers)

    def finish(self, seconds: float) -> str:
        """Saves what there is by now and ends; what does not fit into the time is left out. Blocks.

        Returns: why not everything is saved; empty if it is.
        """
        self._finishing = True
        if seconds <= 0:
            self._end()
        timer = threading.Timer(max(0.0, seconds), self._end)
        timer.start()
        try:
            self._copier.close()
            self._copier.freeze()
            while not self._copier.copy_now(self._over.is_set) and not self._over.is_set():
                continue  # pages changed hands meanwhile; the next round looks again
            self._writer.flush()
        except FAILURES as problem:
            return "there was no time for the rest" if self._over.is_set() else str(problem) or repr(problem)
        finally:
            timer.cancel()
            self._writer.stop()  # what is being written may be complete later, or its disk hangs
        return ""

    def hurry(self) -> None:
        """There is something better to do than to wait for the end: it comes as soon as possible."""
        if self._finishing:
            self._end()

    def _end(self) -> None:
        self._over.set()
        self._writer.stop()
