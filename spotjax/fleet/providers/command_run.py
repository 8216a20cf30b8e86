"""Runs programs of the user for the ``command`` provider: with an end to their time and their output, and no shell.

A program leads a process group of its own, which is killed when it takes too long or writes too much. What it says is
for ``spotjax.fleet.providers.command`` to understand.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass

from spotjax.errors import ProviderRefused, ProviderUnavailable

MOST_BYTES = 4 << 20
"""Of standard output."""
MOST_ERRORS = 4 << 10
"""Of standard error that is kept, from its end."""
LINE_BYTES = 1 << 16


@dataclass(frozen=True)
class Finished:
    """How a program ended.

    Attributes:
      code: exit code; negative: the signal.
      output: standard output.
      errors: the end of standard error.
    """

    code: int
    output: bytes
    errors: str


async def run(arguments: Sequence[str], environment: Mapping[str, str], seconds: float) -> Finished:
    """Runs a program to its end.

    What it leaves running in the background must let go of standard output, or it counts as not ended.

    Raises:
      ProviderRefused: it cannot be started.
      ProviderUnavailable: it took more than ``seconds``, or wrote more than ``MOST_BYTES``.
    """
    async with _started(arguments, environment) as process:
        assert process.stdout is not None and process.stderr is not None, "they were asked for"
        errors = asyncio.create_task(_tail(process.stderr))
        try:
            async with asyncio.timeout(seconds):
                output = await _all(process.stdout, arguments[0])
                await errors
                return Finished(await process.wait(), output, errors.result())
        except TimeoutError:
            raise ProviderUnavailable(f"{arguments[0]} did not end within {seconds:g} s and was killed") from None
        finally:
            errors.cancel()
            await asyncio.gather(errors, return_exceptions=True)


async def lines(arguments: Sequence[str], environment: Mapping[str, str]) -> AsyncGenerator[bytes, None]:
    """Lines of a program that goes on, as it writes them; ends when it does. It is killed when nobody listens any more.

    Raises:
      ProviderRefused: it cannot be started.
    """
    async with _started(arguments, environment) as process:
        assert process.stdout is not None and process.stderr is not None, "they were asked for"
        errors = asyncio.create_task(_tail(process.stderr))
        try:
            with contextlib.suppress(ValueError):  # a line without end
                while line := await process.stdout.readline():
                    yield line
        finally:
            errors.cancel()
            await asyncio.gather(errors, return_exceptions=True)


@contextlib.asynccontextmanager
async def _started(
    arguments: Sequence[str], environment: Mapping[str, str]
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A running program; its group is killed at the end, unless it has ended by itself and all was read."""
    try:
        process = await asyncio.create_subprocess_exec(
            *arguments, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE, start_new_session=True, env=environment, limit=LINE_BYTES,
        )  # fmt: skip
    except OSError as problem:
        raise ProviderRefused(f"{arguments[0]} cannot be run: {problem}") from problem
    ended = False
    try:
        yield process
        ended = process.returncode is not None
    finally:
        if not ended:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        process._transport.close()  # type: ignore[attr-defined]  # a process that left the group may hold its pipes
        await process.wait()


async def _all(stream: asyncio.StreamReader, program: str) -> bytes:
    """Everything that is written."""
    output = bytearray()
    while part := await stream.read(LINE_BYTES):
        output += part
        if len(output) > MOST_BYTES:
            raise ProviderUnavailable(f"{program} wrote more than {MOST_BYTES} bytes and was killed")
    return bytes(output)


async def _tail(stream: asyncio.StreamReader) -> str:
    """The end of what is written."""
    kept = b""
    while part := await stream.read(LINE_BYTES):
        kept = (kept + part)[-MOST_ERRORS:]
    return kept.decode(errors="replace")
