"""One Orbax checkpoint of KV pages: a *unit*. What is in it, and how it is opened again. ``unit_saver`` saves it.

A unit is a table. A row is one page of one layer of one sequence; what mesh it was computed on is not in it, as KV
depends on the tokens alone. As a pytree:

- ``content``: dtype[n, 2, K*H*G], keys (K, H, G) and values (K, G, H) of each row, in chunks of one row;
- ``rows``: int64[n, 5], layer, sequence, number of the page in it, positions, index of the source;
- ``header``: uint8[...], whose KV it is and what copied it, as JSON;
- ``checksums``: uint64[n + 1], xxh3 of each row's content, and one of all other leaves.

A unit is there as a whole or not at all: Orbax gives it its name when it is complete. In a bucket, where nothing can be
renamed, one that is not cannot be opened. Opening needs tensorstore alone, which a worker loads much sooner than Orbax.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import msgspec
import numpy as np
import tensorstore as ts
from etils import epath
from xxhash import xxh3_64_intdigest

from spotjax.checkpoint.kv_format import KvFormat
from spotjax.protocol.backup import BackupHeader

log = logging.getLogger(__name__)

LAYER, SEQUENCE, NUMBER, POSITIONS, SOURCE = range(5)
"""Columns of ``rows``."""
_INDEX = ("header", "rows", "checksums")
_DAMAGE = (ValueError, KeyError, IndexError, OSError, RuntimeError, msgspec.MsgspecError)
"""What reading something damaged can raise: tensorstore's errors, Orbax's, and ours."""


class _Header(msgspec.Struct, frozen=True):
    """What all rows of a unit share.

    Attributes:
      form: of all of it.
      sources: what copied them, with the epoch that its stage was last adopted in.
    """

    form: KvFormat
    sources: tuple[tuple[str, int], ...]


class UnitBuffer:
    """Rows on their way into a unit, in host memory."""

    def __init__(self, form: KvFormat, capacity: int) -> None:
        self.count = 0
        self._form = form
        self._content = np.empty((capacity, 2, form.elements), np.dtype(form.dtype))
        self._rows = np.empty((capacity, 5), np.int64)
        self._sources: dict[tuple[str, int], int] = {}

    @property
    def room(self) -> int:
        """Rows that can still be added."""
        return len(self._rows) - self.count

    def add(self, header: BackupHeader, pages: np.ndarray) -> None:
        """Adds a frame: copies of pages (layers, 2, pages, elements)."""
        (start, stop), place = header.layers, slice(self.count, self.count + pages.shape[0] * pages.shape[2])
        content, rows = self._content[place], self._rows[place]
        content.reshape(stop - start, len(header.pages), 2, -1)[...] = pages.swapaxes(1, 2)
        rows[:, LAYER] = np.repeat(np.arange(start, stop), len(header.pages))
        rows[:, SEQUENCE : POSITIONS + 1] = np.tile(np.array(header.pages, np.int64), (stop - start, 1))
        rows[:, SOURCE] = self._sources.setdefault((header.source, header.epoch), len(self._sources))
        self.count = place.stop

    def tree(self) -> dict[str, np.ndarray]:
        """The pytree."""
        content, rows = self._content[: self.count], self._rows[: self.count]
        header = np.frombuffer(msgspec.json.encode(_Header(self._form, tuple(self._sources))), np.uint8)
        checksums = np.array([*_row_checksums(content), 0], np.uint64)
        checksums[-1] = _index_checksum(header, rows, checksums[:-1])
        return {"header": header, "rows": rows, "checksums": checksums, "content": content}


class Unit:
    """A saved unit, opened: its table in memory, its content on disk.

    Attributes:
      path: of the checkpoint.
      form: whose KV it is and what pages look like.
      rows: int64[n, 5].
      sources: what copied, with the epoch; ``rows`` says which.
    """

    def __init__(self, path: epath.Path, header: np.ndarray, rows: np.ndarray, checksums: np.ndarray) -> None:
        if len(checksums) != len(rows) + 1 or checksums[-1] != _index_checksum(header, rows, checksums[:-1]):
            raise ValueError("its checksum is another")
        self.path, self.rows = path, rows
        decoded = msgspec.json.decode(header.tobytes(), type=_Header)
        self.form, self.sources, self._checksums = decoded.form, decoded.sources, checksums
        self._content: ts.TensorStore | None = None

    def read(self, rows: np.ndarray) -> ts.Future[np.ndarray]:
        """Begins to read the content (k, 2, elements) of some rows."""
        if self._content is None:
            self._content = _open_leaf(self.path, "content").result()
        return self._content[rows].read()

    def check(self, rows: np.ndarray, content: np.ndarray) -> np.ndarray:
        """The content, if it is what those rows had when they were saved; else raises ValueError."""
        if not np.array_equal(np.array(_row_checksums(content), np.uint64), self._checksums[rows]):
            raise ValueError("the checksum of a page is another")
        return content


def open_units(paths: Iterable[epath.Path]) -> Iterator[Unit]:
    """Opens units, all at the same time. Those that are damaged, or incomplete as in a bucket, are left out."""
    shared = ts.Context({"cache_pool": {"total_bytes_limit": 64 << 20}})  # what Orbax wrote of a unit is read once
    opening = {path: [_open_leaf(path, leaf, shared) for leaf in _INDEX] for path in paths}
    reading: dict[epath.Path, list[ts.Future[np.ndarray]]] = {}
    for path, leaves in opening.items():
        with leaving_out(path):
            reading[path] = [leaf.result().read() for leaf in leaves]
    for path, index in reading.items():
        with leaving_out(path):
            yield Unit(path, *(leaf.result() for leaf in index))


@contextmanager
def leaving_out(path: epath.Path) -> Iterator[None]:
    """Says what is wrong with a unit that turns out to be damaged, and goes on behind the block."""
    try:
        yield
    except _DAMAGE as damage:
        log.error("saved KV %s is damaged and is not used: %s", path, damage)


def _row_checksums(content: np.ndarray) -> list[int]:
    """Of the content of each row."""
    return [xxh3_64_intdigest(row.data) for row in content.reshape(len(content), -1).view(np.uint8)]


def _index_checksum(*leaves: np.ndarray) -> int:
    return xxh3_64_intdigest(b"".join(leaf.tobytes() for leaf in leaves))


def _open_leaf(path: epath.Path, leaf: str, context: ts.Context | None = None) -> ts.Future[ts.TensorStore]:
    """Begins to open one array of a checkpoint, as Orbax lays them out with OCDBT."""
    kvstore = {"driver": "ocdbt", "base": f"{path.as_uri()}/", "path": f"{leaf}/"}
    return ts.open({"driver": "zarr", "kvstore": kvstore}, read=True, context=context)
