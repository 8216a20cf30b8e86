"""The commit log's SQLite database: tables, transactions, compaction. Blocking; for one thread at a time.

Three tables hold requests. ``requests`` has one row for each accepted one; ``journal`` one for each group of steps,
with the increments of all sequences in it; ``segments`` one for each sequence and stretch of the journal that was
compacted. A sequence is its start, its segments and its journal rows, in this order. Tokens are thus written twice at
most, however long a sequence gets. Every row has a number and a checksum of its own.

SQLite keeps a write-ahead log: a commit is appended to it, and is complete or has never been.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from spotjax.engine.log_directory import sync_directory
from spotjax.engine.log_group import Group
from spotjax.engine.log_reading import FORMAT, Contents
from spotjax.engine.log_records import (
    Extent,
    Increment,
    ServiceRecord,
    checksum,
    decode_increments,
    encode,
    join,
)

JOURNAL_ROWS = 2048
"""The journal is compacted when it has more rows than this."""
SLICE_ROWS = 64
"""Rows that are compacted in one transaction, so that no step waits long for it; fewer if they have many bytes."""
SLICE_BYTES = 256 << 10
WAL_BYTES = 4 << 20
"""The write-ahead log is copied into the database after about this much."""

_SCHEMA = """
CREATE TABLE service (number INTEGER PRIMARY KEY, content BLOB NOT NULL, checksum INTEGER NOT NULL);
CREATE TABLE requests (number INTEGER PRIMARY KEY, content BLOB NOT NULL, checksum INTEGER NOT NULL, id TEXT NOT NULL);
CREATE TABLE segments (
    number INTEGER PRIMARY KEY, content BLOB NOT NULL, checksum INTEGER NOT NULL, request INTEGER NOT NULL
);
CREATE INDEX segments_of_request ON segments (request);
CREATE TABLE journal (number INTEGER PRIMARY KEY, content BLOB NOT NULL, checksum INTEGER NOT NULL);
"""


@dataclass
class _Known:
    """A request that is in the database: its number, and how much of each of its sequences is."""

    number: int
    extents: list[Extent]


class LogDatabase:
    """An open database whose contents are known.

    Args:
      connection: to a database with this schema, in autocommit mode.
      contents: what was read from it.
      durability: whether a commit is synced ("step") or only written; ``sync`` makes up for that.
    """

    def __init__(
        self, path: Path, connection: sqlite3.Connection, contents: Contents, durability: Literal["step", "interval"]
    ) -> None:
        self.service = contents.service or ServiceRecord("", "", 0)
        self._path, self._connection = path, connection
        self._known = {
            stored.recorded.request.request_id: _Known(
                stored.number, [Extent.of(state) for state in stored.recorded.states]
            )
            for stored in contents.requests
        }
        self._next_request = contents.last_request + 1
        self._next_segment = contents.last_segment + 1
        self._first_row, self._next_row = contents.journal.start, contents.journal.stop
        """Of the journal; all between are there."""
        self._residue_to = self._next_row - 1 if contents.journal else -1
        """Journal rows up to this one may have something of forgotten requests."""
        self._unchecked = 0
        """Bytes that the write-ahead log got since it was last copied."""
        self._connection.execute("PRAGMA busy_timeout = 100")  # those who only read are never long in the way
        self._synced = durability == "step"
        self._unsynced = False
        self._wal: int | None = None

    @staticmethod
    def connect(path: Path) -> sqlite3.Connection:
        """Opens a file, private to its user, and makes it a database of this schema if it is empty.

        Raises:
          sqlite3.Error: it is something else, or cannot be written.
        """
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10)
        try:
            connection.execute("PRAGMA secure_delete = ON")
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            (pages,) = connection.execute("PRAGMA page_count").fetchone()
            if version == 0 and pages == 0:
                connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA wal_autocheckpoint = 0")
            connection.execute(f"PRAGMA journal_size_limit = {4 * WAL_BYTES}")
            if version == 0 and pages <= 1:
                connection.execute("PRAGMA synchronous = FULL")
                connection.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {FORMAT}; COMMIT;")
                sync_directory(path.parent)
        except BaseException:
            connection.close()
            raise
        return connection

    def begin_service(self, service: ServiceRecord) -> None:
        """Drops everything and belongs to this service from now on."""
        with self._transaction():
            for table in ("service", "requests", "segments", "journal"):
                self._connection.execute(f"DELETE FROM {table}")
            self._put_service(service)
        self.service, self._known = service, {}
        self._first_row = self._next_row
        self._checkpoint("TRUNCATE")

    def __str__(self) -> str:
        return f"commit log {self._path}"

    def write(self, group: Group) -> None:
        """Records a group in one transaction. Steps of unknown requests are dropped: these were refused or forgotten.

        Raises:
          sqlite3.Error: nothing of it is recorded.
        """
        added: dict[str, _Known] = {}
        changed: list[tuple[_Known, int, Extent]] = []
        service = self.service
        with self._transaction():
            for request_id in group.forgotten & self._known.keys():
                number = self._known[request_id].number
                self._connection.execute("DELETE FROM requests WHERE number = ?", (number,))
                self._connection.execute("DELETE FROM segments WHERE request = ?", (number,))
            for accept in group.accepted.values():
                number = self._next_request + len(added)
                self._insert("requests", number, accept.content, accept.request_id)
                added[accept.request_id] = _Known(number, [Extent.of(state) for state in accept.states])
            increments = []
            for (request_id, choice), state in group.states.items():
                known = added.get(request_id) or self._known.get(request_id)
                if known is None or known.extents[choice].ended:
                    continue
                since = known.extents[choice]
                if len(state.tokens) >= since.tokens:
                    increments.append(Increment.of(known.number, state, since))
                    changed.append((known, choice, Extent.of(state)))
            if increments:
                self._insert("journal", self._next_row, encode(increments))
            if group.epoch is not None or not group.writes:  # a group of nothing tries whether writing is possible
                service = ServiceRecord(service.identity, service.model, group.epoch or service.epoch)
                self._put_service(service)
        self.service = service
        if increments:
            self._next_row += 1
        for request_id in group.forgotten:
            if self._known.pop(request_id, None) is not None:
                self._residue_to = self._next_row - 1
        self._next_request += len(added)
        self._known.update(added)
        for known, choice, extent in changed:
            known.extents[choice] = extent

    def maintain(self) -> None:
        """Does a bounded piece of what keeps the files small, if there is any to do. To be called after each group."""
        if self._next_row - self._first_row > JOURNAL_ROWS:
            self._compact()
        if self._unchecked > WAL_BYTES:
            self._checkpoint("PASSIVE")

    def tidy(self) -> bool:
        """Removes a piece of what is left of forgotten requests, for idle times. Returns whether there is more."""
        if self._residue_to < 0:
            return False
        if self._first_row <= self._residue_to:
            self._compact()
            return True
        self._connection.execute("PRAGMA incremental_vacuum(256)").fetchall()
        (free,) = self._connection.execute("PRAGMA freelist_count").fetchone()
        if free:
            return True
        self._checkpoint("TRUNCATE")
        self._residue_to = -1
        return False

    def sync(self) -> None:
        """What was committed survives the loss of power from now on."""
        if not self._unsynced:
            return
        if self._wal is None:
            self._wal = os.open(f"{self._path}-wal", os.O_RDWR | os.O_CLOEXEC)
        os.fdatasync(self._wal)
        self._unsynced = False

    def close(self) -> None:
        """Copies the write-ahead log into the database and closes it."""
        if self._wal is not None:
            os.close(self._wal)
        self._connection.close()

    def _compact(self) -> None:
        """Turns the oldest rows of the journal into segments."""
        live = {known.number for known in self._known.values()}
        pieces: dict[tuple[int, int], list[Increment]] = {}
        rows = self._connection.execute("SELECT number, content FROM journal ORDER BY number LIMIT ?", (SLICE_ROWS,))
        with self._transaction(synced=False):  # if it is undone nothing is lost
            size = last = 0
            for number, content in rows:
                last = number
                for increment in decode_increments(content):
                    if increment.serial in live:
                        pieces.setdefault((increment.serial, increment.choice), []).append(increment)
                size += len(content)
                if size > SLICE_BYTES:
                    break
            rows.close()
            for count, ((request, _), parts) in enumerate(pieces.items()):
                self._insert("segments", self._next_segment + count, encode([join(parts)]), request)
            self._connection.execute("DELETE FROM journal WHERE number <= ?", (last,))
        self._next_segment += len(pieces)
        self._first_row = last + 1

    def _checkpoint(self, mode: str) -> None:
        self._connection.execute(f"PRAGMA wal_checkpoint({mode})").fetchone()
        self._unchecked = 0

    def _insert(self, table: str, number: int, content: bytes, *more: object) -> None:
        places = ", ".join("?" * (3 + len(more)))
        self._connection.execute(
            f"INSERT INTO {table} VALUES ({places})", (number, content, checksum(number, content), *more)
        )
        self._unchecked += len(content) + 8192

    def _put_service(self, service: ServiceRecord) -> None:
        self._connection.execute("DELETE FROM service")
        self._insert("service", 1, encode(service))

    @contextmanager
    def _transaction(self, *, synced: bool = True) -> Iterator[None]:
        """All or nothing."""
        self._connection.execute(f"PRAGMA synchronous = {'FULL' if synced and self._synced else 'NORMAL'}")
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise
        self._unsynced = True
