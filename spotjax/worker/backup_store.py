"""KV of other workers' sequences in this worker's host memory, for the day that one of them is lost. No jax.

Kept by sequence and layer, whatever mesh it was computed on: KV depends on the tokens alone. The watermark of a layer
is the number of positions, from the first on, whose KV is here.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from spotjax.errors import SliceUnavailable
from spotjax.meshes.slices import Range
from spotjax.protocol.backup import BackupHeader


@dataclass
class _Layer:
    """One layer of one sequence.

    Attributes:
      source: what copied them, ``epoch`` being the last that its stage was adopted in.
      positions: the watermark.
      pages: bytes of keys and values, by number of the page in the sequence.
    """

    source: str
    epoch: int
    positions: int = 0
    pages: dict[int, np.ndarray] = field(default_factory=dict)


class BackupStore:
    """Everything that others have backed up here. Safe to use from several threads."""

    def __init__(self) -> None:
        self.service = ""
        """Whose sequences are kept; frames of others come late and are dropped."""
        self._sequences: dict[int, dict[int, _Layer]] = {}
        self._ignored = -1
        self._lock = threading.Lock()

    def put(self, header: BackupHeader, content: np.ndarray) -> None:
        """Keeps pages.

        Frames can come late, from a worker that was lost and whose stage another one has: mixed with the other's, its
        pages would leave holes behind the watermark. So a layer has one source, the one of the latest epoch.

        Args:
          header: which.
          content: bytes as ``KvMover.host_pages`` lays them out.

        Raises:
          ValueError: there are not as many bytes as so many pages can have.
        """
        start, stop = header.layers
        pages = content.reshape(stop - start, 2, len(header.pages), -1)
        with self._lock:
            if header.service != self.service or header.epoch <= self._ignored:
                return
            for place, page in enumerate(header.pages):
                layers = self._sequences.setdefault(page.sequence, {})
                for number, layer in enumerate(range(start, stop)):
                    kept = _of_source(layers, layer, header)
                    if kept is None or (page.number and page.number - 1 not in kept.pages):
                        continue  # late, or what came before it was lost on the way
                    kept.pages[page.number] = np.array(pages[number, :, place])
                    kept.positions = page.positions

    def forget(self, sequences: Iterable[int]) -> None:
        """Drops sequences that have ended."""
        with self._lock:
            for sequence in sequences:
                self._sequences.pop(sequence, None)

    def ignore(self, epoch: int) -> None:
        """What is sent under that epoch, or one before, comes too late from now on."""
        with self._lock:
            self._ignored = epoch

    def keep(self, certain: Mapping[int, int], epoch: int) -> None:
        """Drops all sequences but these, and all but so many positions of each. See ``ignore``."""
        with self._lock:
            self._ignored = max(self._ignored, epoch)
            self._sequences = {key: layers for key, layers in self._sequences.items() if key in certain}
            for key, layers in self._sequences.items():
                for layer in layers.values():
                    layer.positions = min(layer.positions, certain[key])

    def clear(self) -> None:
        """Drops everything."""
        with self._lock:
            self._sequences.clear()

    def positions(self, layers: Range, sequences: Sequence[int]) -> tuple[int, ...]:
        """The watermark of each sequence over all these layers."""
        with self._lock:
            return tuple(
                min((self._watermark(sequence, layer) for layer in range(*layers)), default=0) for sequence in sequences
            )

    def read(self, layers: Range, owners: Sequence[tuple[int, int]]) -> np.ndarray:
        """Pages as ``KvMover.host_pages`` lays them out.

        Args:
          layers: of the model.
          owners: (sequence, number of the page in it) of each page.

        Raises:
          SliceUnavailable: one of them is not here.
        """
        with self._lock:
            try:
                kept = [[self._sequences[s][layer].pages[number] for s, number in owners] for layer in range(*layers)]
            except KeyError as missing:
                raise SliceUnavailable(f"a backup of page or layer {missing} is not here") from None
        return np.stack([np.stack(pages, axis=1) for pages in kept]).reshape(-1)

    @property
    def empty(self) -> bool:
        """Whether nothing is kept."""
        return not self._sequences

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept."""
        with self._lock:
            return sum(
                page.nbytes
                for layers in self._sequences.values()
                for layer in layers.values()
                for page in layer.pages.values()
            )

    def _watermark(self, sequence: int, layer: int) -> int:
        kept = self._sequences.get(sequence, {}).get(layer)
        return kept.positions if kept is not None else 0


def _of_source(layers: dict[int, _Layer], layer: int, header: BackupHeader) -> _Layer | None:
    """What is kept of a layer from the frame's source, nothing yet if it is a new one; None if the frame is late."""
    kept = layers.get(layer)
    if kept is not None and kept.source == header.source:
        kept.epoch = max(kept.epoch, header.epoch)
        return kept
    if kept is not None and header.epoch < kept.epoch:
        return None
    layers[layer] = _Layer(header.source, header.epoch)
    return layers[layer]
