"""Copies this worker's KV to another worker's host memory in the background, within a bandwidth budget.

So that after a loss without notice only the last few tokens are computed again. What there is to copy is known to each
stage's ``ledger``; what is kept at the other side is ``backup_store``'s.
"""

from __future__ import annotations

import concurrent.futures
import logging
import threading
import time
from collections.abc import Callable, Iterable

import jax
import numpy as np

from spotjax.errors import SpotjaxError
from spotjax.protocol.backup import BackedUpPage, BackupHeader
from spotjax.reshard.kv import KvMover
from spotjax.runtime.compiled import PAGES_PER_MOVE
from spotjax.runtime.kv import LayerPages
from spotjax.worker.copying import Copying
from spotjax.worker.ledger import StageLedger

log = logging.getLogger(__name__)

ROUND_SECONDS = 0.1
"""Between rounds: about so much decoding is computed again after a loss."""
LAYERS_PER_FRAME = 8
"""Bounds how long a frame keeps steps from the same connection."""
RETRY_SECONDS = 1.0
PUSH_SECONDS = 10.0

FAILURES = (SpotjaxError, TimeoutError, RuntimeError, concurrent.futures.CancelledError)
"""What copying can end with: the other side is gone or full, or the stage's buffers are gone."""

Push = Callable[[BackupHeader, np.ndarray], concurrent.futures.Future[None]]
"""Sends pages to whoever keeps them; done when there is room for more."""


class Backup:
    """All stages' copying, in one thread.

    Args:
      kv: reads pages.
      service: whose sequences they are.
      push: where they go.
      bandwidth: bytes per second at most; 0 for no limit.
      full: only pages that are full are copied, until ``freeze``.
    """

    def __init__(self, kv: KvMover, service: str, push: Push, bandwidth: int, *, full: bool = False) -> None:
        self._full, self._frozen = full, False
        self._kv, self._service, self._push, self._bandwidth = kv, service, push, bandwidth
        self._stages: tuple[Copying, ...] = ()
        self._stopping = threading.Event()
        self._round = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="backup", daemon=True)
        self._thread.start()

    def install(self, stages: Iterable[StageLedger]) -> None:
        """Copies of these stages from now on; of those that it has copied before it goes on where it was."""
        before = {id(copying.ledger): copying for copying in self._stages}
        self._stages = tuple(before.get(id(ledger)) or Copying(ledger) for ledger in stages)
        if self._frozen:
            self.freeze()

    def freeze(self) -> None:
        """What is there by now is copied, also of pages that are not full, and nothing that is written later."""
        self._full, self._frozen = False, True
        for copying in self._stages:
            copying.freeze()

    def stop(self) -> None:
        """Copies nothing more; returns at once, though a frame may still be on its way."""
        self._stopping.set()

    def close(self) -> None:
        """The same, and waits for the end of the thread."""
        self.stop()
        self._thread.join()

    def copy_now(self, enough: Callable[[], bool] = lambda: False) -> bool:
        """One round, until ``enough`` says so between two frames.

        Returns: whether all that was due is copied; not if pages changed hands meanwhile.

        Raises:
          SpotjaxError: pages cannot be sent.
          RuntimeError: a stage's buffers are gone.
        """
        with self._round:
            copied = [self._copy(stage, enough) for stage in self._stages]
            return all(copied)

    def _run(self) -> None:
        while not self._stopping.wait(ROUND_SECONDS):
            stages = self._stages
            try:
                self.copy_now(self._stopping.is_set)
            except FAILURES as problem:
                # whoever kept the copies is gone, or the stage is: the next placement begins anew
                log.debug("backup interrupted: %s", problem)
                for stage in stages:
                    stage.restart()
                self._stopping.wait(RETRY_SECONDS)

    def _copy(self, copying: Copying, enough: Callable[[], bool]) -> bool:
        """One round for one stage: what is due now, in frames of a few pages and layers."""
        ledger = copying.ledger
        while not enough() and (due := copying.due(PAGES_PER_MOVE, full=self._full)):
            started, sent = time.monotonic(), 0
            start, stop = ledger.stage.layers
            for first in range(start, stop, LAYERS_PER_FRAME):
                layers = (first, min(first + LAYERS_PER_FRAME, stop))
                flat, views = self._kv.host_pages(layers[1] - layers[0], len(due))
                taken: list[LayerPages[jax.Array]] = []
                for layer in range(*layers):
                    with ledger.lock:
                        if not ledger.still_owned(due):
                            return False  # the next round looks again
                        taken.append(self._kv.take(ledger.stage, layer, [page for _, _, page, _ in due]))
                for content, view in zip(taken, views, strict=True):
                    self._kv.to_host(ledger.stage, content, len(due), view)
                pages = tuple(BackedUpPage(key, number, positions) for key, number, _, positions in due)
                self._push(BackupHeader(layers, pages, copying.source, ledger.epoch, self._service), flat).result(
                    PUSH_SECONDS
                )
                sent += flat.nbytes
            copying.copied(due)
            self._pay(sent, started)
            if len(due) < PAGES_PER_MOVE:
                return True
        return not enough()

    def _pay(self, sent: int, started: float) -> None:
        """Waits until what was sent is within the budget."""
        if self._bandwidth:
            self._stopping.wait(max(0.0, sent / self._bandwidth - (time.monotonic() - started)))
