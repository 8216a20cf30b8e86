"""Replaces a damaged commit log by one with all that is intact. At every moment one of them is in place."""

from __future__ import annotations

import os
import sqlite3
import uuid
from pathlib import Path

from spotjax.engine.log_database import LogDatabase
from spotjax.engine.log_directory import sync_directory
from spotjax.engine.log_group import Accept, Group
from spotjax.engine.log_reading import Contents
from spotjax.engine.log_records import ServiceRecord
from spotjax.errors import CommitLogError


def replace_damaged(path: Path, connection: sqlite3.Connection, contents: Contents, model: str) -> None:
    """Closes a damaged database and puts one with its intact contents in its place.

    Args:
      path: of the database.
      connection: the only one to it.
      contents: what was read.
      model: fingerprint of what is served, in case the log does not say any more whose it is.

    Raises:
      CommitLogError: the write-ahead log could not be copied into the damaged database, which is as it was.
      sqlite3.Error, OSError: the new one could not be written; the damaged one is as it was.
    """
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    connection.close()
    wal = Path(f"{path}-wal")
    if wal.exists() and wal.stat().st_size:
        raise CommitLogError(f"{wal} is still in use; end the processes that read it and try again")
    fresh = path.with_name("salvaged.sqlite")
    fresh.unlink(missing_ok=True)
    _write(fresh, contents, contents.service or ServiceRecord(uuid.uuid4().hex, model, 0))
    os.link(path, _aside(path.parent))
    fresh.replace(path)
    sync_directory(path.parent)


def _aside(directory: Path) -> Path:
    """A name behind those of earlier salvages, of which some may have been removed."""
    names = (path.stem.removeprefix("damaged-") for path in directory.glob("damaged-*.sqlite"))
    last = max((int(name) for name in names if name.isdecimal()), default=0)
    return directory / f"damaged-{last + 1}.sqlite"


def _write(path: Path, contents: Contents, service: ServiceRecord) -> None:
    database = LogDatabase(path, LogDatabase.connect(path), Contents(), "step")
    try:
        database.begin_service(service)
        group = Group()
        for _, recorded in contents.requests:
            group.accept(Accept.of(recorded.request, recorded.states, recorded.key))
        database.write(group)
    finally:
        database.close()
