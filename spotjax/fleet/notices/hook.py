"""Notices of everything else: a file that somebody writes, a command that says so.

Both speak in lines of a kind and seconds, such as ``preempt 30``, ``maintenance 600`` or ``rebalance``; without seconds
it is not known how long. A command also says ``withdrawn``; a file is emptied or removed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import signal
from collections.abc import Callable
from pathlib import Path

from spotjax.fleet.notices.notice import Notice, NoticeKind, Withdrawn
from spotjax.fleet.notices.patience import Patience

LOOK_SECONDS = 0.2
"""Between looks at the file."""
AGAIN_SECONDS = 1.0
"""Before a command that ended well is run again."""


def read_line(line: str, source: str, instance: str, now: float) -> Notice | Withdrawn:
    """What one line says.

    Raises:
      ValueError: it is none of ours.
    """
    words = line.split()
    if words == ["withdrawn"]:
        return Withdrawn(source, instance, line)
    kinds = [kind.value for kind in NoticeKind if kind is not NoticeKind.LOST]
    if not 1 <= len(words) <= 2 or words[0] not in kinds:
        raise ValueError(f"{line[:80]!r} is not one of {', '.join(kinds)}, with seconds or without")
    seconds = float(words[1]) if len(words) == 2 else None
    if seconds is not None and not 0 <= seconds <= 30 * 86_400:
        raise ValueError(f"{line[:80]!r}: seconds must be in [0, {30 * 86_400}]")
    return Notice(source, NoticeKind(words[0]), instance, None if seconds is None else now + seconds, line)


class FileSource:
    """A file whose first line is the notice. Its seconds count from when it is seen.

    Args:
      instance: that notices are about.
      clock: monotonic seconds.
      path: of the file, which need not be there.
    """

    name = "file"

    def __init__(self, instance: str, clock: Callable[[], float], path: Path) -> None:
        self._instance, self._clock, self._path = instance, clock, path
        self._patience = Patience(self.name)
        self._said: str | None = None
        """The line that stands."""

    async def wait(self) -> Notice | Withdrawn:
        """See ``NoticeSource.wait``."""
        while True:
            try:
                line = await asyncio.to_thread(self._read)
                word = self._word(line)
            except (OSError, ValueError) as problem:  # also half a line: the rest is about to be written
                await self._patience.after(f"{self._path}: {problem}")
                continue
            self._patience.over()
            if word is not None:
                self._said = line or None
                return word
            await asyncio.sleep(LOOK_SECONDS)

    async def close(self) -> None:
        """See ``NoticeSource.close``; there is nothing to be freed."""

    def _read(self) -> str:
        """The line, empty if there is none."""
        try:
            return self._path.read_text().strip().partition("\n")[0].strip()
        except FileNotFoundError:
            return ""

    def _word(self, line: str) -> Notice | Withdrawn | None:
        """What a line says that the last one did not."""
        if line == (self._said or ""):
            return None
        if not line:
            return Withdrawn(self.name, self._instance, f"{self._path} is gone or empty")
        return read_line(line, self.name, self._instance, self._clock())


class CommandSource:
    """A command whose lines on standard output are the notices, as they come.

    It may go on for ever, or look once and end: with exit code 0 it is run again after a second, with another one after
    a pause. How it ends is never a notice.

    Args:
      instance: that notices are about.
      clock: monotonic seconds.
      command: program and arguments, as in a shell; there is none.
    """

    name = "command"

    def __init__(self, instance: str, clock: Callable[[], float], command: str) -> None:
        self._instance, self._clock, self._arguments = instance, clock, shlex.split(command)
        self._patience = Patience(self.name)
        self._process: asyncio.subprocess.Process | None = None
        self._said: str | None = None

    async def wait(self) -> Notice | Withdrawn:
        """See ``NoticeSource.wait``."""
        while True:
            try:
                word = await self._next()
            except (OSError, ValueError) as problem:
                await self._patience.after(f"{self._arguments[0]}: {problem}")
                continue
            self._patience.over()
            if word is not None:
                return word
            await asyncio.sleep(AGAIN_SECONDS)

    async def close(self) -> None:
        """Ends the command, with all that it started."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            await self._process.wait()
            self._process = None

    async def _next(self) -> Notice | Withdrawn | None:
        """The next word; None when the command has ended well without one.

        Raises:
          OSError: it cannot be run, or ended badly.
          ValueError: its line is none of ours.
        """
        if self._process is None:
            self._process = await asyncio.create_subprocess_exec(
                *self._arguments, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
                start_new_session=True,
            )  # fmt: skip
        assert self._process.stdout is not None, "it was asked for"
        while line := (await self._process.stdout.readline()).decode(errors="replace").strip():
            if line != self._said:
                word = read_line(line, self.name, self._instance, self._clock())
                self._said = None if isinstance(word, Withdrawn) else line
                return word
        if not self._process.stdout.at_eof():
            return None  # an empty line
        code = await self._process.wait()
        self._process = None
        if code != 0:
            raise OSError(f"ended with exit code {code}")
        return None
