"""KV pages on disk as a source: how far the KV of each sequence goes, and the pages themselves.

The same answers as those of a ``worker.backup_store.BackupStore`` that was given the same frames.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from etils import epath

from spotjax.checkpoint.kv_format import KvFormat
from spotjax.checkpoint.kv_units import SEQUENCE, SOURCE, Unit, leaving_out, open_units
from spotjax.errors import SliceUnavailable
from spotjax.meshes.slices import Range

log = logging.getLogger(__name__)


@dataclass
class _Copies:
    """What one source has saved of one layer of one sequence.

    Attributes:
      epoch: the latest.
      pages: by number: positions of the sequence that are here with it and those before it; unit; row in the unit.
    """

    epoch: int = 0
    pages: list[tuple[int, int, int]] = field(default_factory=list)

    @property
    def watermark(self) -> int:
        """Positions, from the first on."""
        return self.pages[-1][0] if self.pages else 0


class _Wanted(NamedTuple):
    """Rows of one unit, and where in what is asked for they belong."""

    rows: np.ndarray
    layers: np.ndarray
    places: np.ndarray


class SavedKv:
    """What ``KvWriter``s have saved in a directory. Thread-safe; units saved after it was opened are not seen.

    Pages of several sources are never mixed: of each layer of each sequence there is what one source saved, in its
    order; the one of the latest epoch, and of these the one that got farthest. A unit that is missing or damaged cannot
    leave a hole: a page counts only behind pages that are full.

    Args:
      directory: of all writers.
      form: what is wanted; units of any other are left out.
      limit: by sequence: positions to trust, from the first on; no other sequence is. None trusts everything.
    """

    def __init__(self, directory: epath.PathLike, form: KvFormat, limit: Mapping[int, int] | None = None) -> None:
        self._form, self._limit, self._lock = form, limit, threading.Lock()
        self._units = self._open(epath.Path(directory))
        self._index()

    def positions(self, layers: Range, sequences: Sequence[int]) -> tuple[int, ...]:
        """The watermark of each sequence over all these layers."""
        with self._lock:
            return tuple(
                min((self._watermark(sequence, layer) for layer in range(*layers)), default=0) for sequence in sequences
            )

    def read(self, layers: Range, owners: Sequence[tuple[int, int]]) -> np.ndarray:
        """Pages as ``KvMover.host_pages`` lays them out; only these are read from disk.

        Args:
          layers: of the model.
          owners: (sequence, number of the page in it) of each page.

        Raises:
          SliceUnavailable: one of them is not here, or turned out to be damaged: ``positions`` knows from then on.
        """
        pages = np.empty((layers[1] - layers[0], 2, len(owners), self._form.elements), np.dtype(self._form.dtype))
        with self._lock:
            units, wanted = self._units, self._locate(layers, owners)
        reading = {}
        for number, here in wanted.items():
            with leaving_out(units[number].path):
                reading[number] = units[number].read(here.rows)
        damaged = set(wanted)
        for number, content in reading.items():
            here = wanted[number]
            with leaving_out(units[number].path):
                pages[here.layers, :, here.places] = units[number].check(here.rows, content.result())
                damaged.remove(number)
        if damaged:
            self._drop([units[number] for number in damaged])
            raise SliceUnavailable("saved KV that is needed is damaged")
        return pages.reshape(-1).view(np.uint8)

    def check(self, layers: Range, sequences: Sequence[int]) -> None:
        """Reads all that ``positions`` promises of these once, so that from then on it promises nothing damaged."""
        for sequence in sequences:
            while positions := self.positions(layers, (sequence,))[0]:
                try:
                    self.read(layers, [(sequence, number) for number in range(-(-positions // self._form.page_size))])
                    break
                except SliceUnavailable:
                    continue  # less is promised now

    def _open(self, directory: epath.Path) -> list[Unit]:
        """All usable units, those of one writer in the order in which it saved them."""
        writers = (path for path in directory.iterdir() if path.is_dir()) if directory.exists() else ()
        paths = (path for writer in writers for path in writer.iterdir() if path.name.isdigit())
        units = list(open_units(sorted(paths, key=lambda path: (path.parent.name, int(path.name)))))
        if not units:
            log.warning("no saved KV in %s", directory)
        for form, count in Counter(unit.form for unit in units if unit.form != self._form).items():
            log.warning("%d units of saved KV in %s are not used: %s, not %s", count, directory, form, self._form)
        return [unit for unit in units if unit.form == self._form]

    def _index(self) -> None:
        """Sorts all rows by sequence, otherwise in the order in which they were saved.

        ``_tables`` has, by sequence, int64[n, 8]: the columns of ``Unit.rows`` up to the source, epoch and number of
        the source, number of the unit, row in it.
        """
        numbers: dict[str, int] = {}
        tables = [np.empty((0, 8), np.int64)]
        for unit_number, unit in enumerate(self._units):
            sources = np.array([(epoch, numbers.setdefault(name, len(numbers))) for name, epoch in unit.sources])
            count = len(unit.rows)
            place = np.full(count, unit_number), np.arange(count)
            tables.append(np.column_stack([unit.rows[:, :SOURCE], sources[unit.rows[:, SOURCE]], *place]))
        table = np.concatenate(tables)
        table = table[np.argsort(table[:, SEQUENCE], kind="stable")]
        keys, starts = np.unique(table[:, SEQUENCE], return_index=True)
        parts = np.split(table, starts[1:])
        self._tables = dict(zip(keys.tolist(), parts, strict=False))  # of nothing there is one part, but no key
        self._sequences: dict[int, dict[int, _Copies]] = {}

    def _drop(self, damaged: Sequence[Unit]) -> None:
        with self._lock:
            self._units = [unit for unit in self._units if unit not in damaged]
            self._index()

    def _layers(self, sequence: int) -> dict[int, _Copies]:
        """What is here of a sequence, found out when it is first asked for."""
        layers = self._sequences.get(sequence)
        if layers is None:
            found: dict[tuple[int, int], _Copies] = defaultdict(_Copies)
            rows = self._tables[sequence].tolist() if sequence in self._tables else []
            for layer, _, number, positions, epoch, source, unit, row in rows:
                copies = found[layer, source]
                copies.epoch = max(copies.epoch, epoch)
                pages = copies.pages
                if number > len(pages) or (number and pages[number - 1][0] < number * self._form.page_size):
                    continue  # what came before it is not here
                pages[number:] = [(positions, unit, row)]
            layers = self._sequences[sequence] = {}
            for (layer, _), copies in sorted(found.items(), key=lambda item: (item[1].epoch, item[1].watermark)):
                layers[layer] = copies  # the last one stays
        return layers

    def _watermark(self, sequence: int, layer: int) -> int:
        copies = self._layers(sequence).get(layer)
        saved = copies.watermark if copies is not None else 0
        return saved if self._limit is None else min(saved, self._limit.get(sequence, 0))

    def _locate(self, layers: Range, owners: Sequence[tuple[int, int]]) -> dict[int, _Wanted]:
        """Where pages are, by number of the unit."""
        found: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
        for number, layer in enumerate(range(*layers)):
            for place, (sequence, page) in enumerate(owners):
                if not 0 <= page * self._form.page_size < self._watermark(sequence, layer):
                    raise SliceUnavailable(f"page {page} of sequence {sequence} in layer {layer} was not saved")
                _, unit, row = self._layers(sequence)[layer].pages[page]
                found[unit].append((row, number, place))
        return {unit: _Wanted(*np.array(sorted(rows)).T) for unit, rows in found.items()}
