"""Instances and clients come and go: every token is what it would have been, sent once, and no page is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from fleet_cases import TIGHT, PureCluster, Reading, Service, instances, make_service, random_prompt, read
from hypothesis import given, settings
from hypothesis import strategies as st
from pure_model import is_prefix, turns
from recording_log import RecordingLog
from virtual_time import run

from spotjax.engine.durable_log import DurableLog
from spotjax.engine.log_inspection import inspect_log
from spotjax.engine.request import FinishReason
from spotjax.errors import Draining, InstanceLost, InvalidRequest, NoSpareDevices, Overloaded, UnknownInstance
from spotjax.fleet.change import Recovery
from spotjax.fleet.status import Reconfiguration
from spotjax.meshes.instance import InstanceState

PATIENCE = 20.0
"""Seconds of real time after which a service that should have finished hangs."""


async def finish(service: Service) -> None:
    assert await service.controller.drain(PATIENCE), "requests hang"
    await service.controller.close()
    assert service.cluster.closed
    failure = service.controller.failure
    if failure.done():
        await failure
    failure.cancel()


def ready(service: Service) -> list[str]:
    return [i.name for i in service.members.alive() if i.state is InstanceState.READY]


async def until(service: Service, condition: Callable[[], bool]) -> None:
    for _ in range(20_000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("never happens")


# --- everything at once ---------------------------------------------------------------------------------------------


LIVES: dict[str, st.SearchStrategy[Any]] = {
    "fleet": st.tuples(st.integers(2, 5), st.integers(1, 2), st.booleans()),
    "pages": st.integers(11, 24),
    "operations": st.lists(
        st.sampled_from(["submit", "submit", "preempt", "preempt", "grace", "brief grace", "add", "cancel", "leave"]),
        min_size=4,
        max_size=16,
    ),
    "faults": st.integers(0, 3),
    "seed": st.integers(0, 2**32),
}
"""Arguments of ``life``."""


@settings(max_examples=120, deadline=None)
@given(**LIVES)
def test_whatever_happens_every_request_gets_exactly_its_tokens(
    fleet: tuple[int, int, bool], pages: int, operations: list[str], faults: int, seed: int
) -> None:
    run(life(fleet, pages, operations, faults, Random(seed)))


async def life(
    fleet: tuple[int, int, bool],
    pages: int,
    operations: list[str],
    faults: int,
    random: Random,
    recovery: Recovery = "spotjax",
) -> None:
    """One service under random operations, brought to an end with all its instances back."""
    left = faults

    def fault() -> None:
        nonlocal left
        if left and random.random() < 0.3:
            left -= 1
            raise InstanceLost("a loss that passes by")

    count, devices, tight = fleet
    machines = instances(count, devices, TIGHT if tight else 2**30)
    log = RecordingLog(lambda: random.choice((0, 0, 0, 1, 2, 9)))
    service = make_service(
        random, machines, random.randint(1, count), pages, fault=fault, retain_seconds=1e9, log=log, recovery=recovery
    )
    controller = service.controller
    await controller.start()
    changes: list[asyncio.Task[Reconfiguration]] = []
    readers: dict[str, asyncio.Task[Reading]] = {}
    cancelled: set[str] = set()

    def change(work: Awaitable[Reconfiguration]) -> asyncio.Task[Reconfiguration]:
        changes.append(asyncio.ensure_future(work))
        return changes[-1]

    def submit() -> None:
        name = f"r{len(service.requests)}"
        prompt = random_prompt(random, service.requests.values())
        service.submit(
            name, prompt, n=random.randint(1, 3), max_tokens=random.randint(1, 16), seed=random.getrandbits(9)
        )
        readers[name] = asyncio.create_task(read(controller, name, random if random.random() < 0.5 else None))

    def operate(operation: str) -> None:
        alive = [instance.name for instance in service.members.alive()]
        spare = count - len(alive)
        if operation == "submit":
            submit()
        elif operation == "preempt" and alive:
            change(controller.preempt(random.choice(alive), 0))
        elif operation == "grace" and alive:
            change(controller.preempt(random.choice(alive), 1000))
        elif operation == "brief grace" and alive:
            change(controller.preempt(random.choice(alive), 1e-6))
        elif operation == "add" and spare:
            change(controller.add(random.randint(1, spare)))
        elif operation == "leave" and changes:
            random.choice(changes).cancel()  # whoever asked for a change goes away; the change goes on
        elif operation == "cancel" and service.requests:
            name = random.choice(list(service.requests))
            if controller.cancel(name, random.choice(("cancelled", "deadline"))):
                cancelled.add(name)

    submit()
    for operation in operations:
        operate(operation)
        await turns(random.choice((0, 1, 2, 8, 30)))
        for replica in controller._dispatcher.replicas:
            replica.scheduler.check()
    for outcome in await asyncio.gather(*changes, return_exceptions=True):
        unexpected = isinstance(outcome, BaseException) and not isinstance(
            outcome, (UnknownInstance, NoSpareDevices, asyncio.CancelledError)
        )
        assert not unexpected, repr(outcome)
    await asyncio.gather(*controller._attendance._changes)
    if spare := count - len(service.members.alive()):
        await controller.add(spare)
    assert len(ready(service)) == count
    await finish(service)
    for name, reader in readers.items():
        (await reader).check(service.log.states(name))
    for name in cancelled:
        for state, end in zip(service.log.states(name), service.expected(name), strict=True):
            assert state == end or state.finish in (FinishReason.CANCELLED, FinishReason.DEADLINE)
            assert is_prefix(state.tokens, end.tokens)
    service.check_complete(but=sorted(cancelled))
    assert controller.status().tokens_committed == sum(
        len(state.tokens) for name in service.requests for state in service.log.states(name)
    )


# --- one thing at a time --------------------------------------------------------------------------------------------


async def started(count: int, alive: int | None = None, seed: int = 0, **options: object) -> Service:
    memory = options.pop("memory", 2**30)
    service = make_service(Random(seed), instances(count, 1, memory), alive, **options)  # type: ignore[arg-type]
    await service.controller.start()
    return service


async def test_choices_that_end_in_the_same_step_end_one_request() -> None:
    service = await started(1)
    service.submit("r", n=3, max_tokens=4, ignore_eos=True)
    (await read(service.controller, "r")).check(service.expected("r"))
    await finish(service)
    service.check_complete()


async def test_cancelling_a_request_ends_all_its_choices_once() -> None:
    service = await started(1, alive=0)
    service.submit("r", n=3)
    assert service.controller.cancel("r", "deadline")
    assert not service.controller.cancel("r")
    await turns(5)
    states = service.log.states("r")
    assert [state.finish for state in states] == [FinishReason.DEADLINE] * 3
    await finish(service)
    service.check_at_rest()


async def test_a_notice_moves_sequences_with_their_kv_and_recomputes_nothing() -> None:
    service = await started(2)
    for n in range(3):
        service.submit(f"r{n}", max_tokens=30, ignore_eos=True, seed=n)
    await until(service, lambda: len(service.log.states("r2")[0].tokens) > 3)
    report = await service.controller.preempt("i1", 1000)
    assert (report.requests_kept, report.requests_recomputed) == (3, 0)
    assert report.before is not None and report.after is not None and report.epoch == 2
    spans = [span for batch in service.cluster.pipelines[0].batches for span in batch.spans]
    prefilled = [span.sequence for span in spans if len(span.tokens) > 1]
    assert len(prefilled) < 3, "the replica that stays prefilled only what it had from the start"
    await finish(service)
    service.check_complete()


async def test_without_notice_sequences_are_recomputed_and_say_the_same() -> None:
    service = await started(2)
    for n in range(4):
        service.submit(f"r{n}", max_tokens=30, ignore_eos=True, seed=n)
    await until(service, lambda: len(service.log.states("r3")[0].tokens) > 3)
    assert len(service.cluster.pipelines) == 2
    report = await service.controller.preempt("i0", 0)
    assert (report.requests_kept, report.requests_recomputed) == (2, 2)
    await finish(service)
    service.check_complete()


async def test_requests_that_arrive_or_are_cancelled_during_a_switch_are_neither_lost_nor_revived() -> None:
    service = await started(2)
    controller = service.controller
    for n in range(4):
        service.submit(f"r{n}", max_tokens=30, ignore_eos=True, seed=n)
    await until(service, lambda: len(service.log.states("r3")[0].tokens) > 1)
    original = service.cluster.switch

    async def switch(transfers):  # type: ignore[no-untyped-def]
        outcome = await original(transfers)
        service.submit("late", max_tokens=5)
        assert controller.cancel("r1")
        assert service.log.states("r1")[0].finish is FinishReason.CANCELLED
        return outcome

    service.cluster.switch = switch  # type: ignore[method-assign]
    await controller.preempt("i1", 1000)
    service.cluster.switch = original  # type: ignore[method-assign]
    await finish(service)
    assert service.log.states("r1")[0].finish is FinishReason.CANCELLED
    service.check_complete(but=["r1"])


async def test_without_enough_instances_requests_wait_until_there_are() -> None:
    service = await started(2, memory=TIGHT)
    service.submit("before", max_tokens=20, ignore_eos=True)
    await until(service, lambda: len(service.log.states("before")[0].tokens) > 1)
    report = await service.controller.preempt("i0", 0)
    assert report.after is None
    kept = service.log.states("before")[0].tokens
    service.submit("during", max_tokens=3)
    status = service.controller.status()
    assert not status.ready and status.placement is None and status.queued == 2
    await turns(200)
    assert service.log.states("before")[0].tokens == kept
    report = await service.controller.add(1)
    assert report.before is None and report.after is not None and service.controller.status().ready
    await finish(service)
    service.check_complete()


async def test_a_loss_during_the_switch_leaves_the_old_mesh_running_again() -> None:
    losses = iter([False, False, False, True])

    def fault() -> None:
        if next(losses, False):  # start: prepare, switch; change: prepare, switch
            service.members.set_state("i1", InstanceState.GONE)
            raise InstanceLost("the newcomer is gone again")

    service = make_service(Random(1), instances(2), alive=1, fault=fault)
    await service.controller.start()
    service.submit("r", max_tokens=30, ignore_eos=True)
    await service.controller.add(1)
    await finish(service)
    service.check_complete()


async def test_an_instance_noticed_during_a_change_is_not_part_of_the_new_mesh() -> None:
    service = await started(3, alive=2)
    service.submit("r", max_tokens=30, ignore_eos=True)
    original = service.cluster.prepare
    noticed: list[asyncio.Task[Reconfiguration]] = []

    async def prepare(preparation):  # type: ignore[no-untyped-def]
        traffic = await original(preparation)
        if not noticed:
            noticed.append(asyncio.create_task(service.controller.preempt("i2", 1000)))
            await turns(1)
        return traffic

    service.cluster.prepare = prepare  # type: ignore[method-assign]
    await service.controller.add(1)
    await noticed[0]
    await finish(service)
    service.check_complete()
    assert service.members.require_alive("i1") and ready(service) == ["i0", "i1"]


async def test_an_instance_that_is_lost_and_back_during_a_change_is_filled_again() -> None:
    """Its devices are empty, whatever the mesh had there, and a replica without work did not even notice."""
    service = await started(3, alive=2)
    original = service.cluster.prepare
    meanwhile: list[asyncio.Task[Reconfiguration]] = []

    async def prepare(preparation):  # type: ignore[no-untyped-def]
        traffic = await original(preparation)
        if not meanwhile:
            meanwhile.append(asyncio.create_task(service.controller.preempt("i0", 0)))
            await turns(2)
            meanwhile.append(asyncio.create_task(service.controller.add(1)))
            await turns(2)
        return traffic

    service.cluster.prepare = prepare  # type: ignore[method-assign]
    await service.controller.preempt("i1", 0)
    await asyncio.gather(*meanwhile)
    assert ready(service) == ["i0"]
    service.submit("r", max_tokens=9)
    await finish(service)
    service.check_complete()


@pytest.mark.parametrize("noticed", [False, True])
async def test_nothing_is_read_from_an_instance_that_was_lost_and_is_back_while_decoding_stopped(noticed: bool) -> None:
    service = await started(3)
    for n in range(6):
        service.submit(f"r{n}", max_tokens=30, ignore_eos=True, seed=n)
    await until(service, lambda: len(service.log.states("r5")[0].tokens) > 3)
    assert len(service.cluster.pipelines) == 3
    dispatcher, meanwhile = service.controller._dispatcher, []
    original = dispatcher.stop

    async def stop(carried: object = ()) -> None:
        await original(carried)
        if not meanwhile:
            for change in (service.controller.preempt("i0", 0), service.controller.add(1)):
                meanwhile.append(asyncio.create_task(change))
                await turns(2)
            assert service.members.having(InstanceState.JOINING) == ("i0",)
            if noticed:  # and that again before it could join
                meanwhile.append(asyncio.create_task(service.controller.preempt("i0", 1000)))
                await turns(2)

    dispatcher.stop = stop  # type: ignore[method-assign]
    await service.controller.preempt("i0", 1000)
    await asyncio.gather(*meanwhile)
    await finish(service)
    service.check_complete()
    assert ready(service) == (["i1", "i2"] if noticed else ["i0", "i1", "i2"])


async def test_a_change_goes_on_when_its_caller_goes_away() -> None:
    service = await started(2)
    service.submit("r", max_tokens=30, ignore_eos=True)
    await until(service, lambda: len(service.log.states("r")[0].tokens) > 1)
    for waiting in range(12):
        asking = asyncio.create_task(
            service.controller.preempt("i1", 1000) if waiting % 2 == 0 else service.controller.add(1)
        )
        await turns(waiting)
        asking.cancel()
        await asyncio.gather(asking, *service.controller._attendance._changes, return_exceptions=True)
        if waiting and waiting % 2 == 0:
            assert service.members.alive() == service.members.all()[:1]
        elif waiting % 2:
            assert len(ready(service)) >= 1
    await finish(service)
    service.check_complete()


async def test_an_error_in_a_change_is_told_to_whoever_runs_the_service() -> None:
    service = await started(2)

    async def broken(preparation):  # type: ignore[no-untyped-def]
        raise ZeroDivisionError("a bug")

    service.cluster.prepare = broken  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        await service.controller.preempt("i1", 0)
    with pytest.raises(ZeroDivisionError):
        await asyncio.wait_for(service.controller.failure, PATIENCE)
    await service.controller.close()


async def test_an_error_in_a_step_is_told_to_whoever_runs_the_service() -> None:
    service = await started(1)

    async def broken(batch):  # type: ignore[no-untyped-def]
        raise ZeroDivisionError("a bug")

    service.cluster.pipelines[0].run = broken  # type: ignore[method-assign]
    service.submit("r")
    with pytest.raises(ZeroDivisionError):
        await asyncio.wait_for(service.controller.failure, PATIENCE)
    await service.controller.close()


@pytest.mark.parametrize("what", ["_requests.committed", "_cluster.forget"])
async def test_an_error_in_telling_what_is_recorded_is_told_to_whoever_runs_the_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    log = await asyncio.to_thread(DurableLog.open, tmp_path, "step", "pure")
    service = make_service(Random(0), instances(1), log=log)  # type: ignore[arg-type]
    await service.controller.start()

    def broken(*args: object) -> None:
        raise ZeroDivisionError("a bug")

    owner, name = what.split(".")
    monkeypatch.setattr(getattr(service.controller, owner), name, broken)
    service.submit("r", max_tokens=1)
    with pytest.raises(ZeroDivisionError):
        await asyncio.wait_for(service.controller.failure, PATIENCE)
    await service.controller.close()
    (recorded,) = (await asyncio.to_thread(inspect_log, tmp_path)).requests
    assert recorded.tokens == (1,), "what was to be told is not lost"


async def test_a_full_queue_refuses_and_says_when_to_try_again() -> None:
    service = await started(1, alive=0, queue=3)
    service.submit("a", n=2)
    with pytest.raises(Overloaded, match="2 sequences are waiting, at most 3 may") as refused:
        service.submit("b", n=2)
    assert refused.value.retry_after > 0
    service.submit("c")
    assert "b" not in service.log.recorded
    await service.controller.add(1)
    await finish(service)
    service.check_complete()


async def test_a_request_that_can_never_fit_is_refused_with_the_limit() -> None:
    service = await started(1)
    with pytest.raises(InvalidRequest, match=r"prompt \(30\) and max_tokens \(11\) together must be at most 40"):
        service.submit("r", prompt=range(30), max_tokens=11)
    service.submit("r", prompt=range(30), max_tokens=10)
    await finish(service)
    service.check_complete()


async def test_a_request_id_that_is_in_use_is_refused() -> None:
    service = await started(1)
    service.submit("r")
    with pytest.raises(InvalidRequest, match="'r' is taken"):
        service.controller.submit(service.requests["r"])
    await finish(service)
    service.check_complete()


async def test_draining_takes_nothing_new_and_waits_for_the_rest() -> None:
    service = await started(1, alive=0)
    service.submit("r", max_tokens=5)
    assert not await service.controller.drain(0)
    assert service.controller.status().draining and not service.controller.status().ready
    with pytest.raises(Draining):
        service.submit("late")
    await service.controller.add(1)
    await finish(service)
    service.check_complete()


async def test_operators_see_what_happens() -> None:
    service = await started(2, alive=1)
    await service.controller.add(1)
    await service.controller.preempt("i0", 1000)
    await service.controller.preempt("i1", 0)
    await finish(service)
    events = [event async for event in service.controller.watch()]
    assert [event.kind for event in events] == [
        *("plan", "precopy", "switch", "ready"),
        *("joined", "plan", "precopy", "switch"),
        *("notice", "plan", "precopy", "switch", "lost"),
        *("lost", "stop"),
        "draining",
    ]
    for event in events:
        if event.kind == "plan":
            loaded = sum(flow.bytes for flow in event.flows if not flow.source)
            assert loaded == event.fields["bytes_loaded"]
            assert sum(flow.bytes for flow in event.flows) - loaded == event.fields["bytes_moved"]
    first = next(event for event in events if event.kind == "plan")
    assert {(flow.source, flow.target) for flow in first.flows} == {("", "i0")}, "all of it from the checkpoint"
    status = service.controller.status()
    assert [instance.state for instance in status.instances] == [InstanceState.GONE] * 2
    assert status.placement is None and status.reconfigurations == 2


async def test_only_instances_that_are_there_can_go_and_only_spare_ones_come() -> None:
    service = await started(2, alive=1)
    with pytest.raises(UnknownInstance, match="'i1' is not part of the fleet; alive are: i0"):
        await service.controller.preempt("i1", 0)
    with pytest.raises(NoSpareDevices, match="2 instances were asked for, devices are left for 1"):
        await service.controller.add(2)
    assert not service.controller.failure.done()
    await finish(service)


def test_a_pure_cluster_is_a_cluster() -> None:
    from spotjax.fleet.cluster import Cluster

    cluster: Cluster = PureCluster(Random(0))
    assert cluster is not None
