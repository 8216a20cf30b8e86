"""The commit log on disk: what it promises. The thread that writes is in ``log_writer``, tables in ``log_database``.

All that was asked for while the disk was busy goes into one transaction (group commit); once that is written, the event
loop is told in the order of the calls. The loop's own thread never waits for a disk.

What is told has been committed, and a commit survives the death of the process in any case. It survives the loss of
power at once with durability ``step``, which syncs before it tells, and up to a second later with ``interval``. A
transaction that was cut off has never been; what comes back is always what was asked for up to some moment. This holds
as far as the disk keeps what it says it has synced: a write-ahead log that is damaged later cannot always be told from
one whose end was never written, and then the log is what it was before that place. Damage to the database is noticed.

No clock of the wall is read. Prompts are private: directory and files belong to their user alone. What is forgotten is
overwritten on disk when nothing was asked for during a second, or some thousands of steps later.
"""

from __future__ import annotations

import asyncio
import sqlite3
import uuid
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from spotjax.engine.commit_log import RecordedRequest
from spotjax.engine.generation import GenerationRequest
from spotjax.engine.log_database import LogDatabase
from spotjax.engine.log_directory import DATABASE, WriterLock
from spotjax.engine.log_group import Accept, Group
from spotjax.engine.log_reading import Contents, read
from spotjax.engine.log_records import ServiceRecord
from spotjax.engine.log_salvage import replace_damaged
from spotjax.engine.log_writer import LogWriter, Operation
from spotjax.engine.request import RequestState
from spotjax.errors import CommitLogError, LogUnavailable, RequestExists

Durability = Literal["step", "interval"]


class DurableLog:
    """A ``CommitLog`` in a directory. ``open`` makes one; the rest is for the event loop's thread.

    Attributes:
      identity: see ``CommitLog``.
      epoch: see ``CommitLog``.
      problem: see ``CommitLog``.
      directory: where it is.
      salvaged: with ``salvage``, what was found to be damaged and what is missing because of it, a line each.
      on_change: called on the loop when ``problem`` changes.
    """

    def __init__(
        self, directory: Path, lock: WriterLock, database: LogDatabase, contents: Contents, durability: Durability
    ) -> None:
        self.directory = directory
        self.identity, self.epoch = database.service.identity, database.service.epoch
        self.problem = ""
        self.salvaged = tuple(contents.salvaged)
        self.on_change: Callable[[], None] = lambda: None
        self._lock = lock
        self._opened_with = {stored.recorded.request.request_id: stored.recorded for stored in contents.requests}
        self._ids = set(self._opened_with)
        """Requests that are recorded, or are about to be."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False
        self._writer = LogWriter(
            database,
            durability,
            recorded=lambda group: self._on_loop(lambda: self._recorded(group)),
            refused=lambda accepts, problem: self._on_loop(lambda: self._refused(accepts, problem)),
            changed=lambda problem: self._on_loop(lambda: self._changed(problem)),
        )

    @classmethod
    def open(cls, directory: Path, durability: Durability, model: str, *, salvage: bool = False) -> DurableLog:
        """Opens the log in a directory, or makes a new one. Waits for the disk: not for the loop's thread.

        Args:
          directory: made if there is none.
          durability: what being told means, see the module.
          model: fingerprint of what is served. A log of another model without requests that go on is begun anew.
          salvage: if it is damaged, go on with every request as far as its records are intact. The damaged file is
            kept beside it.

        Raises:
          CommitLogError: it is in use, damaged, not readable, or has requests of another model that go on.
        """
        lock = WriterLock(directory)
        try:
            connection, contents = _read(directory, model, salvage=salvage)
            if contents.service is None and lock.identity:
                connection.close()
                raise CommitLogError(
                    f"the commit log {directory} was that of service {lock.identity} and is empty now; put its files "
                    "back, or remove the directory to begin anew"
                )
            database = _of_service(directory, connection, contents, durability, model)
            try:
                lock.mark(database.service.identity)
            except OSError as error:
                database.close()
                raise CommitLogError(f"the commit log {directory} cannot be marked as in use: {error}") from error
        except BaseException:
            lock.release()
            raise
        return cls(directory, lock, database, contents, durability)

    def accept(self, request: GenerationRequest, states: Sequence[RequestState], key: int) -> Awaitable[None]:
        """See ``CommitLog.accept``. Who stops waiting does not undo it: the request is recorded until forgotten.

        Raises:
          RequestExists: there is one of that id.
          LogUnavailable: at once while there is a problem, or when awaited.
        """
        if self.problem or self._closed:
            raise LogUnavailable(_unavailable(self.directory, self.problem or "it is closed"))
        if request.request_id in self._ids:
            raise RequestExists(request.request_id)
        done = asyncio.get_running_loop().create_future()
        accept = Accept.of(request, states, key, done)
        self._ids.add(request.request_id)
        self._put(lambda group: group.accept(accept))
        return done

    def append(self, states: Sequence[RequestState], then: Callable[[], None]) -> None:
        """See ``CommitLog.append``. Steps of requests that were refused or forgotten are not recorded."""
        step = tuple(states)
        self._put(lambda group: group.append(step, then))

    def forget(self, request_id: str) -> None:
        """See ``CommitLog.forget``."""
        self._ids.discard(request_id)
        self._opened_with.pop(request_id, None)
        self._put(lambda group: group.forget(request_id))

    def begin_epoch(self, epoch: int) -> None:
        """See ``CommitLog.begin_epoch``."""
        self.epoch = epoch

        def begin(group: Group) -> None:
            group.epoch = epoch

        self._put(begin)

    def replay(self) -> Iterator[RecordedRequest]:
        """See ``CommitLog.replay``; without what was forgotten since."""
        return iter(tuple(self._opened_with.values()))

    async def close(self) -> None:
        """See ``CommitLog.close``. What could not be written is told to nobody."""
        if self._closed:
            return
        self._put(None)
        self._closed = True
        await asyncio.to_thread(self._writer.join)
        self._lock.release()

    def _put(self, operation: Operation | None) -> None:
        if self._closed:
            return
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._writer.start()
        self._writer.put(operation)

    def _on_loop(self, call: Callable[[], None]) -> None:
        """From the writer's thread."""
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(call)

    def _recorded(self, group: Group) -> None:
        for accept in group.accepts:
            if accept.done is not None and not accept.done.done():  # who asked may have gone
                accept.done.set_result(None)
        for then in group.then:
            self._call(then)

    def _call(self, then: Callable[[], None]) -> None:
        try:
            then()
        except Exception as error:  # those that follow must be told all the same
            assert self._loop is not None
            self._loop.call_exception_handler({"message": "telling what was recorded failed", "exception": error})

    def _refused(self, accepts: list[Accept], problem: str) -> None:
        for accept in accepts:
            self._ids.discard(accept.request_id)
            if accept.done is not None and not accept.done.done():
                accept.done.set_exception(LogUnavailable(_unavailable(self.directory, problem)))

    def _changed(self, problem: str) -> None:
        self.problem = problem
        self._call(self.on_change)


def _unavailable(directory: Path, problem: str) -> str:
    return f"the commit log {directory} cannot be written: {problem}; try again when that is mended"


def _read(directory: Path, model: str, *, salvage: bool) -> tuple[sqlite3.Connection, Contents]:
    """The database in a directory whose lock is held, and what is in it."""
    path = directory / DATABASE
    advice = f"restore what is intact by opening it with salvage, or move {directory} away to begin anew"
    connection = None
    try:
        connection = LogDatabase.connect(path)
        contents = read(connection)
        if contents.damage and salvage:
            replace_damaged(path, connection, contents, model)
            connection, salvaged = LogDatabase.connect(path), contents.damage
            contents = read(connection)
            contents.salvaged = salvaged
        if contents.damage:
            more = f" (and {len(contents.damage) - 1} more)" if len(contents.damage) > 1 else ""
            raise CommitLogError(f"the commit log {path} is damaged: {contents.damage[0]}{more}; {advice}")
    except (sqlite3.Error, OSError, CommitLogError) as error:
        if connection is not None:
            connection.close()
        if isinstance(error, CommitLogError):
            raise
        raise CommitLogError(f"the commit log {path} cannot be read: {error}; {advice}") from error
    return connection, contents


def _of_service(
    directory: Path, connection: sqlite3.Connection, contents: Contents, durability: Durability, model: str
) -> LogDatabase:
    """The database as that of a service with this model; new if it was another's and is not needed any more."""
    path = directory / DATABASE
    try:
        database = LogDatabase(path, connection, contents, durability)
        if contents.service is not None and contents.service.model != model:
            going_on = sum(stored.recorded.goes_on for stored in contents.requests)
            if going_on:
                raise CommitLogError(
                    f"the commit log {path} has {going_on} unfinished requests of another model, "
                    f"{contents.service.model}, and {model} is to be served; serve that one to finish them, or use "
                    f"another directory (--commit-log), or remove {directory}"
                )
            contents.service = None
            contents.requests.clear()
        if contents.service is None:
            database.begin_service(ServiceRecord(uuid.uuid4().hex, model, 0))
    except (sqlite3.Error, OSError) as error:
        connection.close()
        raise CommitLogError(f"the commit log {path} cannot be written: {error}") from error
    except CommitLogError:
        connection.close()
        raise
    return database
