"""Copies of KV that this worker can give: of other workers' in its memory, and what was saved in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from spotjax.checkpoint.kv_format import KvFormat
from spotjax.checkpoint.saved_kv import SavedKv
from spotjax.meshes.slices import Range
from spotjax.worker.backup_store import BackupStore


class Copies:
    """Both, for each sequence the one that goes further. Safe to use from several threads.

    Attributes:
      store: what other workers have backed up here.
    """

    def __init__(self, store: BackupStore) -> None:
        self.store = store
        self._saved: SavedKv | None = None
        self._told: tuple[str, KvFormat, Mapping[int, int]] | None = None
        self._page_size = 1

    def use_save(self, path: str, form: KvFormat, sequences: Mapping[int, int]) -> None:
        """Counts what was saved there from now on, and nothing else that was; nothing if the path is empty. Blocks.

        Args:
          path: of the save.
          form: of what is wanted.
          sequences: key to the positions that may be used.
        """
        told = path, form, sequences
        if told == self._told:
            return
        self._saved, self._told = None, None  # so that what cannot be opened now is tried again
        self._saved = SavedKv(path, form, sequences) if path else None
        self._told, self._page_size = told, form.page_size

    def positions(self, layers: Range, sequences: Sequence[int]) -> tuple[int, ...]:
        """The watermark of each sequence over all these layers. May read from disk what it promises."""
        kept, save = self.store.positions(layers, sequences), self._saved
        if save is None:
            return kept
        saved = save.positions(layers, sequences)
        save.check(layers, [key for key, here, there in zip(sequences, kept, saved, strict=True) if there > here])
        return tuple(map(max, kept, save.positions(layers, sequences)))

    def read(self, layers: Range, owners: Sequence[tuple[int, int]]) -> np.ndarray:
        """Pages as ``KvMover.host_pages`` lays them out.

        Args:
          layers: of the model.
          owners: (sequence, number of the page in it) of each page.

        Raises:
          SliceUnavailable: one of them is not here.
        """
        if (save := self._saved) is None:
            return self.store.read(layers, owners)
        keys = sorted({key for key, _ in owners})
        kept, saved = self.store.positions(layers, keys), save.positions(layers, keys)
        on_disk = {key for key, here, there in zip(keys, kept, saved, strict=True) if there > here}
        places: dict[bool, list[int]] = {False: [], True: []}
        for place, (key, _) in enumerate(owners):
            places[key in on_disk].append(place)
        reads = {False: self.store.read, True: save.read}
        found = {which: reads[which](layers, [owners[n] for n in some]) for which, some in places.items() if some}
        if len(found) == 1:
            return next(iter(found.values()))
        rows = (layers[1] - layers[0], 2)
        page_bytes = sum(content.nbytes for content in found.values()) // (2 * rows[0] * len(owners))
        pages = np.empty((*rows, len(owners), page_bytes), np.uint8)
        for which, content in found.items():
            pages[:, :, places[which]] = content.reshape(*rows, len(places[which]), -1)
        return pages.reshape(-1)

    def whole(self, layers: Range, owners: Sequence[tuple[int, int]]) -> list[bool]:
        """Which of these pages were saved with all their positions."""
        if self._saved is None:
            return [False] * len(owners)
        keys = sorted({key for key, _ in owners})
        saved = dict(zip(keys, self._saved.positions(layers, keys), strict=True))
        return [(number + 1) * self._page_size <= saved[key] for key, number in owners]
