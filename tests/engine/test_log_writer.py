"""The writer's thread waits when there is nothing to do, and says a problem once, however often it tries."""

from __future__ import annotations

import errno
import os
import queue
from types import SimpleNamespace

import pytest
from log_cases import new_request

from spotjax.engine import log_writer
from spotjax.engine.log_group import Accept, Group
from spotjax.engine.log_writer import RETRY_SECONDS, SYNC_SECONDS, LogWriter, Operation


class BrokenDisk:
    """A database that is written until the disk fails.

    Attributes:
      problem: raised by everything that writes, None while all is well.
      tries: times that something was to be written.
    """

    def __init__(self) -> None:
        self.problem: Exception | None = None
        self.tries = 0

    def write(self, group: Group) -> None:
        self._try()

    def sync(self) -> None:
        self._try()

    def maintain(self) -> None: ...

    def tidy(self) -> bool:
        return False

    def close(self) -> None: ...

    def _try(self) -> None:
        self.tries += 1
        if self.problem is not None:
            raise self.problem


class VirtualTime:
    """A clock, and a queue whose waits are what it goes by. Operations come at their times, the end last.

    Attributes:
      wakeups: times that somebody waited.
    """

    def __init__(self, operations: dict[float, Operation], end: float) -> None:
        self.now, self.wakeups = 0.0, 0
        self._coming: list[tuple[float, Operation | None]] = [*sorted(operations.items(), key=lambda one: one[0])]
        self._coming.append((end, None))

    def monotonic(self) -> float:
        return self.now

    def empty(self) -> bool:
        return self._coming[0][0] > self.now

    def get_nowait(self) -> Operation | None:
        if self.empty():
            raise queue.Empty
        return self._coming.pop(0)[1]

    def get(self, timeout: float | None) -> Operation | None:
        self.wakeups += 1
        assert self.wakeups < 10_000, "it spins"
        due = self._coming[0][0]
        self.now = due if timeout is None else min(max(due, self.now), self.now + timeout)
        return self.get_nowait()


def write_until(monkeypatch: pytest.MonkeyPatch, durability: str, database: BrokenDisk, time: VirtualTime) -> list[str]:
    """Runs a writer to its end. Returns: the problems that it told."""
    told: list[str] = []
    monkeypatch.setattr(log_writer, "time", time)
    monkeypatch.setattr(log_writer, "queue", SimpleNamespace(SimpleQueue=lambda: time, Empty=queue.Empty))
    LogWriter(database, durability, lambda group: None, lambda accepts, why: None, told.append).run()
    return told


def accept(group: Group) -> None:
    request = new_request("a")
    group.accept(Accept.of(request.request, request.states, request.key))


@pytest.mark.parametrize("durability", ["step", "interval"])
@pytest.mark.parametrize("failing_from", [0.0, SYNC_SECONDS / 2])
def test_a_writer_of_a_full_disk_wakes_up_only_to_try_again(
    monkeypatch: pytest.MonkeyPatch, durability: str, failing_from: float
) -> None:
    database, seconds = BrokenDisk(), 100 * RETRY_SECONDS

    def fill(group: Group) -> None:
        database.problem = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        group.epoch = 1

    time = VirtualTime({0.0: accept, failing_from: fill} if failing_from else {0.0: fill}, seconds)
    (told,) = write_until(monkeypatch, durability, database, time)
    assert "No space left" in told
    assert 90 <= database.tries <= time.wakeups + 1 <= 105


@pytest.mark.parametrize("durability", ["step", "interval"])
def test_a_writer_with_nothing_to_do_sleeps(monkeypatch: pytest.MonkeyPatch, durability: str) -> None:
    time = VirtualTime({0.0: accept}, 1e6)
    assert write_until(monkeypatch, durability, BrokenDisk(), time) == []
    assert time.wakeups <= 5


def test_an_error_that_nobody_expected_is_logged_once_while_it_stays(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    database = BrokenDisk()

    def fail(problem: Exception) -> Operation:
        def operation(group: Group) -> None:
            group.epoch, database.problem = 1, problem

        return operation

    first, second = ZeroDivisionError("first"), ZeroDivisionError("second")
    time = VirtualTime({0.0: fail(first), 10.0: fail(second)}, 20.0)
    assert write_until(monkeypatch, "step", database, time) == [repr(first), repr(second)]
    logged = [record.exc_info[1] for record in caplog.records if record.exc_info is not None]
    assert logged == [first, second]
    assert database.tries > 30
