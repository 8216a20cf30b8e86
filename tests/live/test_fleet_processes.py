"""Fleets that are not shared: workers as children of the controller, and mutual TLS."""

from __future__ import annotations

import asyncio
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from certificates import certificates
from live_cases import CONTROLLER, NAMES, REQUESTS, SlowFleet, eventually, worker_flags

from spotjax import cli
from spotjax.api.errors import Unavailable
from spotjax.async_client import AsyncSpotjaxClient
from spotjax.tools.load import answers
from spotjax.tools.local_fleet import ChildrenFleet
from spotjax.tools.processes import Process
from spotjax.tools.service import SERVE, running
from spotjax.transport.credentials import channel_credentials

pytestmark = pytest.mark.timeout(300)


async def test_workers_end_with_the_process_that_started_them(programs: Path, tmp_path: Path) -> None:
    flags = (*CONTROLLER, "--workers", "2", *worker_flags(programs), "--parameter-store", str(tmp_path / "store"))
    async with running(ChildrenFleet(tmp_path, flags, NAMES[:2])) as fleet:
        await answers(fleet.client, REQUESTS[:4])
        workers = fleet.server.tree()[1:]
        assert len(workers) >= 2
        fleet.server.signal(signal.SIGKILL, whole=False)
        fleet.server.wait(10)
        deadline = time.monotonic() + 10
        while left := fleet.server.tree():
            assert time.monotonic() < deadline, left
            await asyncio.sleep(0.02)


async def test_children_are_killed_and_added_and_end_with_nothing_left(programs: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    flags = (*CONTROLLER, "--workers", "3", *worker_flags(programs), "--parameter-store", str(store))
    async with running(ChildrenFleet(tmp_path, flags, NAMES[:3])) as fleet:
        expected = await answers(fleet.client, REQUESTS[:4])
        await fleet.kill(["instance-1"])
        await fleet.until_gone(["instance-1"])
        assert await answers(fleet.client, REQUESTS[:4]) == expected
        await fleet.bring(["instance-1"])
        await fleet.until_ready()
        assert await answers(fleet.client, REQUESTS[:4]) == expected
        assert await fleet.stop() == 0
        assert fleet.left() == [] and not list(store.rglob("*"))


async def test_with_tls_and_a_join_token_all_works_and_who_lacks_one_is_refused(programs: Path, tmp_path: Path) -> None:
    files = certificates(tmp_path)
    names, credentials = NAMES[:2], channel_credentials(*files)
    plain = worker_flags(programs)
    assert cli.main(["keys", "join-token", str(tmp_path / "token")]) == 0
    trust = (*files.flags, "--join-token", str(tmp_path / "token"))
    fleet = SlowFleet(tmp_path, names, (*CONTROLLER, *trust), (*plain, *trust), credentials=credentials)
    async with running(fleet):
        expected = await answers(fleet.client, REQUESTS[:4])
        async with AsyncSpotjaxClient(fleet.address, patience=0) as plaintext:
            with pytest.raises(Unavailable):
                await plaintext.status()
        strangers = [
            Process(name, (*SERVE, "--join", fleet.address, "--name", name, *plain, *flags), tmp_path)
            for name, flags in (("plaintext", trust[6:]), ("tokenless", files.flags))
        ]
        await fleet.kill(["instance-0"])
        await fleet.bring(["instance-0"])
        await fleet.until_ready(names)
        assert {instance.name for instance in (await fleet.status()).instances} == set(names)
        for stranger in strangers:
            stranger.kill()
        assert await answers(fleet.client, REQUESTS[:4]) == expected


async def test_a_worker_that_is_process_1_of_a_container_hears_sigterm_before_it_is_anything(tmp_path: Path) -> None:
    container = ("unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc")
    if shutil.which("unshare") is None or subprocess.run((*container, "true"), capture_output=True).returncode != 0:
        pytest.skip("no PID namespace can be made here")
    command = (*container, sys.executable, "-m", "spotjax", "serve", "--join", "127.0.0.1:9", "--notices", "none")
    worker = Process("worker", command, tmp_path)
    try:
        await eventually("it has begun", lambda: any(handled(process.pid) for process in worker.tree()[1:]))
        worker.tree()[1].send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(worker.wait, 30) in (0, 128 + signal.SIGTERM)
    finally:
        worker.kill()


def handled(pid: int) -> int:
    """Whether a process handles SIGTERM, as the kernel knows it: without that, process 1 is deaf to it."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (mask,) = (line.split()[1] for line in lines if line.startswith("SigCgt:"))
    return int(mask, 16) & 1 << signal.SIGTERM - 1
