"""Spotjax as it is used: ``spotjax.serve`` in a process of its own, asked through gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from spotjax.api.errors import Unavailable
from spotjax.async_client import AsyncSpotjaxClient
from spotjax.tools.processes import free_port

_servers: list[subprocess.Popen[bytes]] = []


def load(directory: str, settings: dict[str, Any]) -> Callable[..., None]:
    """See the package."""
    address = f"127.0.0.1:{free_port('127.0.0.1')}"
    flags = {
        "--model": directory, "--listen": address, "--http": "off",
        "--instances": 1, "--devices-per-instance": 1, "--mesh": "1x1x1",
        "--commit-log": tempfile.mkdtemp(prefix="spotjax-peer-"), "--max-batch": settings["batch"],
        "--max-model-len": settings["context"],
    }  # fmt: skip
    words = [str(word) for flag in flags.items() for word in flag] + ["--no-prefix-cache"]  # prompts are repeated
    _servers.append(subprocess.Popen([sys.executable, "-m", "spotjax.serve", *words]))
    loop = asyncio.new_event_loop()

    async def connect() -> AsyncSpotjaxClient:
        client = AsyncSpotjaxClient(address, patience=300)
        while _servers[-1].poll() is None:
            with contextlib.suppress(Unavailable):
                await client.models()
                return client
            await asyncio.sleep(0.1)
        raise SystemExit(f"the server ended with {_servers[-1].returncode}")

    client = loop.run_until_complete(connect())

    def generate(prompts: list[list[int]], count: int, token: Callable[[int, int], None]) -> None:
        async def read(row: int) -> None:
            async for delta in client.generate(prompts[row], max_tokens=count, temperature=0.0, ignore_eos=True):
                for number in delta.tokens:
                    token(row, number)

        async def run() -> None:
            await asyncio.gather(*(read(row) for row in range(len(prompts))))

        loop.run_until_complete(run())

    for _ in range(3):  # whole stages are compiled behind the first ones
        generate([[0] * settings["prompt"]] * settings["batch"], settings["count"], lambda row, number: None)
    return generate


def close() -> None:
    """Ends the server."""
    for server in _servers:
        server.terminate()
        server.wait()
