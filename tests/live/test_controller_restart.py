"""The controller dies, is frozen, has no room on its disk: nothing is lost. One fleet for all of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import httpx
import pytest
import pytest_asyncio
from live_cases import CONTROLLER, NAMES, REQUESTS, SlowFleet, eventually, load_on, more_tokens, worker_flags

from spotjax.async_client import AsyncSpotjaxClient
from spotjax.engine.log_inspection import inspect_log
from spotjax.errors import LogUnavailable, UnknownRequest
from spotjax.tools.chaos import possible
from spotjax.tools.chaos_run import run
from spotjax.tools.chaos_schedule import Event
from spotjax.tools.load import answers
from spotjax.tools.processes import Process, free_port
from spotjax.tools.request_mix import Output
from spotjax.tools.service import POLL_SECONDS, SERVE, running
from spotjax.tools.small_disk import DiskUnavailable, SmallDisk

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]
SEED = 5
EVENTS = (
    Event("controller at admission", (), tokens=20, seconds=0.03),
    Event("controller in a join", ("instance-1",), tokens=10, seconds=0.01),
    Event("controller twice", (), tokens=0, seconds=0.3),
    Event("controller with a full disk", (), tokens=10, seconds=0.3),
)
"""The rest, and those that are drawn, are for ``tools.soak --controller``: each costs seconds."""
PATIENCE_SECONDS = 60.0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(programs: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[SlowFleet]:
    """Two workers of their own, and a controller whose log is on a small disk, where there can be one."""
    directory = tmp_path_factory.mktemp("restarts")
    with contextlib.ExitStack() as stack:
        disk = None
        with contextlib.suppress(DiskUnavailable):
            disk = stack.enter_context(SmallDisk(directory / "disk"))
        workers = worker_flags(programs)
        flags = (*CONTROLLER, "--mesh", "1x2x2")
        http = f"127.0.0.1:{free_port('127.0.0.1')}"
        fleet = SlowFleet(directory, NAMES[:2], flags, workers, patience=PATIENCE_SECONDS, disk=disk, http=http)
        async with running(fleet):
            yield fleet


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def expected(fleet: SlowFleet) -> Mapping[str, Output]:
    """What the fleet says undisturbed."""
    return await answers(fleet.client, REQUESTS)


async def test_a_log_has_one_controller_at_a_time(fleet: SlowFleet, expected: Mapping[str, Output]) -> None:
    async with load_on(fleet, expected) as load:
        flags = ("--data-listen", "127.0.0.1:0", "--commit-log", str(fleet.commit_log))
        second = Process("second", (*SERVE, "--listen", "127.0.0.1:0", "--http", "off", *flags), fleet.directory)
        assert await asyncio.to_thread(second.wait, 30) == 1
        assert f"is in use by process {fleet.server.pid}" in second.tail()
        assert inspect_log(fleet.commit_log).damage == ()
        await more_tokens(load, 20)


async def test_on_a_full_disk_new_requests_are_refused_and_all_others_wait(
    fleet: SlowFleet, expected: Mapping[str, Output]
) -> None:
    if fleet.disk is None:
        pytest.skip("no disk of our own can be made here")
    async with (
        load_on(fleet, expected) as load,
        AsyncSpotjaxClient(fleet.address, patience=0) as client,
        asyncio.timeout(60),
    ):
        fleet.disk.fill()
        try:
            while await client.ready():  # what is written already has room for some more
                await asyncio.sleep(POLL_SECONDS)
            waiting, seen = set(load.running), load.tokens
            with pytest.raises(LogUnavailable, match="disk is full; try again when that is mended"):
                async for _ in client.generate("To be", max_tokens=4, request_id="refused"):
                    pass
            with pytest.raises(UnknownRequest):
                await anext(client.resume("refused"))
            assert load.tokens <= seen + 100 and waiting <= set(load.running)
        finally:
            fleet.disk.free()
        await more_tokens(load, 20)
        while not await client.ready():
            await asyncio.sleep(POLL_SECONDS)
        assert [delta.offset async for delta in client.generate("To be", max_tokens=4, request_id="refused")]
    await eventually("all ended", lambda: not any(one.unfinished for one in inspect_log(fleet.commit_log).requests))


async def test_a_stream_over_http_goes_on_after_a_preemption_and_another_controller(fleet: SlowFleet) -> None:
    asked = {"prompt": "ROMEO:\n", "max_tokens": 240, "temperature": 0.8, "seed": 3, "ignore_eos": True}
    calm = "".join([delta.text async for delta in fleet.client.generate(**asked)])  # type: ignore[arg-type]
    text, lives, harms = "", len(fleet.lives), [100, 400]
    async with asyncio.timeout(120):
        async for event_id, piece in followed(f"http://{fleet.http}", asked):
            assert event_id
            text += piece
            if harms and len(text) >= harms[0]:
                if harms.pop(0) == 100:
                    await fleet.kill(["instance-1"])
                    await fleet.bring(["instance-1"])
                else:
                    await fleet.kill_server()
                    fleet.start_server()
    assert text == calm and not harms and len(fleet.lives) == lives + 1
    await fleet.until_ready()


async def followed(url: str, asked: Mapping[str, object]) -> AsyncIterator[tuple[str, str]]:
    """Ids and texts of the events of a completion, over as many connections as it takes."""
    headers = {"idempotency-key": "speech"}
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        while True:
            with contextlib.suppress(httpx.TransportError):  # the controller died, or is not there yet
                async with client.stream(
                    "POST", "/v1/completions", json={**asked, "stream": True}, headers=headers
                ) as s:
                    async for line in s.aiter_lines():
                        if line.startswith("id: "):
                            headers["last-event-id"] = line[4:]
                        if line == "data: [DONE]":
                            return
                        if s.status_code == 200 and line.startswith('data: {"id"'):
                            yield headers["last-event-id"], json.loads(line[6:])["choices"][0]["text"]
            await asyncio.sleep(POLL_SECONDS)


async def test_whenever_the_controller_dies_no_request_is_lost(fleet: SlowFleet) -> None:
    events = [event for event in EVENTS if event.kind in possible(fleet)]
    report = await run(fleet, SEED, events, clients=3, requests=8)
    assert not report.problems, report
    assert len(report.restarts) >= 2 and report.requests == report.asked
