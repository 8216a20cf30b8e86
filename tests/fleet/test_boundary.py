"""Decoding stops where there is still time before a deadline, not sooner than asked for, and never too late."""

from __future__ import annotations

import asyncio
from random import Random

import pytest
from fleet_cases import TIGHT, Reading, random_prompt, read
from hypothesis import given, settings
from hypothesis import strategies as st
from pure_model import is_prefix, turns
from timed_cases import Fleet, make_fleet, now
from virtual_time import run

from spotjax.engine.request import FinishReason
from spotjax.errors import InstanceLost, NoFeasibleShape, NoSpareDevices, UnknownInstance
from spotjax.fleet.boundary import Leave
from spotjax.fleet.status import Reconfiguration
from spotjax.meshes.instance import InstanceState


def busy(fleet: Fleet, requests: int = 40) -> None:
    """Work for some ten seconds."""
    for n in range(requests):
        fleet.service.submit(f"r{n}", max_tokens=30, ignore_eos=True, seed=n)


async def left_after(leave: Leave, grace: float = 4.0) -> tuple[float, Reconfiguration, Fleet]:
    """Seconds from the notice until a busy instance was left; a spare one takes its place in the only replica."""
    fleet = await make_fleet(3, leave=leave, memory=TIGHT)
    busy(fleet)
    await asyncio.sleep(0.5)
    placement = fleet.service.controller.status().placement
    assert placement is not None
    leaving = max(placement.instances(0))
    fleet.cluster.kept[leaving] = now() + grace
    started = now()
    report = await fleet.service.controller.preempt(leaving, grace)
    return now() - started, report, fleet


def test_early_leaves_as_soon_as_everything_is_copied() -> None:
    async def scenario() -> None:
        seconds, report, fleet = await left_after("early", 4.0)
        assert seconds < 1 and report.requests_recomputed == 0
        assert "arranged" not in fleet.kinds()
        await fleet.finish()
        fleet.service.check_complete()

    run(scenario())


def test_late_decodes_until_shortly_before_the_deadline_and_loses_nothing() -> None:
    async def scenario() -> None:
        seconds, report, fleet = await left_after("late", 4.2)  # none has just been let in, with nothing to keep
        assert 3.2 < seconds < 4.2 and report.requests_recomputed == 0 and report.requests_kept
        assert report.precopy_seconds < 0.5, "the wait is no copying"
        assert len(fleet.cluster.copies) == 2, (
            "pages that were filled while decoding went on are copied before the stop"
        )
        assert [kind for kind in fleet.kinds() if kind in ("precopy", "arranged", "switch")][-3:] == [
            "precopy", "arranged", "switch",
        ]  # fmt: skip
        await fleet.finish()
        fleet.service.check_complete()

    run(scenario())


def test_late_does_not_wait_for_anybody_when_nobody_is_served() -> None:
    async def scenario() -> None:
        fleet = await make_fleet(3, leave="late")
        started = now()
        await fleet.service.controller.preempt("i2", 30)
        assert now() - started < 1
        await fleet.finish()

    run(scenario())


@pytest.mark.parametrize("leave", ["early", "late"])
def test_kv_for_which_there_is_no_time_is_computed_again(leave: Leave) -> None:
    async def scenario() -> None:
        fleet = await make_fleet(2, leave=leave)
        busy(fleet)
        await asyncio.sleep(0.5)
        fleet.service.controller._reconfigurer._tempo.switched(10.0)  # a switch is known to take that long
        report = await fleet.service.controller.preempt("i1", 5.0)
        assert report.requests_recomputed
        await fleet.finish()
        fleet.service.check_complete()

    run(scenario())


def test_a_loss_ends_the_wait_at_once() -> None:
    async def scenario() -> None:
        fleet = await make_fleet(4, leave="late")
        busy(fleet)
        await asyncio.sleep(0.5)
        preempting = asyncio.create_task(fleet.service.controller.preempt("i2", 30))
        await asyncio.sleep(1)
        assert not preempting.done() and "arranged" in fleet.kinds()
        started = now()
        fleet.die("i3")
        await preempting
        assert now() - started < 1
        await fleet.finish()
        fleet.service.check_complete()

    run(scenario())


def test_the_death_of_who_was_to_leave_ends_the_wait_at_once() -> None:
    async def scenario() -> None:
        fleet = await make_fleet(3, leave="late")
        busy(fleet)
        await asyncio.sleep(0.5)
        preempting = asyncio.create_task(fleet.service.controller.preempt("i2", 30))
        await asyncio.sleep(1)
        fleet.die("i2")
        started = now()
        report = await preempting
        assert now() - started < 1 and report.after is not None
        await fleet.finish()
        fleet.service.check_complete()

    run(scenario())


def test_a_second_notice_with_an_earlier_deadline_brings_the_stop_forward() -> None:
    async def scenario() -> None:
        fleet = await make_fleet(4, leave="late")
        busy(fleet)
        await asyncio.sleep(0.5)
        fleet.notice("i2", 30)
        await asyncio.sleep(1)
        fleet.notice("i3", 3)
        await asyncio.sleep(3)
        assert [i.name for i in fleet.service.members.alive()] == ["i0", "i1"]
        await fleet.finish()
        fleet.service.check_complete()

    run(scenario())


def test_a_newcomer_that_is_in_time_joins_in_the_same_change() -> None:
    async def scenario() -> None:
        fleet = await make_fleet(2, leave="late")
        busy(fleet)
        await asyncio.sleep(0.5)
        preempting = asyncio.create_task(fleet.service.controller.preempt("i1", 6))
        await asyncio.sleep(1)
        fleet.register("new")
        fleet.arrive("new")
        report = await preempting
        assert report.after is not None
        assert {device.instance for device in report.after.devices.values()} == {"i0", "new"}
        assert fleet.cluster.switches == 2, "the first mesh, and one change for both"
        await fleet.finish()
        fleet.service.check_complete()

    run(scenario())


def test_a_newcomer_that_is_too_late_joins_with_the_next_change() -> None:
    async def scenario() -> None:
        fleet = await make_fleet(2, leave="late")
        busy(fleet)
        await asyncio.sleep(0.5)
        fleet.service.controller._reconfigurer._tempo.prepared(10.0)  # it is known to take that long
        fleet.notice("i1", 4)
        await asyncio.sleep(1)
        fleet.register("new")
        fleet.arrive("new")
        await asyncio.sleep(6)
        status = fleet.service.controller.status()
        assert status.placement is not None
        assert {device.instance for device in status.placement.devices.values()} == {"i0", "new"}
        assert fleet.cluster.switches == 3
        await fleet.finish()
        fleet.service.check_complete()

    run(scenario())


@pytest.mark.parametrize("leave", ["early", "late"])
def test_without_a_mesh_to_change_to_decoding_goes_on_until_the_deadline(leave: Leave) -> None:
    async def scenario() -> None:
        fleet = await make_fleet(2, leave=leave, memory=TIGHT)
        busy(fleet)
        await asyncio.sleep(0.5)
        pipeline, deadline = fleet.cluster.pipelines[0], now() + 5
        fleet.notice("i1", 5)
        await asyncio.sleep(4.5)
        assert fleet.service.controller.status().ready
        await asyncio.sleep(1)
        assert deadline - 0.5 < pipeline.steps[-1] < deadline  # type: ignore[attr-defined]
        status = fleet.service.controller.status()
        assert status.placement is None and "stop" in fleet.kinds() and status.queued
        fleet.register("i1")
        fleet.arrive("i1")
        await fleet.finish()
        fleet.service.check_complete()

    run(scenario())


def test_whoever_joins_before_the_deadline_saves_the_requests_their_wait() -> None:
    async def scenario() -> None:
        fleet = await make_fleet(2, memory=TIGHT)
        busy(fleet)
        await asyncio.sleep(0.5)
        fleet.notice("i1", 10)
        await asyncio.sleep(4)
        fleet.register("new")
        fleet.arrive("new")
        await asyncio.sleep(1)
        status = fleet.service.controller.status()
        assert status.placement is not None and status.ready and "stop" not in fleet.kinds()
        assert {device.instance for device in status.placement.devices.values()} == {"i0", "new"}
        await fleet.finish()
        fleet.service.check_complete()

    run(scenario())


@pytest.mark.parametrize("memory", [TIGHT, 2**30])
def test_closing_waits_for_no_deadline(memory: int) -> None:
    async def scenario() -> None:
        fleet = await make_fleet(2, leave="late", memory=memory)
        busy(fleet)
        await asyncio.sleep(0.5)
        preempting = asyncio.create_task(fleet.service.controller.preempt("i1", 3600))
        await asyncio.sleep(1)
        started = now()
        await fleet.service.controller.close()
        assert now() - started < 2 and preempting.done()

    run(scenario())


def test_a_page_that_was_given_up_and_taken_by_another_is_copied_again() -> None:
    """Few pages: sequences lose theirs to each other while decoding goes on, between and during rounds of copying."""

    async def scenario(seed: int) -> int:
        fleet = await make_fleet(3, seed=seed, leave="late", pages=11, memory=TIGHT)
        busy(fleet, 12)
        await asyncio.sleep(0.5)
        fleet.notice("i1", 3)
        await asyncio.sleep(3)
        await fleet.finish()
        fleet.service.check_complete()
        return len(fleet.cluster.copies)

    assert max(run(scenario(seed)) for seed in range(20)) == 2


# --- everything at once ---------------------------------------------------------------------------------------------

OPERATIONS = ["submit", "submit", "notice", "notice", "brief notice", "preempt", "release", "die", "add", "stillborn",
              "again", "cancel"]  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    leave=st.sampled_from(["early", "late"]),
    count=st.integers(2, 5),
    tight=st.booleans(),
    pages=st.integers(11, 24),
    operations=st.lists(st.tuples(st.sampled_from(OPERATIONS), st.floats(0, 4)), min_size=4, max_size=14),
    seed=st.integers(0, 2**32),
)
def test_whatever_is_announced_or_not_every_request_gets_its_tokens_and_instances_are_left_in_time(
    leave: Leave, count: int, tight: bool, pages: int, operations: list[tuple[str, float]], seed: int
) -> None:
    run(life(leave, count, TIGHT if tight else 2**30, pages, operations, Random(seed)))


async def life(
    leave: Leave, count: int, memory: int, pages: int, operations: list[tuple[str, float]], random: Random
) -> None:
    """One fleet under random operations, at random moments, brought to an end with enough instances."""

    async def supply(wanted: int) -> list[str]:
        names = list(fleet.service.members.take_spare(wanted))
        for name in names:
            fleet.cluster.absent.add(name)
            asyncio.get_running_loop().call_later(random.uniform(0, 6), arrive, name)
        return names

    def arrive(name: str) -> None:
        if fleet.service.members.is_alive(name):
            fleet.arrive(name)

    fleet = await make_fleet(
        count, random.randint(1, count), random.getrandbits(32), leave, memory, supply=supply, pages=pages
    )
    controller, members = fleet.service.controller, fleet.service.members
    changes: list[asyncio.Task[Reconfiguration]] = []
    readers: dict[str, asyncio.Task[Reading]] = {}
    cancelled: set[str] = set()

    def submit() -> None:
        name = f"r{len(fleet.service.requests)}"
        prompt = random_prompt(random, fleet.service.requests.values())
        fleet.service.submit(
            name, prompt, n=random.randint(1, 3), max_tokens=random.randint(1, 20), seed=random.getrandbits(9)
        )
        readers[name] = asyncio.create_task(read(controller, name, random if random.random() < 0.5 else None))

    def operate(operation: str) -> None:
        ready = list(members.having(InstanceState.READY))
        alive = [instance.name for instance in members.alive()]
        spare = len(members.having(InstanceState.GONE))
        if operation == "submit":
            submit()
        elif operation == "notice" and ready:
            fleet.notice(random.choice(ready), random.uniform(6, 30))
        elif operation == "brief notice" and alive:
            name = random.choice(alive)
            fleet.notice(name, random.choice((1e-6, 0.1, 0.5)), in_time=False)
            fleet.cluster.kept.pop(name, None)
        elif operation == "preempt" and alive:
            name, grace = random.choice(alive), random.choice((0.0, 0.3, 20.0))
            changes.append(asyncio.create_task(controller.preempt(name, grace)))
            if grace < 1:
                fleet.cluster.kept.pop(name, None)
        elif operation == "release" and alive:
            changes.append(asyncio.create_task(controller.release(random.choice(alive))))
        elif operation == "die" and alive:
            fleet.die(random.choice(alive))
        elif operation == "again" and alive:
            fleet.die(name := random.choice(alive))
            fleet.register(name)
            asyncio.get_running_loop().call_later(random.uniform(0, 3), arrive, name)
        elif operation in ("add", "stillborn") and spare:
            changes.append(asyncio.create_task(controller.add(random.randint(1, spare))))
            if operation == "stillborn":
                asyncio.get_running_loop().call_later(random.uniform(0, 3), die_if_joining)
        elif operation == "cancel" and fleet.service.requests:
            name = random.choice(list(fleet.service.requests))
            if controller.cancel(name):
                cancelled.add(name)

    def die_if_joining() -> None:
        for name in members.having(InstanceState.JOINING):
            fleet.die(name)

    submit()
    for operation, wait in operations:
        operate(operation)
        await (asyncio.sleep(wait) if random.random() < 0.7 else turns(random.randrange(9)))
        for replica in controller._dispatcher.replicas:
            replica.scheduler.check()
    await asyncio.sleep(40)  # every deadline has passed by then
    while len(members.having(InstanceState.READY)) < 2:
        fleet.register(name := f"new{len(members.all())}")
        fleet.arrive(name)
        await asyncio.sleep(1)
    for outcome in await asyncio.gather(*changes, return_exceptions=True):
        expected = (Reconfiguration, UnknownInstance, NoSpareDevices, InstanceLost, NoFeasibleShape)
        assert isinstance(outcome, expected), repr(outcome)
    await fleet.finish()
    for name, reader in readers.items():
        (await reader).check(fleet.service.log.states(name))
    for name in cancelled:
        for state, end in zip(fleet.service.log.states(name), fleet.service.expected(name), strict=True):
            assert state == end or state.finish is FinishReason.CANCELLED
            assert is_prefix(state.tokens, end.tokens)
    fleet.service.check_complete(but=sorted(cancelled))
    assert controller.status().tokens_committed == sum(
        len(state.tokens) for name in fleet.service.requests for state in fleet.service.log.states(name)
    )
