"""While a disk cannot be written nothing new is accepted and nothing is told; nothing is lost and all goes on later."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from log_cases import accepted, contents, grown, new_request, opened, recorded, told

from spotjax.engine import log_writer
from spotjax.engine.durable_log import DurableLog
from spotjax.engine.log_database import LogDatabase
from spotjax.engine.log_directory import DATABASE
from spotjax.engine.log_group import Accept, Group
from spotjax.engine.log_reading import Contents, read
from spotjax.engine.log_records import ServiceRecord
from spotjax.engine.request import RequestState
from spotjax.errors import CommitLogError, LogUnavailable


@pytest.fixture(autouse=True)
def quick_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_writer, "RETRY_SECONDS", 0.01)


class LimitedDisk:
    """Makes databases that are opened within it full, or lets them grow again."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._connections: list[sqlite3.Connection] = []
        connect = LogDatabase.connect

        def connected(path: Path) -> sqlite3.Connection:
            self._connections.append(connect(path))
            return self._connections[-1]

        monkeypatch.setattr(LogDatabase, "connect", staticmethod(connected))

    def fill(self) -> None:
        connection = self._connections[-1]
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count = {pages}").fetchone()

    def clear(self) -> None:
        self._connections[-1].execute("PRAGMA max_page_count = 1000000").fetchone()


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> LimitedDisk:
    return LimitedDisk(monkeypatch)


async def until(log: DurableLog, problem: bool) -> None:
    """Waits for a problem to come or go."""
    event = asyncio.Event()
    log.on_change = event.set
    async with asyncio.timeout(60):
        while bool(log.problem) is not problem:
            event.clear()
            await event.wait()


def large(name: str) -> RequestState:
    """Takes more than a page."""
    return grown(new_request(name).states[0], 3_000)


async def test_a_full_disk_refuses_requests_and_delays_steps(
    tmp_path: Path, disk: LimitedDisk, caplog: pytest.LogCaptureFixture
) -> None:
    log, order = opened(tmp_path), []
    await accepted(log, new_request("a"))
    disk.fill()
    log.append([large("a")], lambda: order.append(1))
    refused = new_request("b", stop=("b" * 20_000,))
    with pytest.raises(LogUnavailable, match=r"cannot be written: database or disk is full; try again"):
        await accepted(log, refused)
    log.append([grown(large("a"))], lambda: order.append(2))
    log.append(refused.states, lambda: order.append(3))  # a step of what was refused comes in too late
    log.begin_epoch(4)
    await until(log, problem=True)
    assert "full" in log.problem
    with pytest.raises(LogUnavailable, match="full"):
        log.accept(refused.request, refused.states, 1)  # at once, though the disk has not been asked
    assert order == []
    disk.clear()
    await until(log, problem=False)
    await told(log, [])
    assert order == [1, 2, 3]
    await accepted(log, new_request("c"))
    await log.close()
    again = opened(tmp_path)
    assert list(recorded(again)) == ["a", "c"]
    assert recorded(again)["a"].states == (grown(large("a")),)
    assert again.epoch == 4
    await again.close()
    lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert [line.split(": ")[-1] for line in lines[:1]] == [
        "database or disk is full; nothing is accepted or told until it can"
    ]
    assert [line for line in lines[1:] if not line.endswith("is written again")] == []
    assert len(lines) == 2


async def test_nobody_is_told_when_a_log_is_closed_on_a_full_disk(
    tmp_path: Path, disk: LimitedDisk, caplog: pytest.LogCaptureFixture
) -> None:
    log = opened(tmp_path)
    await accepted(log, new_request("a"))
    disk.fill()
    request = new_request("b", stop=("b" * 20_000,))
    log.append([large("a")], lambda: pytest.fail("told and not recorded"))
    waiting = log.accept(request.request, request.states, request.key)
    await log.close()
    with pytest.raises(LogUnavailable, match="full"):
        await waiting
    assert "is closed; 1 steps could not be written" in caplog.text
    assert (await contents(tmp_path))["a"] == new_request("a")


async def test_requests_are_forgotten_on_a_full_disk_once_there_is_space(tmp_path: Path, disk: LimitedDisk) -> None:
    log = opened(tmp_path)
    for name in "abc":
        await accepted(log, new_request(name))
    disk.fill()
    log.append([large("a")], lambda: None)
    await until(log, problem=True)
    log.forget("a")
    log.forget("b")
    await until(log, problem=False)  # what did not fit is of no interest any more
    await log.close()
    assert list(await contents(tmp_path)) == ["c"]


@pytest.mark.parametrize("failing", ["write", "maintain", "sync"])
async def test_any_error_of_the_disk_is_a_problem_until_it_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    monkeypatch.setattr(log_writer, "SYNC_SECONDS", 0.0)
    log, broken = opened(tmp_path, "interval"), True
    (state,) = await accepted(log, new_request("a"))
    works = getattr(LogDatabase, failing)

    def fails(*args: object) -> None:
        if broken:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        works(*args)

    monkeypatch.setattr(LogDatabase, failing, fails)
    log.append([grown(state)], lambda: None)
    await until(log, problem=True)
    assert "Input/output error" in log.problem
    broken = False
    await until(log, problem=False)
    await accepted(log, new_request("b"))
    await log.close()
    assert (await contents(tmp_path))["a"].states == (grown(state),)


def test_a_group_is_recorded_as_a_whole_or_not_at_all(tmp_path: Path, disk: LimitedDisk) -> None:
    connection = LogDatabase.connect(tmp_path / DATABASE)
    database = LogDatabase(tmp_path / DATABASE, connection, Contents(), "step")
    database.begin_service(ServiceRecord("identity", "model", 0))
    small, group = new_request("small"), Group()
    group.accept(Accept.of(small.request, small.states, small.key))  # there is room for this
    group.append([large("small")], lambda: None)  # but not for that
    disk.fill()
    with pytest.raises(sqlite3.Error, match="full"):
        database.write(group)
    assert read(connection).requests == []
    disk.clear()
    database.write(group)
    (found,) = read(connection).requests
    assert found.recorded.states == (large("small"),)
    database.close()


async def test_what_cannot_be_written_at_all_is_a_problem_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = opened(tmp_path)
    (state,) = await accepted(log, new_request("a"))
    log.append([replace(state, tokens=(object(),))], lambda: pytest.fail("told and not recorded"))
    await until(log, problem=True)
    assert "object" in log.problem
    assert "this should not happen" in caplog.text
    with pytest.raises(LogUnavailable, match="object"):
        await accepted(log, new_request("b"))
    await log.close()
    assert (await contents(tmp_path))["a"].states == (state,)


async def test_many_steps_that_wait_for_space_are_written_as_one(tmp_path: Path, disk: LimitedDisk) -> None:
    log = opened(tmp_path)
    await accepted(log, new_request("a"))
    disk.fill()
    log.append([large("a")], lambda: None)
    await until(log, problem=True)
    state = large("a")
    for _ in range(300):
        state = grown(state)
        log.append([state], lambda: None)
    disk.clear()
    await told(log, [])
    await log.close()
    with closing(sqlite3.connect(tmp_path / DATABASE)) as connection:
        assert connection.execute("SELECT count(*) FROM journal").fetchone()[0] <= 3
    assert (await contents(tmp_path))["a"].states == (state,)


@pytest.fixture
def small_file_system(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.parametrize("durability", ["step", "interval"])
async def test_a_file_system_fills_up_and_has_space_again(small_file_system: Path, durability: str) -> None:
    ballast = small_file_system / "ballast"
    ballast.write_bytes(bytes(500_000))
    log = opened(small_file_system / "log", durability)
    (state,) = await accepted(log, new_request("a"))
    told_of = 0

    def go_on() -> None:
        nonlocal state
        state = grown(state, 50)

        def tell(length: int = len(state.tokens)) -> None:
            nonlocal told_of
            told_of = length

        log.append([state], tell)

    async with asyncio.timeout(60):
        while not log.problem:
            go_on()
            await asyncio.sleep(0)
    assert "full" in log.problem
    with pytest.raises(LogUnavailable):
        await accepted(log, new_request("b"))
    for _ in range(100):
        go_on()
    assert told_of < len(state.tokens)
    subprocess.run(["cp", "-r", small_file_system / "log", small_file_system.parent / "crashed"], check=True)
    ballast.unlink()
    await until(log, problem=False)
    await told(log, [])
    assert told_of == len(state.tokens)
    await accepted(log, new_request("b"))
    await log.close()
    assert (await contents(small_file_system / "log"))["a"].states == (state,)
    (crashed,) = (await contents(small_file_system.parent / "crashed"))["a"].states
    assert crashed == grown(new_request("a").states[0], len(crashed.tokens))


async def test_a_log_cannot_be_made_on_a_full_file_system(small_file_system: Path) -> None:
    with pytest.raises(OSError, match="No space left"):
        (small_file_system / "ballast").write_bytes(bytes(2 << 20))
    with pytest.raises(CommitLogError, match=r"No space left|full"):
        opened(small_file_system / "log")
    (small_file_system / "ballast").unlink()
    await opened(small_file_system / "log").close()
