"""A service is killed with all its machines, and goes on elsewhere from a bundle: its client sees each token once."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from live_cases import CONTROLLER, eventually, worker_flags

from spotjax.api.errors import Unavailable
from spotjax.async_client import AsyncSpotjaxClient
from spotjax.tools.local_fleet import ChildrenFleet
from spotjax.tools.processes import Process
from spotjax.tools.service import running

COLD_RESTART = (sys.executable, "-m", "spotjax.tools.cold_restart")
REQUEST = {"prompt": "ROMEO:\n", "max_tokens": 200, "temperature": 0.8, "seed": 5, "ignore_eos": True}


def cold_restart(*arguments: str | Path) -> str:
    """What the command prints; it must succeed."""
    done = subprocess.run([*COLD_RESTART, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.timeout(300)
async def test_a_killed_service_goes_on_elsewhere_and_its_client_gets_exactly_the_rest(
    programs: Path, tmp_path: Path
) -> None:
    seen: list[int] = []
    flags = (*CONTROLLER, "--workers", "2", *worker_flags(programs), "--parameter-store", "off")
    async with running(ChildrenFleet(tmp_path / "old", flags, ())) as old:
        with contextlib.suppress(Unavailable):  # it is killed
            async for delta in old.client.generate(**REQUEST, request_id="moves"):  # type: ignore[arg-type]
                seen += delta.tokens
                if len(seen) > 40 and old.server.exit_code is None:
                    await asyncio.to_thread(old.server.kill)
        assert 40 < len(seen) < 200
    bundle, new = tmp_path / "service.tar", tmp_path / "new"
    await asyncio.to_thread(cold_restart, "--commit-log", old.commit_log, "--export", bundle)
    where = (
        "--commit-log",
        str(new / "log"),
        "--checkpoint",
        str(new / "checkpoint"),
        "--listen",
        "127.0.0.1:0",
        "--http",
        "off",
    )
    shown = await asyncio.to_thread(cold_restart, "--import", bundle, *where, *flags, "--dry-run", "--json")
    (request,) = json.loads(shown)["unfinished"]
    assert request["request_id"] == "moves" and request["tokens"][0] >= len(seen)

    server = Process("moved", (*COLD_RESTART, "--log-format", "json", *where, *flags), new)
    try:
        await eventually("it goes on", lambda: "\nrestored:" in server.output() or server.exit_code is not None)
        assert "restored: 1 of 1 requests go on, 0 sequences with KV, first token after" in server.output(), (
            server.tail()
        )
        address = server.output().split(" on ", 1)[1].split()[0]
        async with AsyncSpotjaxClient(address) as client:
            rest = [token async for delta in client.resume("moves", [len(seen)]) for token in delta.tokens]
            undisturbed = [token async for delta in client.generate(**REQUEST) for token in delta.tokens]  # type: ignore[arg-type]
        assert seen + rest == undisturbed and len(undisturbed) == 200
    finally:
        server.kill()
