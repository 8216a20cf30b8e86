"""A machine is listened to as the settings say, by whoever works on it and by a server that is alone on it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from spotjax.config import ServeConfig
from spotjax.fleet.notices.gce import GPU_MAINTENANCE_SECONDS, MAINTENANCE_SECONDS
from spotjax.fleet.notices.notice import Notice
from spotjax.fleet.notices.standing import Word
from spotjax.machine_notices import MARGIN_SECONDS, MachineEnd, MachineNotices
from spotjax.testing.metadata_azure import AzureMetadata
from spotjax.testing.metadata_faults import Fault, Kind, Request
from spotjax.testing.metadata_gce import GceMetadata
from spotjax.testing.metadata_server import MetadataServer


@contextlib.asynccontextmanager
async def listen(config: ServeConfig, *, gpu: bool = False) -> AsyncIterator[tuple[MachineNotices, Any]]:
    heard = asyncio.Queue[Word]()
    notices = MachineNotices(config, "vm", heard.put_nowait, signals=False, gpu=gpu)
    try:
        async with asyncio.timeout(20):
            yield notices, heard.get
    finally:
        await notices.close()


@pytest.mark.parametrize(("gpu", "seconds"), [(False, MAINTENANCE_SECONDS), (True, GPU_MAINTENANCE_SECONDS)])
async def test_the_platform_is_found_and_its_times_are_those_of_the_machine(gpu: bool, seconds: float) -> None:
    metadata = GceMetadata()
    async with (
        MetadataServer(metadata).serving() as url,
        listen(ServeConfig(metadata_url=url, notice_seconds=115.0), gpu=gpu) as (_, hear),
    ):
        metadata.tell("instance/preempted", "TRUE")
        word = await hear()
        assert isinstance(word, Notice) and word.source == "gce"
        assert word.deadline == pytest.approx(time.monotonic() + 115.0, abs=5)
        metadata.tell("instance/maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")
        word = await hear()
        assert isinstance(word, Notice) and word.source == "gce-maintenance"
        assert word.deadline == pytest.approx(time.monotonic() + seconds, abs=5)


async def test_what_is_named_is_listened_to_and_nothing_else(tmp_path: Path) -> None:
    file, asked = tmp_path / "notice", []

    def note(request: Request) -> Fault | None:
        asked.append(request.path)
        return None

    async with MetadataServer(GceMetadata(), note).serving() as url:
        settings: Mapping[str, Any] = {
            "metadata_url": url,
            "notice_file": str(file),
            "notice_command": "echo rebalance",
        }
        async with listen(ServeConfig(notices="none", **settings)) as (_, hear):
            file.write_text("preempt 30")
            assert {(await hear()).source, (await hear()).source} == {"file", "command"}
        assert not asked
        async with listen(ServeConfig(notices="aws,azure", metadata_url=url)):
            while not {"/latest/api/token", "/metadata/scheduledevents"} <= set(asked):
                await asyncio.sleep(0.01)
        assert not [path for path in asked if path.startswith("/computeMetadata")]


async def test_a_platform_that_cannot_be_looked_for_is_told_to_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async with listen(ServeConfig(metadata_url="http://metadata:port")):
        while "cannot be found" not in caplog.text:
            await asyncio.sleep(0.01)


async def test_azure_may_take_a_machine_that_is_free_and_trouble_about_that_ends_nobody(
    caplog: pytest.LogCaptureFixture,
) -> None:
    metadata, forbidden = AzureMetadata(), False

    def fault(request: Request) -> Fault | None:
        return Fault(Kind.STATUS, status=500) if forbidden else None

    async with (
        MetadataServer(metadata, fault).serving() as url,
        listen(ServeConfig(notices="azure", metadata_url=url)) as (notices, hear),
    ):
        await notices.acknowledge()  # nothing is announced
        metadata.schedule("Preempt", 60.0)
        first = await hear()
        assert isinstance(first, Notice) and first.deadline is not None
        forbidden = True
        await notices.acknowledge()
        assert "it could not be told to earlier" in caplog.text
        forbidden = False
        await notices.acknowledge()
        started = await hear()
        assert isinstance(started, Notice) and "Started" in started.evidence


async def test_a_server_that_is_alone_ends_in_time_but_not_for_advice_nor_for_what_is_far_away(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "notice"
    end = MachineEnd(ServeConfig(notices="none", notice_file=str(file)))
    try:
        async with asyncio.timeout(20):
            for line in ("rebalance", "maintenance 4000"):
                file.write_text(line)
                while line not in caplog.text:
                    await asyncio.sleep(0.01)
                assert not end.near.is_set() and end.seconds(30.0) == 30.0
            file.write_text("maintenance 20")
            await end.near.wait()
            assert end.seconds(30.0) == pytest.approx(20.0 - MARGIN_SECONDS, abs=1)
            assert end.seconds(3.0) == 3.0
    finally:
        await end.close()
