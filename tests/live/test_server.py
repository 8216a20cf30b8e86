"""A real server process with the shipped model on the embedded default, talked to as users do."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from live_cases import SHAPE_FLAGS

from spotjax.async_client import AsyncSpotjaxClient
from spotjax.engine.generation import Delta
from spotjax.engine.request import FinishReason
from spotjax.meshes.instance import InstanceState

START_SECONDS = 240.0
DONE_SECONDS = 120.0
STREAMS = 200
TOKENS = 24


class Server:
    """The process and where it listens."""

    def __init__(self, process: asyncio.subprocess.Process, address: str) -> None:
        self.process, self.address = process, address

    async def command(self, *arguments: str) -> str:
        """Runs ``spotjax ...`` against this server; it must succeed."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "spotjax", *arguments, "--server", self.address,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        out, err = await process.communicate()
        assert process.returncode == 0, err.decode()
        return out.decode()

    def memory(self) -> int:
        """Resident bytes of the process."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", status).group(1)) * 1024  # type: ignore[union-attr]


@contextlib.asynccontextmanager
async def serving(programs: Path, *flags: str) -> AsyncIterator[Server]:
    """A server process; killed at the end if it still runs."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "SPOTJAX_"))}
    log = tempfile.mkdtemp(dir=programs.parent)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "spotjax.serve", "--listen", "127.0.0.1:0", "--http", "off", "--instances", "4",
        "--compilation-cache", str(programs), "--commit-log", log, *flags,
        stdout=asyncio.subprocess.PIPE, env={**environment, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert process.stdout is not None
    try:
        async with asyncio.timeout(START_SECONDS):
            line = ""
            while " is serving " not in line:
                line = (await process.stdout.readline()).decode()
                assert line, "the server ended before it served"
        yield Server(process, line.split(" on ", 1)[1].split()[0])
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@pytest.mark.timeout(600)
async def test_a_stream_survives_preemptions_and_the_server_drains(programs: Path) -> None:
    async with serving(programs, *SHAPE_FLAGS) as server, AsyncSpotjaxClient(server.address) as client:
        calm = [delta async for delta in client.generate("ROMEO:\n", max_tokens=120, temperature=0.8, seed=3)]
        disturbed: list[Delta] = []
        drills: list[asyncio.Task[str]] = []
        async for delta in client.generate("ROMEO:\n", max_tokens=120, temperature=0.8, seed=3):
            disturbed.append(delta)
            seen = delta.offset + len(delta.tokens)  # a delta may have several
            if seen >= 20 and not drills:
                drills.append(asyncio.create_task(server.command("preempt", "instance-1", "--grace", "5", "--json")))
            if seen >= 70 and len(drills) == 1:
                drills.append(asyncio.create_task(server.command("preempt", "instance-2", "--grace", "0", "--json")))
        assert _tokens(disturbed) == _tokens(calm)
        assert "".join(d.text for d in disturbed) == "".join(d.text for d in calm)
        assert [delta.offset for delta in disturbed] == _running_offsets(disturbed)
        reports = [json.loads(await drill) for drill in drills]
        assert len(reports) == 2
        status = await client.status()
        assert {i.name for i in status.instances if i.state is InstanceState.GONE} == {"instance-1", "instance-2"}
        assert json.loads(await server.command("status", "--json"))
        server.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(DONE_SECONDS):
            assert await server.process.wait() == 0


@pytest.mark.timeout(600)
async def test_two_hundred_streams_complete_and_cancelled_ones_free_their_pages(programs: Path) -> None:
    async with (
        serving(programs, *SHAPE_FLAGS, "--no-fuse", "--retain-seconds", "0") as server,
        AsyncSpotjaxClient(server.address) as client,
    ):
        resident = []
        for turn in range(3):
            async with asyncio.timeout(2 * DONE_SECONDS):
                outcomes = await asyncio.gather(
                    *(_stream(client, f"{turn}-{row}", TOKENS, cancel=row % 2 == 1) for row in range(STREAMS))
                )
            finished = [outcome for row, outcome in enumerate(outcomes) if row % 2 == 0]
            assert all(reason is FinishReason.LENGTH and count == TOKENS for reason, count in finished)
            status = await client.status()
            assert status.requests_running == 0 and status.queued == 0
            assert all(replica.pages_used == 0 and replica.running == 0 for replica in status.replicas)
            resident.append(server.memory())
        # the first turn also loads programs; from then on nothing may pile up
        growth = resident[2] - resident[1]
        assert growth < 100 * 2**20, f"memory grew by {growth / 2**20:.0f} MiB"


async def _stream(
    client: AsyncSpotjaxClient, name: str, tokens: int, cancel: bool = False
) -> tuple[FinishReason | None, int]:
    """Reads one stream to its end; asks to cancel it after the first tokens when told to."""
    count, reason, request_id = 0, None, f"stream-{name}"
    generation = client.generate(
        f"Speech {name}:\n", max_tokens=tokens, temperature=0.7, seed=7, ignore_eos=True, request_id=request_id
    )
    async for delta in generation:
        assert delta.offset == count
        count += len(delta.tokens)
        reason = delta.finish
        if cancel and reason is None:
            cancel = False
            await client.cancel(request_id)
    return reason, count


def _tokens(deltas: list[Delta]) -> list[int]:
    return [token for delta in deltas for token in delta.tokens]


def _running_offsets(deltas: list[Delta]) -> list[int]:
    offsets, count = [], 0
    for delta in deltas:
        offsets.append(count)
        count += len(delta.tokens)
    return offsets
