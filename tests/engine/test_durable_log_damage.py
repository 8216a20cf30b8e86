"""Files that were cut or garbled: the log is what it was earlier, or says what is wrong and can be salvaged."""

from __future__ import annotations

import random
import sqlite3
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from log_cases import Traffic, accepted, contents, grown, new_request, opened, recorded, small_limits, told

from spotjax.engine.commit_log import RecordedRequest
from spotjax.engine.log_directory import DATABASE
from spotjax.engine.log_inspection import inspect_log
from spotjax.engine.log_records import checksum
from spotjax.errors import CommitLogError

WAL = f"{DATABASE}-wal"
HEADER = 32
"""Bytes before the first frame of a write-ahead log."""
FRAME = 24 + 4096


def copied(directory: Path, target: Path) -> Path:
    """The files as they are now, as of a process that was killed."""
    target.mkdir()
    for name in (DATABASE, WAL, "lock"):
        if (directory / name).exists():
            subprocess.run(["cp", directory / name, target / name], check=True)
    return target


@dataclass
class Moment:
    """What had been told when the write-ahead log had a size."""

    size: int
    held: Mapping[str, RecordedRequest]


@pytest.fixture
async def history(tmp_path: Path) -> tuple[Path, list[Moment]]:
    """The files of a killed process whose write-ahead log was never copied into the database, and its moments."""
    traffic = Traffic(random.Random(1))
    log = opened(tmp_path / "log")
    wal = tmp_path / "log" / WAL
    moments = [Moment(0, {})]
    for step in range(60):
        if step % 5 == 0:
            request = traffic.accept("r")
            await log.accept(request.request, request.states, request.key)
        elif step % 17 == 0:
            log.forget(str(traffic.forget()))
            await told(log, [])
        else:
            await told(log, traffic.step())
        moments.append(Moment(wal.stat().st_size, dict(traffic.held)))
    crashed = copied(tmp_path / "log", tmp_path / "crashed")
    await log.close()
    return crashed, moments


def told_by(moments: list[Moment], size: int) -> int:
    """Which was the last moment whose files are no larger."""
    return max(index for index, moment in enumerate(moments) if moment.size <= size)


async def test_a_write_ahead_log_that_was_cut_has_all_that_was_told_before_the_cut(
    history: tuple[Path, list[Moment]], tmp_path: Path
) -> None:
    crashed, moments = history
    whole = (crashed / WAL).stat().st_size
    frames = range(HEADER, whole + 1, FRAME)
    chance = random.Random(2)
    cuts = {0, 1, HEADER - 1, whole, *frames, *(frame + 24 for frame in frames), *(chance.choices(range(whole), k=60))}
    for number, cut in enumerate(sorted(cut for cut in cuts if cut <= whole)):
        directory = copied(crashed, tmp_path / f"cut-{number}")
        with (directory / WAL).open("r+b") as file:
            file.truncate(cut)
        # SQLite commits whole transactions, so the log is exactly what had been told when the file had that size
        assert await contents(directory) == moments[told_by(moments, cut)].held, f"cut at {cut}"


async def test_a_write_ahead_log_that_was_garbled_has_all_that_was_told_before_that_place(
    history: tuple[Path, list[Moment]], tmp_path: Path
) -> None:
    crashed, moments = history
    whole = (crashed / WAL).stat().st_size
    chance = random.Random(3)
    for number in range(100):
        directory = copied(crashed, tmp_path / f"garbled-{number}")
        place = chance.randrange(whole) if number > 30 else number  # all of the header
        with (directory / WAL).open("r+b") as file:
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ chance.randrange(1, 256)]))
        held = await contents(directory)
        frame = (place - HEADER) // FRAME * FRAME + HEADER if place >= HEADER else 0
        least = told_by(moments, frame)
        # the header has fields that do not matter, so there may be more
        assert any(held == moment.held for moment in moments[least:]), f"garbled at {place}"
        if place >= HEADER:
            assert held == moments[least].held


@pytest.mark.parametrize("seed", range(4))
async def test_a_write_ahead_log_that_was_cut_after_parts_were_copied_is_noticed_or_is_an_earlier_moment(
    tmp_path: Path, seed: int
) -> None:
    chance, moments = random.Random(seed), [dict[str, RecordedRequest]()]
    traffic = Traffic(chance)
    with small_limits(rows=16, piece=4, wal=100 << 10):
        log = opened(tmp_path / "log")
        for step in range(chance.randint(50, 150)):
            if step % 4 == 0:
                request = traffic.accept("r")
                await log.accept(request.request, request.states, request.key)
            else:
                await told(log, traffic.step())
            moments.append(dict(traffic.held))
        crashed = copied(tmp_path / "log", tmp_path / "crashed")
        await log.close()
    for number in range(20):
        directory = copied(crashed, tmp_path / f"cut-{number}")
        with (directory / WAL).open("r+b") as file:
            file.truncate(chance.randrange((crashed / WAL).stat().st_size + 1))
        try:
            assert await contents(directory) in moments
        except CommitLogError as error:
            assert "damaged" in str(error)


async def busy_log(directory: Path, steps: int = 300) -> dict[str, RecordedRequest]:
    """A log with rows in all tables."""
    traffic = Traffic(random.Random(4))
    with small_limits(rows=32, piece=8):
        log = opened(directory)
        for step in range(steps):
            if len(traffic.held) < 8:
                request = traffic.accept("r")
                await log.accept(request.request, request.states, request.key)
            if step % 40 == 39:
                log.forget(str(traffic.forget()))
            log.append(traffic.step(), lambda: None)
            if step % 3 == 0:
                await told(log, [])
        await log.close()
    return traffic.held


async def test_a_garbled_database_is_noticed_unless_nothing_is_lost(tmp_path: Path) -> None:
    held = await busy_log(tmp_path / "log")
    content = (tmp_path / "log" / DATABASE).read_bytes()
    chance, noticed = random.Random(5), 0
    for number in range(120):
        directory = copied(tmp_path / "log", tmp_path / f"garbled-{number}")
        place, length = chance.randrange(len(content)), chance.choice([1, 1, 8, 512, 4096])
        garbled = content[:place] + chance.randbytes(length) + content[place + length :]
        (directory / DATABASE).write_bytes(garbled)
        try:
            assert await contents(directory) == held, f"{length} bytes at {place}"
        except CommitLogError as error:
            noticed += 1
            assert DATABASE in str(error)
            assert "salvage" in str(error)
    assert noticed > 30


async def test_a_truncated_database_is_noticed_unless_nothing_is_lost(tmp_path: Path) -> None:
    held = await busy_log(tmp_path / "log", steps=100)
    size = (tmp_path / "log" / DATABASE).stat().st_size
    for number, cut in enumerate([0, 1, 50, 100, 4095, 4096, size // 2, size - 4096, size - 1]):
        directory = copied(tmp_path / "log", tmp_path / f"cut-{number}")
        with (directory / DATABASE).open("r+b") as file:
            file.truncate(cut)
        if cut == size - 1 and await intact(directory, held):
            continue  # the last byte was of no use, or the zero that is read in its place
        with pytest.raises(CommitLogError, match="commit log"):
            opened(directory)
        with pytest.raises(CommitLogError, match="commit log"):
            opened(directory)  # the first try has not made it look whole


async def intact(directory: Path, held: dict[str, RecordedRequest]) -> bool:
    """Whether a log opens with all that it is to have; one that opens with anything else fails the test."""
    try:
        found = await contents(directory)
    except CommitLogError:
        return False
    assert found == held
    return True


async def test_a_log_whose_database_vanished_is_not_taken_for_a_new_one(tmp_path: Path) -> None:
    log = opened(tmp_path)
    await accepted(log, new_request("a"))
    await log.close()
    (tmp_path / DATABASE).unlink()
    with pytest.raises(CommitLogError, match=f"was that of service {log.identity} and is empty now"):
        opened(tmp_path)


async def test_something_else_is_not_overwritten(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / DATABASE) as connection:
        connection.execute("CREATE TABLE something (else_ TEXT)")
    connection.close()
    with pytest.raises(CommitLogError, match="its format is 0, not 1"):
        opened(tmp_path)
    (tmp_path / DATABASE).write_text("something else " * 1000)
    with pytest.raises(CommitLogError, match="file is not a database"):
        opened(tmp_path)
    assert (tmp_path / DATABASE).read_text().startswith("something else")


class Editor:
    """Changes rows of a log that nobody has open."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / DATABASE

    def __call__(self, statement: str, *values: object) -> list[tuple[object, ...]]:
        with sqlite3.connect(self._path) as connection:
            rows = connection.execute(statement, values).fetchall()
        connection.close()
        return rows


async def three_requests(directory: Path) -> Editor:
    """Three requests with five tokens each, of which a row of the journal each has one."""
    log = opened(directory)
    states = [(await accepted(log, new_request(name)))[0] for name in "abc"]
    for count in range(1, 6):
        await told(log, [grown(state, count) for state in states])
    log.begin_epoch(3)
    await log.close()
    return Editor(directory)


GARBLED = "SET content = CAST(content || 'x' AS BLOB)"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (f"UPDATE requests {GARBLED} WHERE number = 2", r"requests: row 2 \(request 'b'\) does not match its checksum"),
        (f"UPDATE journal {GARBLED} WHERE number = 3", r"journal: row 3 does not match its checksum \(and 4 more\)"),
        ("DELETE FROM journal WHERE number IN (2, 3)", "journal: of rows 2 to 3 nothing is left"),
        ("UPDATE journal SET number = 9 WHERE number = 5", "journal: row 9 does not match its checksum"),
        ("DELETE FROM service", "service: it is not known whose requests these are"),
        ("DROP TABLE segments", "segments: unreadable after row 0: no such table: segments"),
    ],
)
async def test_damage_is_named_by_file_and_row(tmp_path: Path, damage: str, message: str) -> None:
    edit = await three_requests(tmp_path)
    edit(damage)
    with pytest.raises(CommitLogError, match=message) as raised:
        opened(tmp_path)
    assert str(tmp_path / DATABASE) in str(raised.value)
    assert f"move {tmp_path} away to begin anew" in str(raised.value)
    assert any(line in str(raised.value) for line in inspect_log(tmp_path).damage)


async def test_a_row_that_another_version_wrote_is_not_misread(tmp_path: Path) -> None:
    edit = await three_requests(tmp_path)
    content = b"\x91\x01"
    edit("UPDATE journal SET content = ?, checksum = ? WHERE number = 5", content, checksum(5, content))
    with pytest.raises(CommitLogError, match="journal: row 5 is not what this version writes: Expected `array`"):
        opened(tmp_path)


async def test_salvage_keeps_every_request_up_to_what_is_missing_and_says_so(tmp_path: Path) -> None:
    edit = await three_requests(tmp_path)
    edit(f"UPDATE journal {GARBLED} WHERE number = 3")
    edit(f"UPDATE requests {GARBLED} WHERE number = 2")
    identity = inspect_log(tmp_path).identity
    log = opened(tmp_path, salvage=True)
    expected = {name: grown(new_request(name).states[0], 2) for name in "ac"}
    assert {name: request.states[0] for name, request in recorded(log).items()} == expected
    assert (log.identity, log.epoch) == (identity, 3)
    assert log.salvaged == (
        "requests: row 2 (request 'b') does not match its checksum",
        "journal: row 3 does not match its checksum",
        "journal: of rows 3 to 3 nothing is left",
        "request 'a', choice 0: 2 tokens are intact; those that follow are missing, some up to token 5 are of no use",
        "request 'c', choice 0: 2 tokens are intact; those that follow are missing, some up to token 5 are of no use",
    )
    await told(log, [grown(state) for state in expected.values()])
    await log.close()
    again = opened(tmp_path)
    assert recorded(again)["a"].states == (grown(expected["a"]),)
    assert again.salvaged == ()
    await again.close()
    assert (tmp_path / "damaged-1.sqlite").exists()
    assert not (tmp_path / "salvaged.sqlite").exists()


async def test_salvaging_what_is_intact_changes_nothing(tmp_path: Path) -> None:
    await three_requests(tmp_path)
    before = await contents(tmp_path)
    log = opened(tmp_path, salvage=True)
    assert (recorded(log), log.salvaged) == (before, ())
    await log.close()
    assert not (tmp_path / "damaged-1.sqlite").exists()


async def test_every_salvage_keeps_what_was_damaged_whatever_was_removed_of_earlier_ones(tmp_path: Path) -> None:
    edit = await three_requests(tmp_path)
    kept: dict[str, bytes] = {}
    for number in range(1, 5):
        edit(f"UPDATE service {GARBLED}")
        await opened(tmp_path, salvage=True).close()
        kept[f"damaged-{number}.sqlite"] = (tmp_path / f"damaged-{number}.sqlite").read_bytes()
        if number == 2:
            (tmp_path / "damaged-1.sqlite").unlink()
            del kept["damaged-1.sqlite"]
    assert {file.name: file.read_bytes() for file in tmp_path.glob("damaged*")} == kept


async def test_salvage_without_the_name_of_the_service_is_a_new_service(tmp_path: Path) -> None:
    edit = await three_requests(tmp_path)
    identity = inspect_log(tmp_path).identity
    edit("DELETE FROM service")
    log = opened(tmp_path, salvage=True)
    assert list(recorded(log)) == ["a", "b", "c"]
    assert log.identity != identity
    await log.close()


async def test_of_a_garbled_database_nothing_wrong_is_salvaged(tmp_path: Path) -> None:
    held = await busy_log(tmp_path / "log")
    content = (tmp_path / "log" / DATABASE).read_bytes()
    chance, salvaged, kept = random.Random(6), 0, 0
    for number in range(60):
        directory = copied(tmp_path / "log", tmp_path / f"garbled-{number}")
        place = 4096 * chance.randrange(1, len(content) // 4096) + chance.randrange(2048)
        (directory / DATABASE).write_bytes(content[:place] + chance.randbytes(2048) + content[place + 2048 :])
        try:
            log = opened(directory, salvage=True)
        except CommitLogError:
            continue
        salvaged += bool(log.salvaged)
        for name, request in recorded(log).items():
            assert request.request == held[name].request
            for state in request.states:
                whole = held[name].states[state.choice]
                assert state.tokens == whole.tokens[: len(state.tokens)]
                assert whole.text.startswith(state.text)
                assert state == whole or log.salvaged
            kept += 1
        await log.close()
        assert await contents(directory) == recorded(log)
    assert salvaged > 20
    assert kept > 60
