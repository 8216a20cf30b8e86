"""Copies this worker's KV to another worker's host memory in the background, within a bandwidth budget.

So that after a loss without notice only the last few tokens are computed again. Steps tell what they are about to write
(``begin``) and what they have written (``written``); rounds of copying follow. What is kept at the other side is
``backup_store``'s.
"""

from __future__ import annotations

import concurrent.futures
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from spotjax.errors import TransportError
from spotjax.protocol.backup import BackedUpPage, BackupHeader
from spotjax.reshard.kv import KvMover
from spotjax.runtime.compiled import PAGES_PER_MOVE
from spotjax.runtime.kv import LayerPages
from spotjax.runtime.stage import Stage

log = logging.getLogger(__name__)

ROUND_SECONDS = 0.1
"""Between rounds: about so much decoding is computed again after a loss."""
LAYERS_PER_FRAME = 8
"""Bounds how long a frame keeps steps from the same connection."""
RETRY_SECONDS = 1.0
PUSH_SECONDS = 10.0

Push = Callable[[BackupHeader, np.ndarray], concurrent.futures.Future[None]]
"""Sends pages to the worker that keeps them; done when there is room for more."""


@dataclass
class _Sequence:
    """What is known of one sequence on one stage.

    Attributes:
      pages: its KV pages.
      written: positions whose KV is on the stage.
      copied: of these, how many have been copied.
    """

    pages: tuple[int, ...]
    written: int = 0
    copied: int = 0


class StageBackup:
    """What of one stage's KV is to be copied. Its lock orders steps and copies.

    A page that changes hands is a danger: copied under its old owner's name it would be wrong KV. So a step that writes
    pages takes them from whoever had them before it runs, and a copy looks, under the lock, whether what it is about to
    read still belongs to whom it thinks.
    """

    def __init__(self, stage: Stage, page_size: int) -> None:
        self.stage = stage
        self.lock = threading.Lock()
        self.source, self.epoch, self.service = uuid.uuid4().hex, 0, ""
        self._page_size = page_size
        self._sequences: dict[int, _Sequence] = {}
        self._owners: dict[int, int] = {}

    def begin(self, sequences: Sequence[int], rows: np.ndarray, pages: np.ndarray) -> None:
        """A step is about to write; called before it is dispatched. ``rows`` and ``pages`` are as in ``StepInput``."""
        with self.lock:
            for row, key in enumerate(sequences):
                count = -(-int(rows[row, 0] + rows[row, 1]) // self._page_size)
                owned = tuple(pages[row, :count].tolist())
                sequence = self._sequences.setdefault(key, _Sequence(()))
                known = len(sequence.pages)
                if sequence.pages != owned[:known]:  # it lost its pages and got others
                    sequence.written = sequence.copied = known = 0
                sequence.pages = owned
                for page in owned[known:]:  # most steps bring none: this is on every step's way
                    self._take(page, key)

    def _take(self, page: int, key: int) -> None:
        """Gives a page to a sequence; whoever had it is not copied any more until it runs again."""
        before = self._owners.get(page, key)
        robbed = self._sequences.get(before)
        if before != key and robbed is not None and page in robbed.pages:
            del self._sequences[before]
        self._owners[page] = key

    def written(self, sequences: Sequence[int], rows: np.ndarray) -> None:
        """The step is dispatched: what reads the stage's pages from now on finds what it writes."""
        with self.lock:
            for row, key in enumerate(sequences):
                if (sequence := self._sequences.get(key)) is not None:
                    sequence.written = int(rows[row, 0] + rows[row, 1])
                    sequence.copied = min(sequence.copied, int(rows[row, 0]))

    def forget(self, sequences: Iterable[int]) -> None:
        """These have ended."""
        with self.lock:
            for key in sequences:
                self._sequences.pop(key, None)

    def restart(self) -> None:
        """Nothing is copied yet: whoever kept it is another one now."""
        with self.lock:
            for sequence in self._sequences.values():
                sequence.copied = 0

    def due(self, limit: int) -> list[tuple[int, int, int, int]]:
        """(sequence, number of a page in it, page, positions copied with it) of what is to be copied next.

        Whole sequences as far as the limit goes, those with most to copy last, so that all stay close behind.
        """
        with self.lock:
            behind = [(s.written - s.copied, key, s) for key, s in self._sequences.items() if s.written > s.copied]
            found: list[tuple[int, int, int, int]] = []
            for _, key, sequence in sorted(behind, key=lambda entry: entry[:2]):
                first, last = sequence.copied // self._page_size, -(-sequence.written // self._page_size)
                for number in range(first, last):
                    if len(found) == limit:
                        return found
                    positions = min(sequence.written, (number + 1) * self._page_size)
                    found.append((key, number, sequence.pages[number], positions))
            return found

    def still_owned(self, due: Sequence[tuple[int, int, int, int]]) -> bool:
        """Whether all these pages belong to whom they did; for who holds the lock."""
        return all(
            (sequence := self._sequences.get(key)) is not None
            and number < len(sequence.pages)
            and sequence.pages[number] == page
            and sequence.written >= positions
            for key, number, page, positions in due
        )

    def copied(self, due: Sequence[tuple[int, int, int, int]]) -> None:
        """These have been sent."""
        with self.lock:
            for key, _, _, positions in due:
                if (sequence := self._sequences.get(key)) is not None:
                    sequence.copied = max(sequence.copied, min(positions, sequence.written))


class Backup:
    """All stages' copying, in one thread.

    Args:
      kv: reads pages.
      page_size: positions per page.
      push: where they go.
      bandwidth: bytes per second at most; 0 for no limit.
    """

    def __init__(self, kv: KvMover, page_size: int, push: Push, bandwidth: int) -> None:
        self._kv, self._page_size, self._push, self._bandwidth = kv, page_size, push, bandwidth
        self._stages: tuple[StageBackup, ...] = ()
        self._stopping = threading.Event()
        self._round = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="backup", daemon=True)
        self._thread.start()

    def of(self, stage: Stage) -> StageBackup:
        """What tells of a stage's steps; the same for the same stage."""
        for known in self._stages:
            if known.stage is stage:
                return known
        return StageBackup(stage, self._page_size)

    def install(self, stages: Iterable[StageBackup], epoch: int, service: str) -> None:
        """Copies of these stages, which belong to that epoch and controller, from now on."""
        self._stages = tuple(stages)
        for stage in self._stages:
            stage.epoch, stage.service = epoch, service

    def forget(self, sequences: Sequence[int]) -> None:
        """These have ended: nothing more of them is copied."""
        for stage in self._stages:
            stage.forget(sequences)

    def stop(self) -> None:
        """Copies nothing more; returns at once, though a frame may still be on its way."""
        self._stopping.set()

    def close(self) -> None:
        """The same, and waits for the end of the thread."""
        self.stop()
        self._thread.join()

    def copy_now(self) -> None:
        """One round.

        Raises:
          TransportError: pages cannot be sent.
          RuntimeError: a stage's buffers are gone.
        """
        with self._round:
            for stage in self._stages:
                self._copy(stage)

    def _run(self) -> None:
        while not self._stopping.wait(ROUND_SECONDS):
            stages = self._stages
            try:
                self.copy_now()
            except (TransportError, TimeoutError, RuntimeError, concurrent.futures.CancelledError) as problem:
                # whoever kept the copies is gone, or the stage is: the next placement begins anew
                log.debug("backup interrupted: %s", problem)
                for stage in stages:
                    stage.restart()
                self._stopping.wait(RETRY_SECONDS)

    def _copy(self, backup: StageBackup) -> None:
        """One round for one stage: what is due now, in frames of a few pages and layers."""
        while due := backup.due(PAGES_PER_MOVE):
            started, sent = time.monotonic(), 0
            start, stop = backup.stage.layers
            for first in range(start, stop, LAYERS_PER_FRAME):
                layers = (first, min(first + LAYERS_PER_FRAME, stop))
                flat, views = self._kv.host_pages(layers[1] - layers[0], len(due))
                taken: list[LayerPages[jax.Array]] = []
                for layer in range(*layers):
                    with backup.lock:
                        if not backup.still_owned(due):
                            return  # the next round looks again
                        taken.append(self._kv.take(backup.stage, layer, [page for _, _, page, _ in due]))
                for content, view in zip(taken, views, strict=True):
                    self._kv.to_host(backup.stage, content, len(due), view)
                pages = tuple(BackedUpPage(key, number, positions) for key, number, _, positions in due)
                self._push(BackupHeader(layers, pages, backup.source, backup.epoch, backup.service), flat).result(
                    PUSH_SECONDS
                )
                sent += flat.nbytes
            backup.copied(due)
            self._pay(sent, started)
            if len(due) < PAGES_PER_MOVE:
                return

    def _pay(self, sent: int, started: float) -> None:
        """Waits until what was sent is within the budget."""
        if self._bandwidth:
            self._stopping.wait(max(0.0, sent / self._bandwidth - (time.monotonic() - started)))
