"""The controller's end of the process that is connected to a Ray cluster: starts, asks and ends it. Imports no ray."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Mapping, Sequence

import msgspec

from spotjax import errors
from spotjax.errors import ProviderError, ProviderUnavailable
from spotjax.fleet.providers.ray_connection import Answer, Ask
from spotjax.fleet.providers.ray_records import Found, Wish
from spotjax.local_workers import shown_end
from spotjax.settings import OTHER_VARIABLES, PREFIX

LINE_BYTES = 64 << 20
"""Longest answer."""


class Link:
    """Calls to a cluster, one after the other. A connection that breaks is made again at the next call."""

    def __init__(self, address: str, fleet: str, seconds: float, environment: Mapping[str, str]) -> None:
        """Starts nothing.

        Args:
          address: of the cluster.
          fleet: whose machines.
          seconds: for one call.
          environment: of the process; settings of this server are left out.
        """
        self._arguments, self._seconds = (address, fleet), seconds
        kept = {n: value for n, value in environment.items() if not n.startswith(PREFIX) or n in OTHER_VARIABLES}
        self._environment = kept | {"RAY_USAGE_STATS_ENABLED": "0"}
        self._process: asyncio.subprocess.Process | None = None
        self._alone = asyncio.Lock()

    async def list(self) -> Sequence[Found]:
        """Every machine of the fleet."""
        return await self._call(Ask(verb="list"))

    async def request(self, wish: Wish, program: Sequence[str], patience: float) -> Sequence[Found]:
        """Asks for one, unless there is one of that name; all of them."""
        return await self._call(Ask(verb="request", wish=wish, program=tuple(program), patience=patience))

    async def release(self, name: str) -> Sequence[Found]:
        """Gives one back; what is left."""
        return await self._call(Ask(verb="release", name=name))

    async def close(self) -> None:
        """Ends the process."""
        async with self._alone:
            await self._end()

    async def _call(self, ask: Ask) -> Sequence[Found]:
        async with self._alone:
            try:
                async with asyncio.timeout(self._seconds):
                    process = self._process or await self._start()
                    return await self._ask(process, ask)
            except (TimeoutError, OSError) as problem:
                await self._end()
                said = f"no answer in {self._seconds} s" if isinstance(problem, TimeoutError) else str(problem)
                raise ProviderUnavailable(f"Ray at {self._arguments[0]}: {said}") from problem
            except (ProviderUnavailable, asyncio.CancelledError):  # it might answer the next one with this one's
                await self._end()
                raise

    async def _start(self) -> asyncio.subprocess.Process:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "spotjax.fleet.providers.ray_connection", *self._arguments,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True, env=self._environment, limit=LINE_BYTES,
        )  # fmt: skip
        await self._heard(self._process)
        return self._process

    async def _ask(self, process: asyncio.subprocess.Process, ask: Ask) -> Sequence[Found]:
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(ask) + b"\n")
        await process.stdin.drain()
        return (await self._heard(process)).found

    async def _heard(self, process: asyncio.subprocess.Process) -> Answer:
        assert process.stdout is not None
        line = await process.stdout.readline()
        if not line.endswith(b"\n"):
            code = await process.wait()
            raise ProviderUnavailable(
                f"Ray at {self._arguments[0]}: the connection ended with {shown_end(code)}; Ray's logs of this machine "
                "may say why"
            )
        answer = msgspec.json.decode(line, type=Answer)
        if answer.error:
            error: type[ProviderError] = getattr(errors, answer.error)
            raise error(answer.message)
        return answer

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
        process._transport.close()  # type: ignore[attr-defined]
