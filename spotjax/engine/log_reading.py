"""Reads a commit log's database, intact or damaged: what it has, and what is wrong with it. Never writes.

A row is believed if its checksum holds, and an increment if it begins where the one before it ends. So of a damaged log
every sequence is known up to the first token that is missing.
"""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from spotjax.engine.commit_log import RecordedRequest
from spotjax.engine.log_records import (
    AcceptedRecord,
    Increment,
    MalformedRecord,
    ServiceRecord,
    checksum,
    contiguous,
    decode_accepted,
    decode_increments,
    decode_service,
    join,
    state_of,
)

FORMAT = 1
"""Version of the tables and records."""
_SOUGHT = 100_000
"""Rows that are sought one by one behind an unreadable page if it is not known how many there are."""
T = TypeVar("T")


class StoredRequest(NamedTuple):
    """A request and its number in the database."""

    number: int
    recorded: RecordedRequest


@dataclass
class Contents:
    """What was read.

    Attributes:
      service: whose log it is, None in an empty one.
      requests: in order of acceptance.
      journal: numbers of its rows, which follow each other if nothing is damaged.
      last_request: highest number of a request that is or was.
      last_segment: highest number of a segment.
      damage: what is wrong, and what is missing because of it; empty for an intact log.
      salvaged: damage of the log that this one was made from.
    """

    service: ServiceRecord | None = None
    requests: list[StoredRequest] = field(default_factory=list)
    journal: range = range(1, 1)
    last_request: int = 0
    last_segment: int = 0
    damage: list[str] = field(default_factory=list)
    salvaged: list[str] = field(default_factory=list)


def read(connection: sqlite3.Connection) -> Contents:
    """Everything that can be read.

    Raises:
      sqlite3.DatabaseError: it is no database at all, or none of this format.
    """
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version != FORMAT:
        raise sqlite3.DatabaseError(f"its format is {version}, not {FORMAT}")
    contents = Contents()
    _check_structure(connection, contents.damage)
    contents.service = dict(_rows(connection, "service", decode_service, contents.damage)).get(1)
    accepted = dict(_rows(connection, "requests", decode_accepted, contents.damage))
    pieces = _pieces(connection, contents)
    if contents.service is None and (accepted or pieces):
        contents.damage.append("service: it is not known whose requests these are")
    contents.last_request = max([*accepted, *(request for request, _ in pieces)], default=0)
    for number, record in sorted(accepted.items()):
        contents.requests.append(StoredRequest(number, _recorded(number, record, pieces, contents.damage)))
    return contents


def _check_structure(connection: sqlite3.Connection, damage: list[str]) -> None:
    try:
        lines = [line for (line,) in connection.execute("PRAGMA quick_check(10)")]
    except sqlite3.DatabaseError as error:
        lines = [str(error)]
    if lines != ["ok"]:
        damage.extend(" ".join(line.split()) for line in lines)


def _pieces(connection: sqlite3.Connection, contents: Contents) -> dict[tuple[int, int], list[Increment]]:
    """Increments by sequence, in order."""
    pieces: dict[tuple[int, int], list[Increment]] = defaultdict(list)
    for number, increments in _rows(connection, "segments", decode_increments, contents.damage):
        contents.last_segment = number
        for increment in increments:
            pieces[increment.serial, increment.choice].append(increment)
    last = None
    for number, increments in _rows(connection, "journal", decode_increments, contents.damage):
        if last is not None and number != last + 1:
            contents.damage.append(f"journal: of rows {last + 1} to {number - 1} nothing is left")
        contents.journal = range(contents.journal.start if last else number, number + 1)
        last = number
        for increment in increments:
            pieces[increment.serial, increment.choice].append(increment)
    return pieces


def _recorded(
    number: int, record: AcceptedRecord, pieces: dict[tuple[int, int], list[Increment]], damage: list[str]
) -> RecordedRequest:
    """A request with its sequences as far as they have no gap."""
    states = []
    for choice, start in enumerate(record.start):
        parts = [start, *pieces.get((number, choice), ())]
        intact = contiguous(parts)
        whole = join(parts[:intact])
        if intact < len(parts):
            damage.append(
                f"request {record.request.request_id!r}, choice {choice}: {len(whole.tokens)} tokens are intact; those "
                f"that follow are missing, some up to token {parts[-1].offset + len(parts[-1].tokens)} are of no use"
            )
        states.append(state_of(record, choice, whole))
    return RecordedRequest(record.request, tuple(states), record.key)


def _rows(
    connection: sqlite3.Connection, table: str, decode: Callable[[bytes], T], damage: list[str]
) -> Iterator[tuple[int, T]]:
    """The intact rows of a table, in order."""
    for number, content, expected, name in _readable_rows(connection, table, damage):
        row = f"{table}: row {number}" + (f" (request {name!r})" if name is not None else "")
        if not isinstance(content, bytes) or checksum(number, content) != expected:
            damage.append(f"{row} does not match its checksum")
            continue
        try:
            record = decode(content)
        except MalformedRecord as error:
            damage.append(f"{row} is not what this version writes: {error}")
            continue
        yield number, record


def _readable_rows(
    connection: sqlite3.Connection, table: str, damage: list[str]
) -> Iterator[tuple[int, object, object, object]]:
    """The rows of a table, in order; of those in and between unreadable pages all that can be had."""
    columns = "number, content, checksum, " + ("id" if table == "requests" else "NULL")
    last = 0
    try:
        for row in connection.execute(f"SELECT {columns} FROM {table} ORDER BY number"):
            last = row[0]
            yield row
        return
    except sqlite3.DatabaseError as error:
        damage.append(f"{table}: unreadable after row {last}: {error}")
    tail: list[tuple[int, object, object, object]] = []
    with suppress(sqlite3.DatabaseError):
        for row in connection.execute(f"SELECT {columns} FROM {table} WHERE number > ? ORDER BY number DESC", (last,)):
            tail.append(row)
    for number in range(last + 1, tail[-1][0] if tail else last + _SOUGHT):
        with suppress(sqlite3.DatabaseError):
            yield from connection.execute(f"SELECT {columns} FROM {table} WHERE number = ?", (number,)).fetchall()
    yield from reversed(tail)
