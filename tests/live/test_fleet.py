"""One promise of fleet mode each, with real processes: a fleet of four is shared, and healthy before every test."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import httpx
import pytest
import pytest_asyncio
from live_cases import (
    CONTROLLER,
    NAMES,
    REQUESTS,
    SlowFleet,
    eventually,
    heard,
    load_on,
    more_tokens,
    said,
    stages,
    worker_flags,
)
from prometheus_client.parser import text_string_to_metric_families as parse

from spotjax.telemetry import metrics
from spotjax.tools.chaos import LEASE_SECONDS
from spotjax.tools.chaos_run import restless
from spotjax.tools.load import answers
from spotjax.tools.local_fleet import LATE_SECONDS, EmbeddedService
from spotjax.tools.request_mix import Output, difference
from spotjax.tools.service import GRACE_SECONDS, running

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]
DETECTION_SECONDS = 1.5
"""By how much the loss of a silent instance may be noticed later than its lease ends, on a busy machine."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(programs: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[SlowFleet]:
    """One replica of four stages, each an instance."""
    flags = (*CONTROLLER, "--mesh", "1x4x2", "--http", "127.0.0.1:0")
    fleet = SlowFleet(tmp_path_factory.mktemp("fleet"), NAMES, flags, worker_flags(programs))
    async with running(fleet):
        yield fleet
        assert await fleet.stop() == 0
        assert fleet.left() == []


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def expected(shared: SlowFleet) -> Mapping[str, Output]:
    """What the fleet says undisturbed."""
    return await answers(shared.client, REQUESTS)


@pytest_asyncio.fixture(loop_scope="module")
async def fleet(shared: SlowFleet, expected: Mapping[str, Output]) -> SlowFleet:
    """The shared fleet, with all four stages up."""
    if missing := await shared.missing():
        await shared.bring(missing)
    await shared.until("four stages", lambda status: status.ready and len(stages(status)) == 4)
    shared.note("--- next test")
    return shared


async def test_a_fleet_says_what_one_process_says(
    expected: Mapping[str, Output], programs: Path, tmp_path: Path
) -> None:
    flags = (*CONTROLLER, "--instances", "2", *worker_flags(programs))
    async with running(EmbeddedService(tmp_path, flags, NAMES[:2])) as embedded:
        alone = await answers(embedded.client, REQUESTS)
    assert [difference(expected[name], alone[name]) for name in expected] == [None] * len(expected)


@pytest.mark.parametrize("stage", [0, 1], ids=["first", "middle"])
async def test_any_stage_can_be_killed(fleet: SlowFleet, expected: Mapping[str, Output], stage: int) -> None:
    """The last one is in ``test_a_restarted_worker_attaches_to_its_parameters_and_nothing_is_recomputed``."""
    async with load_on(fleet, expected) as load:
        victim = stages(await fleet.status())[stage]
        await fleet.kill([victim])
        await more_tokens(load, 40)
        await fleet.until_gone([victim])


async def test_two_instances_can_be_killed_at_once(fleet: SlowFleet, expected: Mapping[str, Output]) -> None:
    async with load_on(fleet, expected) as load:
        await fleet.kill(stages(await fleet.status())[1:3])
        await more_tokens(load, 40)


async def test_a_silent_instance_is_lost_when_its_lease_ends_and_comes_back_harmless(
    fleet: SlowFleet, expected: Mapping[str, Output]
) -> None:
    async with load_on(fleet, expected) as load:
        victim, begin = stages(await fleet.status())[1], time.monotonic()
        worker = fleet.workers[victim]
        worker.signal(signal.SIGSTOP)
        try:
            await fleet.until_gone([victim])
            seconds = time.monotonic() - begin
            await more_tokens(load, 40)
            since = len(fleet.events)
        finally:
            worker.signal(signal.SIGCONT)
        assert 0.5 * LEASE_SECONDS < seconds < LEASE_SECONDS + DETECTION_SECONDS
        await fleet.until_ready([victim])
        assert worker.exit_code is None, "it did not come back, a new one did"
        await more_tokens(load, 40)
        assert sum(event.fields["bytes_loaded"] for event in said(fleet, "precopy", since)) == 0, "it lost what it had"  # type: ignore[misc]


async def test_a_short_silence_loses_nobody(fleet: SlowFleet, expected: Mapping[str, Output]) -> None:
    async with load_on(fleet, expected) as load:
        since, worker = len(fleet.events), fleet.workers[stages(await fleet.status())[2]]
        worker.signal(signal.SIGSTOP)
        await asyncio.sleep(0.4 * LEASE_SECONDS)
        worker.signal(signal.SIGCONT)
        await more_tokens(load, 40)
        assert said(fleet, "lost", since) == []


async def test_a_stopped_worker_whose_heartbeat_goes_on_holds_nobody_up_for_ever(
    fleet: SlowFleet, expected: Mapping[str, Output]
) -> None:
    async with load_on(fleet, expected) as load:
        worker = fleet.workers[stages(await fleet.status())[0]]
        worker.signal(signal.SIGSTOP, whole=False)
        try:
            await more_tokens(load, 40)
        finally:
            worker.signal(signal.SIGCONT)


async def test_notice_moves_everything_and_the_worker_ends_by_itself(
    fleet: SlowFleet, expected: Mapping[str, Output]
) -> None:
    async with load_on(fleet, expected) as load:
        since, leaving = len(fleet.events), stages(await fleet.status())[1]
        await fleet.leave(leaving)
        assert fleet.workers[leaving].exit_code == 0
        await fleet.until_gone([leaving])
        await more_tokens(load, 40)
        switch = await heard(fleet, "switch", since)
        assert switch.fields["recomputed"] == 0 and int(switch.fields["kept"]) > 0


async def test_a_job_that_slurm_preempts_leaves_in_order_though_all_its_processes_hear_of_it(
    fleet: SlowFleet, expected: Mapping[str, Output]
) -> None:
    async with load_on(fleet, expected) as load:
        since, leaving = len(fleet.events), stages(await fleet.status())[1]
        worker = fleet.workers[leaving]
        assert len(worker.tree()) > 1, "the heartbeat is a process of its own"
        for number in (signal.SIGCONT, signal.SIGTERM):
            worker.signal(number)
        assert await asyncio.to_thread(worker.wait, GRACE_SECONDS + LATE_SECONDS) == 0
        await fleet.until_gone([leaving])
        await more_tokens(load, 40)
        notice, switch = await heard(fleet, "notice", since), await heard(fleet, "switch", since)
        assert (notice.fields["instance"], notice.fields["source"]) == (leaving, "signal")
        assert switch.fields["recomputed"] == 0 and int(switch.fields["kept"]) > 0


async def test_a_drained_instance_leaves_without_recomputing(fleet: SlowFleet, expected: Mapping[str, Output]) -> None:
    async with load_on(fleet, expected) as load:
        leaving = stages(await fleet.status())[2]
        report = await fleet.client.drain(leaving)
        assert report.requests_recomputed == 0 and report.requests_kept > 0
        await more_tokens(load, 20)
        await fleet.kill([leaving])


async def test_a_restarted_worker_attaches_to_its_parameters_and_nothing_is_recomputed(
    fleet: SlowFleet, expected: Mapping[str, Output]
) -> None:
    async with load_on(fleet, expected) as load:
        victim = stages(await fleet.status())[3]
        await fleet.kill([victim])
        await fleet.until("the others go on", lambda status: status.ready and victim not in stages(status))
        await more_tokens(load, 20)
        since = len(fleet.events)
        await fleet.bring([victim])
        await fleet.until("four stages again", lambda status: status.ready and victim in stages(status))
        await more_tokens(load, 20)
        assert fleet.workers[victim].maps(str(fleet.store))
        assert sum(event.fields["bytes_loaded"] for event in said(fleet, "precopy", since)) == 0  # type: ignore[misc]
        switches = said(fleet, "switch", since)
        assert sum(int(switch.fields["recomputed"]) for switch in switches) == 0
        assert sum(int(switch.fields["kept"]) for switch in switches) > 0


async def test_requests_wait_while_all_instances_are_gone(fleet: SlowFleet, expected: Mapping[str, Output]) -> None:
    async with load_on(fleet, expected) as load:
        await fleet.kill(NAMES)
        await fleet.until_gone(NAMES)
        assert not (await fleet.status()).ready
        seen = load.tokens
        await fleet.bring(NAMES)
        await fleet.until_ready()
        assert (load.running and load.tokens == seen) or load.tokens > seen
        await more_tokens(load, 20)


async def test_a_second_worker_of_the_same_name_waits_until_the_first_is_gone(
    fleet: SlowFleet, expected: Mapping[str, Output]
) -> None:
    async with load_on(fleet, expected) as load:
        since, first = len(fleet.events), fleet.workers["instance-2"]
        second = fleet.spawn("instance-2")
        try:
            await eventually("it is refused", lambda: "is in the fleet already" in second.tail())
            await more_tokens(load, 20)
            assert said(fleet, "lost", since) == [] and first.exit_code is None
        finally:
            first.kill()
        await fleet.until_ready(["instance-2"])
        assert second.exit_code is None
        await more_tokens(load, 20)


async def test_a_late_worker_joins_as_a_spare_and_can_leave(fleet: SlowFleet, expected: Mapping[str, Output]) -> None:
    async with load_on(fleet, expected) as load:
        late = fleet.spawn("late")
        try:
            await fleet.until_ready(["late"])
            await more_tokens(load, 20)
            late.signal(signal.SIGTERM, whole=False)
            assert await asyncio.to_thread(late.wait, GRACE_SECONDS) == 0
        finally:
            late.kill()
            del fleet.workers["late"]
        await fleet.until_gone(["late"])
        await more_tokens(load, 20)


async def test_the_controller_shows_how_each_of_its_workers_is(
    fleet: SlowFleet, expected: Mapping[str, Output]
) -> None:
    async with load_on(fleet, expected) as load:
        await more_tokens(load, 50)
        await eventually("every worker says how it is", lambda: have_told(fleet))


def have_told(fleet: SlowFleet) -> bool:
    """Whether all workers are on the controller's metrics, with their steps and their bytes."""
    http = next(record["address"] for record in fleet.server.records() if record["message"] == "serving HTTP")
    text = httpx.get(f"http://{http}/metrics").text
    samples = [sample for family in parse(text) for sample in family.samples if "worker" in sample.labels]
    steps = {s.labels["worker"] for s in samples if s.name == metrics.STAGE_TIME.name + "_count" and s.value}
    sent = {s.labels["worker"] for s in samples if s.name == metrics.SENT.name and s.value}
    return steps == sent == {s.labels["worker"] for s in samples} == set(NAMES)


async def test_the_controller_has_no_jax(fleet: SlowFleet) -> None:
    assert not fleet.server.maps("jaxlib")
    assert all(worker.maps("jaxlib") for worker in fleet.workers.values())


async def test_nothing_is_held_when_all_requests_have_ended(fleet: SlowFleet) -> None:
    assert await restless(fleet) == []
