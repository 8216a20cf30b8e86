"""Looks into a commit log without writing to it, and copies it; whether or not a process has it open."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from spotjax.engine.log_directory import DATABASE, WriterLock, sync_directory
from spotjax.engine.log_reading import Contents, read
from spotjax.errors import CommitLogError


@dataclass(frozen=True)
class RequestSummary:
    """How far a request is; nothing of what it says.

    Attributes:
      request_id: of the request.
      key: of its first sequence.
      prompt_tokens: length of the prompt.
      tokens: output tokens of each choice so far.
      ended: whether each choice has ended.
      resumable: whether it goes on without its client; the others end when the log is opened.
    """

    request_id: str
    key: int
    prompt_tokens: int
    tokens: tuple[int, ...]
    ended: tuple[bool, ...]
    resumable: bool

    @property
    def unfinished(self) -> int:
        """Choices that have not ended."""
        return self.ended.count(False)

    @property
    def goes_on(self) -> bool:
        """See ``RecordedRequest.goes_on``."""
        return self.resumable and self.unfinished > 0


@dataclass(frozen=True)
class LogSummary:
    """What is in a log.

    Attributes:
      identity: of the service whose log it is.
      model: fingerprint of what it serves.
      epoch: last that was recorded.
      requests: all that are not forgotten, in order of acceptance.
      damage: what is wrong with it, a line each; empty if it is intact.
    """

    identity: str
    model: str
    epoch: int
    requests: tuple[RequestSummary, ...]
    damage: tuple[str, ...]

    @property
    def going_on(self) -> tuple[RequestSummary, ...]:
        """Requests that go on when the log is opened."""
        return tuple(request for request in self.requests if request.goes_on)


def inspect_log(directory: Path) -> LogSummary:
    """What is in a log, damaged or not. Waits for the disk.

    Raises:
      CommitLogError: there is none, or nothing of it can be read.
    """
    contents = read_log(directory)
    service = contents.service
    return LogSummary(
        service.identity if service else "",
        service.model if service else "",
        service.epoch if service else 0,
        tuple(
            RequestSummary(
                recorded.request.request_id,
                recorded.key,
                len(recorded.request.prompt),
                tuple(len(state.tokens) for state in recorded.states),
                tuple(state.finish is not None for state in recorded.states),
                recorded.request.resumable,
            )
            for _, recorded in contents.requests
        ),
        tuple(contents.damage),
    )


def read_log(directory: Path) -> Contents:
    """All that is in a log at one moment, damaged or not. Waits for the disk.

    Raises:
      CommitLogError: there is none, or nothing of it can be read.
    """
    with _reading(directory) as connection:
        connection.execute("BEGIN")  # all of one moment
        return read(connection)


def copy_log(source: Path, target: Path) -> None:
    """Copies the log in one directory, as it is at one moment, to another that has none. Waits for the disk.

    Raises:
      CommitLogError: there is none, there is one already, or it could not be read or written.
    """
    with _reading(source) as connection:
        lock = WriterLock(target)
        try:
            path = target / DATABASE
            if path.exists():
                raise CommitLogError(f"{target} has a commit log already; copy to another directory")
            part = target / f"{DATABASE}.part"
            part.unlink(missing_ok=True)
            os.close(os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            with closing(sqlite3.connect(part)) as copy:
                connection.backup(copy)
            part.rename(path)
            sync_directory(target)
        except OSError as error:
            raise CommitLogError(f"the commit log {source} cannot be copied to {target}: {error}") from error
        finally:
            lock.release()


@contextmanager
def _reading(directory: Path) -> Iterator[sqlite3.Connection]:
    """A connection that cannot write."""
    path = directory / DATABASE
    if not path.is_file():
        raise CommitLogError(f"there is no commit log in {directory}: no file {DATABASE}")
    try:
        with closing(
            sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, isolation_level=None)
        ) as connection:
            yield connection
    except sqlite3.Error as error:
        raise CommitLogError(f"the commit log {path} cannot be read: {error}") from error
