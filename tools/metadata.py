"""A stand-in for a cloud's metadata server as a process: what its machine is told, and when."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path
from typing import Any

import httpx

from spotjax.tools.processes import Process

START_SECONDS = 30.0
POLL_SECONDS = 0.02


class MetadataProcess:
    """One machine's metadata server.

    Args:
      cloud: module below ``spotjax.testing``, such as ``metadata_gce``.
      directory: for its log.
    """

    def __init__(self, cloud: str, directory: Path) -> None:
        command = (sys.executable, "-m", f"spotjax.testing.{cloud}", "--port", "0")
        self._process = Process(cloud, command, directory)
        self.url = ""

    async def start(self) -> None:
        """Waits until it listens.

        Raises:
          RuntimeError: it does not.
        """
        deadline = time.monotonic() + START_SECONDS
        while not (line := self._process.output().strip()):
            if self._process.exit_code is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{self._process.name} does not listen: {self._process.tail()}")
            await asyncio.sleep(POLL_SECONDS)
        self.url = line

    async def order(self, name: str, **values: Any) -> None:
        """Has it say something else, see ``orders`` of the stand-in."""
        async with httpx.AsyncClient(trust_env=False) as client:
            (await client.post(f"{self.url}/admin/orders/{name}", json=values)).raise_for_status()

    async def answered(self, text: str, since: float = 0.0) -> float | None:
        """When it first answered with that text, in Unix seconds; None if it has not."""
        async with httpx.AsyncClient(trust_env=False) as client:
            answers = (await client.get(f"{self.url}/admin/answered")).json()
        times = [answer["time"] for answer in answers if text in answer["body"] and answer["time"] >= since]
        return min(times, default=None)

    def close(self) -> None:
        """Ends it."""
        self._process.kill()
