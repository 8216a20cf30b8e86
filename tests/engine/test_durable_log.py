"""What was told is there when the log is opened again, exactly once; nothing is told that is not on disk."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from log_cases import Traffic, accepted, contents, grown, new_request, opened, recorded, small_limits, told

from spotjax.engine import log_database, log_writer
from spotjax.engine.commit_log import CommitLog, RecordedRequest
from spotjax.engine.log_database import LogDatabase
from spotjax.engine.log_directory import DATABASE, default_directory
from spotjax.engine.log_inspection import copy_log, inspect_log
from spotjax.engine.request import FinishReason
from spotjax.errors import CommitLogError, LogUnavailable, RequestExists


@pytest.mark.parametrize("durability", ["step", "interval"])
async def test_everything_is_there_again_in_order_of_acceptance(tmp_path: Path, durability: str) -> None:
    log: CommitLog = opened(tmp_path / "log", durability)
    first, second = new_request("b", 2, logprobs=1, stop=("x",)), new_request("a")
    states = await accepted(log, first)
    await accepted(log, second)
    for _ in range(5):
        states[1] = grown(states[1])
        await told(log, states[1:])
    states[0] = grown(states[0], 3, FinishReason.CANCELLED)
    await told(log, states)
    log.begin_epoch(7)
    identity = log.identity
    await log.close()
    again = opened(tmp_path / "log", durability)
    assert list(again.replay()) == [replace(first, states=tuple(states)), second]
    assert (again.identity, again.epoch, again.problem) == (identity, 7, "")
    await again.close()


async def test_a_step_is_told_after_it_is_on_disk_and_in_the_order_of_calls(tmp_path: Path) -> None:
    log = opened(tmp_path)
    (state,) = await accepted(log, new_request("a"))
    on_disk: list[int] = []

    def then(expected: int) -> None:
        (request,) = inspect_log(tmp_path).requests
        assert request.tokens[0] >= expected
        on_disk.append(expected)

    for count in range(1, 21):
        state = grown(state)
        log.append([state], lambda count=count: then(count))
        await asyncio.sleep(0)
    assert len(on_disk) < 20  # the loop went on meanwhile
    await log.close()
    assert on_disk == list(range(1, 21))


async def test_a_step_without_sequences_is_told_in_its_turn(tmp_path: Path) -> None:
    log, order = opened(tmp_path), []
    (state,) = await accepted(log, new_request("a"))
    log.append([grown(state)], lambda: order.append("first"))
    log.append([], lambda: order.append("second"))
    log.append([grown(state, 2)], lambda: order.append("third"))
    await log.close()
    assert order == ["first", "second", "third"]


async def test_one_that_fails_to_be_told_keeps_nobody_from_being_told(tmp_path: Path) -> None:
    errors: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(str(context["exception"])))
    log = opened(tmp_path)
    log.append([], lambda: [][1])
    await told(log, [])
    await log.close()
    assert errors == ["list index out of range"]


async def test_an_id_is_taken_until_it_is_forgotten(tmp_path: Path) -> None:
    log = opened(tmp_path)
    await accepted(log, new_request("a"))
    with pytest.raises(RequestExists, match="'a' is taken"):
        await accepted(log, new_request("a"))
    log.forget("a")
    await accepted(log, new_request("a", 3))
    await log.close()
    assert [len(request.states) for request in (await contents(tmp_path)).values()] == [3]


async def test_an_id_can_be_used_again_at_once_and_has_nothing_of_its_first_use(tmp_path: Path) -> None:
    log = opened(tmp_path)
    for length in range(5):  # all of it in one transaction, or in several
        request = new_request("a")
        done = log.accept(request.request, request.states, request.key)
        log.append([grown(request.states[0], length)], lambda: None)
        if length < 4:
            log.forget("a")
        if length % 2:
            await done
    await log.close()
    (state,) = (await contents(tmp_path))["a"].states
    assert state == grown(new_request("a").states[0], 4)


async def test_a_request_stays_accepted_when_nobody_waits_for_it_any_more(tmp_path: Path) -> None:
    log = opened(tmp_path)
    request = new_request("a")
    asyncio.ensure_future(log.accept(request.request, request.states, request.key)).cancel()
    await log.close()
    assert list(await contents(tmp_path)) == ["a"]


async def test_steps_of_what_is_forgotten_are_told_and_not_recorded(tmp_path: Path) -> None:
    log = opened(tmp_path)
    (state,) = await accepted(log, new_request("a"))
    log.forget("a")
    await told(log, [grown(state)])
    await log.close()
    assert await contents(tmp_path) == {}


async def test_what_ended_stays_as_it_ended(tmp_path: Path) -> None:
    log = opened(tmp_path)
    (state,) = await accepted(log, new_request("a"))
    ended = grown(state, 2, FinishReason.CANCELLED)
    await told(log, [ended])
    await told(log, [grown(state, 5)])
    await log.close()
    assert (await contents(tmp_path))["a"].states == (ended,)


async def test_a_request_that_cannot_be_encoded_is_refused_and_hurts_no_other(tmp_path: Path) -> None:
    log = opened(tmp_path)
    with pytest.raises(UnicodeEncodeError):
        await accepted(log, new_request("a", stop=("\ud800",)))
    await accepted(log, new_request("a"))
    await log.close()


async def test_a_closed_log_accepts_and_tells_nothing(tmp_path: Path) -> None:
    log = opened(tmp_path)
    await accepted(log, new_request("a"))
    await log.close()
    await log.close()
    with pytest.raises(LogUnavailable, match="closed"):
        await accepted(log, new_request("b"))
    log.append([], lambda: pytest.fail("told though it is closed"))
    await asyncio.sleep(0)


async def test_a_log_that_was_never_used_can_be_closed(tmp_path: Path) -> None:
    await opened(tmp_path).close()
    assert await contents(tmp_path) == {}


async def test_the_loop_goes_on_while_the_disk_is_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = opened(tmp_path)
    (state,) = await accepted(log, new_request("a"))
    turn, write = threading.Event(), LogDatabase.write
    monkeypatch.setattr(LogDatabase, "write", lambda *args: (turn.wait(60), write(*args)))
    was_told = asyncio.Event()
    log.append([grown(state)], was_told.set)
    for count in range(2, 100):
        log.append([grown(state, count)], lambda: None)
        await asyncio.sleep(0)
    assert not was_told.is_set()
    turn.set()
    await was_told.wait()
    await log.close()
    assert (await contents(tmp_path))["a"].states == (grown(state, 99),)


@pytest.mark.parametrize(("durability", "level"), [("step", 2), ("interval", 1)])
async def test_with_step_every_commit_is_synced_and_with_interval_it_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durability: str, level: int
) -> None:
    connections: list[sqlite3.Connection] = []
    connect = LogDatabase.connect
    monkeypatch.setattr(LogDatabase, "connect", lambda path: connections.append(connect(path)) or connections[-1])
    log = opened(tmp_path, durability)
    await accepted(log, new_request("a"))
    assert connections[0].execute("PRAGMA synchronous").fetchone() == (level,)
    await log.close()


OPERATIONS = st.lists(
    st.sampled_from(["accept", "accept", "step", "step", "step", "step", "forget", "settle", "epoch", "reopen"]),
    min_size=1,
    max_size=60,
)


@settings(max_examples=60)
@given(OPERATIONS, st.integers(0, 2**32))
def test_none_is_lost_and_none_is_there_twice_whatever_happens(operations: list[str], seed: int) -> None:
    traffic = Traffic(random.Random(seed))

    async def run(directory: Path) -> None:
        log, epoch = opened(directory, "interval"), 0
        problems: list[str] = []
        for operation in [*operations, "reopen"]:
            if operation == "accept":
                request = traffic.accept("r")
                done = log.accept(request.request, request.states, request.key)
                if traffic.chance.random() < 0.5:
                    await done
            elif operation == "step":
                for _ in range(traffic.chance.choice([1, 1, 5])):
                    log.append(traffic.step(), lambda: None)
                    if traffic.chance.random() < 0.7:
                        await told(log, [])
            elif operation == "forget" and (name := traffic.forget()):
                log.forget(name)
            elif operation == "settle":
                await told(log, [])
            elif operation == "epoch":
                epoch += 1
                log.begin_epoch(epoch)
            elif operation == "reopen":
                await log.close()
                log = opened(directory, "interval")
                log.on_change = lambda log=log: problems.append(log.problem)
                assert recorded(log) == traffic.held
                assert list(recorded(log)) == list(traffic.held)
                assert log.epoch == epoch
                assert problems == []
        await log.close()

    with tempfile.TemporaryDirectory() as directory, small_limits(rows=4, piece=2):
        asyncio.run(run(Path(directory)))


async def test_files_stay_small_over_many_requests(tmp_path: Path) -> None:
    sizes, traffic = [], Traffic(random.Random(0))
    with small_limits(rows=64, piece=16):
        log = opened(tmp_path, "interval")
        for step in range(3_000):
            if len(traffic.held) < 12:
                request = traffic.accept("r")
                log.accept(request.request, request.states, request.key)
            else:
                log.forget(str(traffic.forget()))
            await told(log, traffic.step())
            if step % 100 == 99:
                sizes.append(sum((tmp_path / name).stat().st_size for name in (DATABASE, f"{DATABASE}-wal")))
        await log.close()
    assert max(sizes) < 2 * max(sizes[:10])
    assert await contents(tmp_path) == traffic.held


async def test_a_long_sequence_is_written_twice_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_database, "JOURNAL_ROWS", 64)
    monkeypatch.setattr(log_database, "SLICE_ROWS", 16)
    log = opened(tmp_path, "interval")
    (state,) = await accepted(log, new_request("a"))
    for _ in range(1_000):
        state = grown(state)
        await told(log, [state])
    await log.close()
    with closing(sqlite3.connect(tmp_path / DATABASE)) as connection:
        ((rows, pieces),) = connection.execute("SELECT (SELECT count(*) FROM journal), (SELECT count(*) FROM segments)")
    assert rows <= 64
    assert pieces == (1_000 - rows) / 16
    assert (await contents(tmp_path))["a"].states == (state,)


async def test_nothing_of_a_forgotten_request_is_left_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_writer, "IDLE_SECONDS", 0.01)
    monkeypatch.setattr(log_database, "JOURNAL_ROWS", 16)  # some of it is in segments already
    monkeypatch.setattr(log_database, "SLICE_ROWS", 4)
    log = opened(tmp_path)
    (kept,) = await accepted(log, new_request("kept"))
    (state,) = await accepted(log, new_request("a", stop=("secret in the request",)))
    for count in range(1, 40):
        text = f"secret in step {count} " * count * 50
        await told(log, [replace(state, tokens=(1,) * count, text=text), grown(kept, count)])
    files = [tmp_path / DATABASE, tmp_path / f"{DATABASE}-wal"]
    assert any(b"secret in" in file.read_bytes() for file in files)
    log.forget("a")
    async with asyncio.timeout(60):
        while any(b"secret in" in file.read_bytes() for file in files):
            await asyncio.sleep(0.01)
    await log.close()
    assert (await contents(tmp_path))["kept"].states == (grown(kept, 39),)


async def test_clocks_of_the_wall_may_jump(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(0)
    monkeypatch.setattr(time, "time", lambda: chance.uniform(0, 4e9))
    with small_limits():
        log = opened(tmp_path, "interval")
        (state,) = await accepted(log, new_request("a"))
        for count in range(100):
            await told(log, [grown(state, count)])
        await log.close()
    assert (await contents(tmp_path))["a"].states == (grown(state, 99),)


async def test_with_interval_the_disk_is_synced_once_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[float] = []
    fdatasync = os.fdatasync
    monkeypatch.setattr(log_writer, "SYNC_SECONDS", 0.05)
    monkeypatch.setattr(os, "fdatasync", lambda file: (fdatasync(file), synced.append(time.monotonic())))
    log = opened(tmp_path, "interval")
    (state,) = await accepted(log, new_request("a"))
    started, steps = time.monotonic(), 0
    async with asyncio.timeout(60):
        while len(synced) < 4:
            steps += 1
            await told(log, [grown(state, steps)])
    assert len(synced) <= 1 + (synced[-1] - started) / 0.05
    assert steps > 4
    await log.close()


async def test_prompts_are_private(tmp_path: Path) -> None:
    directory = tmp_path / "state" / "log"
    log = opened(directory)
    await accepted(log, new_request("a"))
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    files = list(directory.iterdir())
    assert {file.name for file in files} == {DATABASE, f"{DATABASE}-wal", f"{DATABASE}-shm", "lock"}
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    await log.close()


async def test_a_second_writer_is_refused_and_told_who_the_first_is(tmp_path: Path) -> None:
    log = opened(tmp_path)
    with pytest.raises(CommitLogError, match=f"in use by process {os.getpid()};"):
        opened(tmp_path)
    command = "import sys; from spotjax.engine.durable_log import *; DurableLog.open(Path(sys.argv[1]), 'step', 'm')"
    child = subprocess.run([sys.executable, "-c", command, str(tmp_path)], capture_output=True, text=True)
    assert f"in use by process {os.getpid()};" in child.stderr
    await log.close()
    await opened(tmp_path).close()


async def test_the_lock_ends_with_its_process(tmp_path: Path) -> None:
    command = (
        "import sys; from spotjax.engine.durable_log import *; log = DurableLog.open(Path(sys.argv[1]), 'step', 'm');"
        "print('open', flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", command, str(tmp_path)], **pipes) as child:
        assert child.stdout and child.stdout.readline() == b"open\n"
        with pytest.raises(CommitLogError, match=f"in use by process {child.pid};"):
            opened(tmp_path)
        child.send_signal(signal.SIGKILL)
    await opened(tmp_path).close()


def without_return(name: str) -> RecordedRequest:
    """A request that ends with its client's connection."""
    request = new_request(name)
    return replace(request, request=replace(request.request, resumable=False))


async def test_unfinished_requests_of_another_model_are_not_touched(tmp_path: Path) -> None:
    log = opened(tmp_path, model="large")
    (state,) = await accepted(log, new_request("a"))
    await accepted(log, new_request("b"))
    await told(log, [grown(state, 1, FinishReason.STOP)])
    await log.close()
    with pytest.raises(CommitLogError, match="has 1 unfinished requests of another model, large, and small is to be"):
        opened(tmp_path, model="small")
    assert list(await contents(tmp_path, model="large")) == ["a", "b"]


async def test_a_log_of_another_model_that_has_nothing_to_do_is_begun_anew(tmp_path: Path) -> None:
    log = opened(tmp_path, model="large")
    (state,) = await accepted(log, new_request("a"))
    await told(log, [grown(state, 1, FinishReason.STOP)])
    await accepted(log, without_return("b"))
    log.begin_epoch(5)
    await log.close()
    other = opened(tmp_path, model="small")
    assert list(other.replay()) == []
    assert other.epoch == 0
    assert other.identity != log.identity
    request = new_request("a")
    await other.accept(request.request, request.states, request.key)
    await other.close()
    assert await contents(tmp_path, model="small") == {"a": request}


async def test_a_log_can_be_inspected_while_it_is_open_and_when_its_process_is_gone(tmp_path: Path) -> None:
    log = opened(tmp_path / "log")
    state, _ = await accepted(log, new_request("abc", 2))
    await accepted(log, without_return("over"))
    await told(log, [grown(state, 3)])
    log.begin_epoch(2)
    await told(log, [])
    subprocess.run(["cp", "-r", tmp_path / "log", tmp_path / "crashed"], check=True)
    (tmp_path / "crashed" / f"{DATABASE}-shm").unlink()
    live, crashed = inspect_log(tmp_path / "log"), inspect_log(tmp_path / "crashed")
    await log.close()
    closed = inspect_log(tmp_path / "log")
    assert live == crashed == closed
    assert [one.unfinished for one in live.requests] == [2, 1]
    (request,) = live.going_on
    assert (request.request_id, request.prompt_tokens, request.tokens, request.unfinished) == ("abc", 3, (3, 0), 2)
    assert (live.identity, live.model, live.epoch, live.damage) == (log.identity, "model", 2, ())
    with pytest.raises(CommitLogError, match="no commit log in"):
        inspect_log(tmp_path / "elsewhere")


async def test_a_copy_is_a_log_of_its_own_with_all_that_was_told(tmp_path: Path) -> None:
    log = opened(tmp_path / "log")
    states = await accepted(log, new_request("a", 2))
    stop = asyncio.Event()

    async def go_on() -> None:
        while not stop.is_set():
            states[0] = grown(states[0])
            await told(log, states[:1])

    task = asyncio.create_task(go_on())
    await told(log, [])
    before = states[0]
    await asyncio.to_thread(copy_log, tmp_path / "log", tmp_path / "copy")
    stop.set()
    await task
    await log.close()
    copy = (await contents(tmp_path / "copy"))["a"].states[0]
    assert len(before.tokens) - 1 <= len(copy.tokens) <= len(states[0].tokens)
    assert copy == grown(new_request("a", 2).states[0], len(copy.tokens))
    assert stat.S_IMODE((tmp_path / "copy" / DATABASE).stat().st_mode) == 0o600
    with pytest.raises(CommitLogError, match="has a commit log already"):
        copy_log(tmp_path / "log", tmp_path / "copy")


def test_the_default_directory_is_named_after_the_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert default_directory("127.0.0.1:8080") == tmp_path / "spotjax" / "127.0.0.1_8080"
    assert default_directory("unix:/run/../x").parent == tmp_path / "spotjax"
    assert default_directory("..").parent == tmp_path / "spotjax"
    assert default_directory("..").name not in ("", ".", "..")
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_directory("[::1]:80") == tmp_path / ".local" / "state" / "spotjax" / "_1_80"
