"""A file or a command can say everything that a cloud can, and nothing by accident."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import psutil
import pytest

from spotjax.fleet.notices.hook import CommandSource, FileSource, read_line
from spotjax.fleet.notices.notice import Notice, NoticeKind, Withdrawn


def clock() -> float:
    return 100.0


def test_a_line_is_a_kind_with_seconds_or_without() -> None:
    assert read_line("preempt 30", "file", "vm", 100.0) == Notice("file", NoticeKind.PREEMPT, "vm", 130.0, "preempt 30")
    assert read_line("rebalance", "file", "vm", 100.0) == Notice("file", NoticeKind.REBALANCE, "vm", None, "rebalance")
    assert read_line("withdrawn", "command", "vm", 100.0) == Withdrawn("command", "vm", "withdrawn")


@pytest.mark.parametrize(
    "line", ["", "preem", "lost 3", "preempt -1", "preempt nan", "preempt 1e9", "preempt 3 4", "PREEMPT"]
)
def test_any_other_line_is_none(line: str) -> None:
    with pytest.raises(ValueError, match=r"is not one of|seconds must be|could not convert"):
        read_line(line, "file", "vm", 100.0)


async def test_a_file_speaks_when_it_appears_when_it_changes_and_when_it_is_gone(tmp_path: Path) -> None:
    path, new = tmp_path / "notice", tmp_path / "notice.new"
    source = FileSource("vm", clock, path)

    async def after(text: str | None) -> Notice | Withdrawn:
        waiting = asyncio.create_task(source.wait())
        await asyncio.sleep(0)
        if text is None:
            path.unlink()
        else:  # in one piece: a file that is being written anew is empty for a moment
            new.write_text(text)
            new.replace(path)
        async with asyncio.timeout(10):
            return await waiting

    assert await after("maintenance 600\nby hand\n") == Notice(
        "file", NoticeKind.MAINTENANCE, "vm", 700.0, "maintenance 600"
    )
    assert await after("preempt 30\n") == Notice("file", NoticeKind.PREEMPT, "vm", 130.0, "preempt 30")
    assert await after(None) == Withdrawn("file", "vm", f"{path} is gone or empty")
    assert await after("preempt") == Notice("file", NoticeKind.PREEMPT, "vm", None, "preempt")
    assert isinstance(await after(""), Withdrawn)


async def test_half_a_line_is_waited_for_and_what_cannot_be_read_is_no_notice(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "notice"
    path.mkdir()
    waiting = asyncio.create_task(FileSource("vm", clock, path).wait())
    async with asyncio.timeout(10):
        while "file cannot be asked" not in caplog.text:
            await asyncio.sleep(0.01)
        path.rmdir()
        path.write_text("pree")
        while "'pree' is not one of" not in caplog.text:
            await asyncio.sleep(0.01)
        assert not waiting.done()
        path.write_text("preempt 30")
        assert await waiting == Notice("file", NoticeKind.PREEMPT, "vm", 130.0, "preempt 30")


async def test_a_command_speaks_line_by_line_while_it_runs_and_ends_with_the_worker() -> None:
    code = "import time; print('rebalance', flush=True); print('preempt 30', flush=True); time.sleep(1000)"
    source = CommandSource("vm", clock, f'{sys.executable} -c "{code}"')
    async with asyncio.timeout(20):
        assert await source.wait() == Notice("command", NoticeKind.REBALANCE, "vm", None, "rebalance")
        assert await source.wait() == Notice("command", NoticeKind.PREEMPT, "vm", 130.0, "preempt 30")
    (child,) = psutil.Process(os.getpid()).children()
    await source.close()
    assert not child.is_running()


async def test_a_command_that_looks_once_is_run_again_and_its_end_is_no_notice(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spotjax.fleet.notices.hook.AGAIN_SECONDS", 0.01)
    script, line = tmp_path / "look.sh", tmp_path / "line"
    script.write_text(f'#!/bin/sh\ncat "{line}"\n')
    script.chmod(0o755)
    source = CommandSource("vm", clock, str(script))
    waiting = asyncio.create_task(source.wait())
    async with asyncio.timeout(20):
        while "ended with exit code 1" not in caplog.text:
            await asyncio.sleep(0.01)
        line.write_text("preempt 30\n")
        assert await waiting == Notice("command", NoticeKind.PREEMPT, "vm", 130.0, "preempt 30")
        again = asyncio.create_task(source.wait())  # the same line, again and again, is nothing new
        await asyncio.sleep(0.1)
        assert not again.done()
        line.write_text("withdrawn\n")
        assert await again == Withdrawn("command", "vm", "withdrawn")
    await source.close()


async def test_a_command_that_is_not_there_is_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    waiting = asyncio.create_task(CommandSource("vm", clock, "/nowhere/command --flag").wait())
    async with asyncio.timeout(10):
        while "/nowhere/command" not in caplog.text:
            await asyncio.sleep(0.01)
    assert not waiting.done()
    waiting.cancel()
