"""Compute Engine and TPU VMs: what the metadata server says is said once, at once, and nothing else is."""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest
from metadata_cases import URL, Heard, listen, now, until, wall

from spotjax.fleet.notices.gce import (
    MAINTENANCE_SECONDS,
    PREEMPTED_SECONDS,
    WAIT_SECONDS,
    gce_sources,
)
from spotjax.fleet.notices.notice import Notice, NoticeKind, Withdrawn
from spotjax.fleet.notices.several import Several
from spotjax.testing.metadata_faults import Fault, Kind, Request
from spotjax.testing.metadata_gce import GceMetadata

PREEMPTED, EVENT, UPCOMING = "instance/preempted", "instance/maintenance-event", "instance/upcoming-maintenance"
Script = Callable[[GceMetadata, Several, Heard], Coroutine[Any, Any, None]]


def heard_of(script: Script, fault: Callable[[Request], Fault | None] = lambda request: None, **settings: Any) -> Heard:
    def source(client: httpx.AsyncClient) -> Several:
        return Several("gce", gce_sources("vm", client, now, URL, wall=wall, **settings))

    return listen(lambda: GceMetadata(wall), source, script, fault)


def test_a_preemption_is_said_the_moment_that_the_server_knows_it() -> None:
    async def script(metadata: GceMetadata, source: Several, heard: Heard) -> None:
        await asyncio.sleep(33.3)
        metadata.tell(PREEMPTED, "TRUE")
        await asyncio.sleep(60)

    heard = heard_of(script)
    ((moment, word),) = heard.words
    assert isinstance(word, Notice) and moment == pytest.approx(1033.3)
    assert (word.source, word.kind, word.instance, word.evidence) == (
        "gce", NoticeKind.PREEMPT, "vm", "instance/preempted: TRUE"
    )  # fmt: skip
    assert word.deadline == pytest.approx(moment + PREEMPTED_SECONDS)
    assert len(heard.asked(PREEMPTED)) < 100 / WAIT_SECONDS + 5, "requests are held, not repeated"


def test_a_machine_that_is_preempted_when_its_worker_starts_is_told_so_at_once() -> None:
    async def script(metadata: GceMetadata, source: Several, heard: Heard) -> None:
        metadata.tell(PREEMPTED, "TRUE")
        await until(lambda: bool(heard.words), 1)

    assert heard_of(script, preempted_seconds=115.0).words[0][1].deadline == pytest.approx(1115, abs=1)  # type: ignore[union-attr]


def test_maintenance_of_the_host_is_told_and_taken_back_and_a_live_migration_is_advice() -> None:
    async def script(metadata: GceMetadata, source: Several, heard: Heard) -> None:
        for value in ("MIGRATE_ON_HOST_MAINTENANCE", "NONE", "TERMINATE_ON_HOST_MAINTENANCE", "NONE"):
            await asyncio.sleep(10)
            metadata.tell(EVENT, value)
        await asyncio.sleep(10)

    heard = heard_of(script, name="tpu")
    assert heard.kinds() == [
        "tpu-maintenance rebalance", "tpu-maintenance withdrawn", "tpu-maintenance maintenance",
        "tpu-maintenance withdrawn",
    ]  # fmt: skip
    (moment, word) = heard.words[2]
    assert isinstance(word, Notice) and word.deadline == pytest.approx(moment + MAINTENANCE_SECONDS)


@pytest.mark.parametrize("spelling", ["window_start_time maintenance_status", "windowStartTime maintenanceStatus"])
def test_upcoming_maintenance_ends_when_its_window_begins_by_the_clock_of_the_platform(spelling: str) -> None:
    async def script(metadata: GceMetadata, source: Several, heard: Heard) -> None:
        begin, status = spelling.split()
        await asyncio.sleep(10)
        start = datetime.fromtimestamp(int(wall()) + 86_400, UTC).isoformat().replace("+00:00", "Z")
        metadata.tell(UPCOMING, f'{{"{begin}": "{start}", "{status}": "PENDING", "type": "SCHEDULED"}}')
        await asyncio.sleep(10)
        metadata.tell(UPCOMING, f'{{"{begin}": "{start}", "{status}": "ONGOING"}}')
        await asyncio.sleep(10)
        metadata.tell(UPCOMING, "{}")
        await asyncio.sleep(10)

    heard = heard_of(script)
    assert heard.kinds() == ["gce-upcoming maintenance", "gce-upcoming maintenance", "gce-upcoming withdrawn"]
    (_, pending), (_, ongoing) = heard.words[:2]
    assert isinstance(pending, Notice) and isinstance(ongoing, Notice)
    assert pending.deadline == pytest.approx(1010 + 86_400, abs=2) and ongoing.deadline is None


@pytest.mark.parametrize("value", ["", "true", "TRUE FALSE", "<html>TRUE</html>", "null", "[]"])
@pytest.mark.parametrize("key", [PREEMPTED, EVENT, UPCOMING])
def test_what_is_none_of_the_documented_values_is_neither_a_notice_nor_the_end_of_one(key: str, value: str) -> None:
    async def script(metadata: GceMetadata, source: Several, heard: Heard) -> None:
        metadata.tell(key, value)
        await asyncio.sleep(10)
        assert not heard.words
        metadata.tell(PREEMPTED, "TRUE")
        await until(lambda: bool(heard.words), 5)
        metadata.tell(key, value)
        await asyncio.sleep(10)

    assert heard_of(script).kinds() == ["gce preempt"]


def test_trouble_is_logged_once_and_asked_again_about_soon(caplog: pytest.LogCaptureFixture) -> None:
    async def script(metadata: GceMetadata, source: Several, heard: Heard) -> None:
        await asyncio.sleep(100)

    def forbidden(request: Request) -> Fault | None:
        return Fault(Kind.STATUS, status=403)

    with caplog.at_level(logging.WARNING):
        heard = heard_of(script, forbidden)
    assert not heard.words
    asked = heard.asked(PREEMPTED)
    assert max(after - before for before, after in itertools.pairwise(asked)) <= 2.5
    assert len([record for record in caplog.records if "status 403" in record.message]) == 3, "once for each key"


@pytest.mark.parametrize("seed", range(12))
def test_no_fault_makes_a_notice_and_none_loses_one(seed: int) -> None:
    """Half of all answers are spoilt, in every way there is, while maintenance comes and goes and preemption comes."""
    chance = random.Random(seed)
    kinds = [kind for kind in Kind if kind is not Kind.STALE]

    def fault(request: Request) -> Fault | None:
        if chance.random() < 0.5:
            return None
        kind = chance.choice(kinds)
        return Fault(kind, chance.uniform(0, 3), chance.choice([301, 401, 403, 404, 429, 500, 503]), retry_after=3)

    async def script(metadata: GceMetadata, source: Several, heard: Heard) -> None:
        await asyncio.sleep(chance.uniform(0, 60))
        assert not heard.words
        for _ in range(3):
            metadata.tell(EVENT, "TERMINATE_ON_HOST_MAINTENANCE")
            begun, count = now(), len(heard.words)
            await until(lambda count=count: len(heard.words) == count + 1, 60)  # type: ignore[misc]
            assert now() - begun < 60
            metadata.tell(EVENT, "NONE")
            await until(lambda count=count: len(heard.words) == count + 2, 60)  # type: ignore[misc]
            await asyncio.sleep(chance.uniform(0, 30))
        metadata.tell(PREEMPTED, "TRUE")
        await until(lambda: len(heard.words) == 7, 60)
        await asyncio.sleep(60)

    heard = heard_of(script, fault)
    assert heard.kinds() == ["gce-maintenance maintenance", "gce-maintenance withdrawn"] * 3 + ["gce preempt"]
    assert all(isinstance(word, Withdrawn) or word.instance == "vm" for _, word in heard.words)


def test_a_server_that_holds_nothing_is_not_asked_in_a_hurry() -> None:
    async def script(metadata: GceMetadata, source: Several, heard: Heard) -> None:
        await asyncio.sleep(60)

    def spoil(request: Request) -> Fault | None:
        request.query.pop("wait_for_change", None)  # type: ignore[attr-defined]
        return None

    assert 30 < len(heard_of(script, spoil).asked(PREEMPTED)) < 90
