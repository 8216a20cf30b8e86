"""Saves the KV of this worker's stages into a checkpoint, while steps go on, until a deadline."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable

from spotjax.checkpoint.kv import KvWriter
from spotjax.checkpoint.kv_format import KvFormat
from spotjax.reshard.kv import KvMover
from spotjax.worker.backup import FAILURES, Backup
from spotjax.worker.ledger import StageLedger

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.2
"""How often it is looked whether the save is still wanted."""


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
        self._copier = Backup(kv, form.service, self._writer.put, bandwidth=0)
        self._deadline = float("inf")

    def install(self, ledgers: Iterable[StageLedger]) -> None:
        """The KV of these stages is to be saved."""
        self._copier.install(ledgers)

    def finish(self, seconds: float) -> bool:
        """Saves what there is by now and ends; what does not fit into the time is left out. Blocks.

        Returns: whether everything was saved.
        """
        self._deadline = min(self._deadline, time.monotonic() + seconds)
        self._copier.close()
        try:
            self._copier.copy_now(lambda: time.monotonic() > self._deadline)
            while not (saved := self._writer.flush(min(self._deadline, time.monotonic() + LOOK_SECONDS))):
                if time.monotonic() > self._deadline:
                    break
        except FAILURES as problem:
            log.warning("KV is saved in part: %s", problem, extra={"path": self.path})
            saved = False
        finally:
            self._writer.close()
        return saved

    def hurry(self) -> None:
        """There is something better to do: ends as soon as possible."""
        self._deadline = 0.0
