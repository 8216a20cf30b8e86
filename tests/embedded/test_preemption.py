"""Whatever instance is taken at whatever moment: every request ends with the tokens of an undisturbed run."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import pytest
from embedded_cases import INSTANCES, Output, Run, gone, nothing_left_on, restore, same, start_server, unless_refused
from hypothesis import given, settings
from hypothesis import strategies as st

from spotjax.embedded import EmbeddedServer

MESHES = ("2x2x2", "2x2x1", "auto")  # auto: tight memory, a mesh needs three of the four instances
_tags = itertools.count()


@dataclass(frozen=True)
class Event:
    """Something that happens to the fleet.

    Attributes:
      moment: when clients have seen that many tokens; 0 is while prompts are computed.
      kind: ``kill`` takes at once, ``notice`` after some seconds, ``add`` brings one back.
      instance: which one.
      grace: seconds of a notice.
    """

    moment: int
    kind: str
    instance: str = ""
    grace: float = 0.0

    async def happen(self, server: EmbeddedServer) -> None:
        if self.kind == "add":
            await unless_refused(server.service.add(1))
        else:
            await unless_refused(server.service.preempt(self.instance, self.grace))


@dataclass(frozen=True)
class Served:
    """A server, what it says undisturbed, and the arrays that were there before it."""

    server: EmbeddedServer
    expected: dict[str, Output]
    before: list[jax.Array]


@pytest.fixture(scope="module", params=MESHES)
def served(request: pytest.FixtureRequest, programs: Path, runner: asyncio.Runner) -> Iterator[Served]:
    before = jax.live_arrays()
    memory = 0 if request.param == "auto" else 1 << 30
    settings = {"mesh": request.param, "instance_memory_bytes": memory, "prefix_cache": request.param != "2x2x1"}
    server = runner.run(start_server(programs, **settings))
    yield Served(server, runner.run(undisturbed(server)), before)
    runner.run(server.close())


async def undisturbed(server: EmbeddedServer) -> dict[str, Output]:
    run = Run(server, f"run-{next(_tags)}")
    run.start()
    return await run.outputs()


async def disturbed(served: Served, events: list[Event]) -> None:
    """Runs all requests through the events and checks everything that was promised."""
    server = served.server
    await restore(server)
    compiled = server.cluster.model.executables.compiled
    run = Run(server, f"run-{next(_tags)}")
    run.start()
    changes: list[asyncio.Task[None]] = []
    for event in sorted(events, key=lambda event: event.moment):
        await run.reached(event.moment, lambda: all(c.done() for c in changes) and not server.service.status().ready)
        if not event.moment:
            await asyncio.sleep(0.002)  # into the first steps
        changes.append(asyncio.create_task(event.happen(server)))
        changes[-1].add_done_callback(lambda _: run.changed.set())
        await asyncio.sleep(0)
    await asyncio.gather(*changes)
    if not server.service.status().ready:
        await restore(server)
    same(await run.outputs(), served.expected)
    server.service.check()
    assert all(replica.pages_used == 0 for replica in server.service.status().replicas)
    assert server.service.status().requests_running == 0
    assert server.cluster.model.executables.compiled == compiled, "something was compiled"
    lost = {device for name in gone(server) for device in server.cluster._devices[name]}
    assert nothing_left_on(lost, served.before), "something is left on lost devices"
    assert not server.service.failure.done()


graces = st.sampled_from([0.001, 0.05, 5.0])
events = st.one_of(
    st.builds(Event, st.integers(0, 120), st.just("kill"), st.sampled_from(INSTANCES)),
    st.builds(Event, st.integers(0, 120), st.just("notice"), st.sampled_from(INSTANCES), graces),
    st.builds(Event, st.integers(0, 120), st.just("add")),
)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(happening=st.lists(events, min_size=1, max_size=4))
def test_any_changes_at_any_moments_change_no_token(
    served: Served, runner: asyncio.Runner, happening: list[Event]
) -> None:
    runner.run(disturbed(served, happening))


@pytest.mark.parametrize("instance", INSTANCES)
@pytest.mark.parametrize("grace", [0.0, 5.0])
def test_each_instance_can_be_taken(served: Served, runner: asyncio.Runner, instance: str, grace: float) -> None:
    runner.run(disturbed(served, [Event(30, "notice", instance, grace)]))


@pytest.mark.parametrize("grace", [0.0, 5.0])
def test_an_instance_can_be_taken_while_prompts_are_computed(
    served: Served, runner: asyncio.Runner, grace: float
) -> None:
    runner.run(disturbed(served, [Event(0, "notice", "instance-0", grace)]))


@pytest.mark.parametrize("grace", [0.0, 5.0])
def test_two_instances_can_be_taken_at_once(served: Served, runner: asyncio.Runner, grace: float) -> None:
    happening = [Event(25, "notice", "instance-1", grace), Event(25, "notice", "instance-2", grace)]
    runner.run(disturbed(served, happening))


def test_prompts_that_begin_alike_share_kv_before_and_after_a_loss(served: Served, runner: asyncio.Runner) -> None:
    async def reused() -> int:
        same(await undisturbed(served.server), served.expected)
        return sum(replica.tokens_reused for replica in served.server.service.status().replicas)

    runner.run(restore(served.server))
    wanted = served.server.service._limits.prefix_cache
    assert (runner.run(reused()) > 0) is wanted
    runner.run(disturbed(served, [Event(20, "kill", "instance-0")]))
    assert (runner.run(reused()) > 0) is wanted


def test_an_instance_can_be_lost_during_every_other_change(served: Served, runner: asyncio.Runner) -> None:
    for grace in (0.0, 5.0):
        runner.run(disturbed(served, [Event(20, "notice", "instance-1", grace), Event(20, "kill", "instance-0")]))
        runner.run(
            disturbed(served, [Event(5, "kill", "instance-3"), Event(30, "add"), Event(30, "kill", "instance-2")])
        )


def test_a_lost_instance_can_come_back_at_once(served: Served, runner: asyncio.Runner) -> None:
    runner.run(disturbed(served, [Event(20, "kill", "instance-0"), Event(20, "add")]))
    runner.run(disturbed(served, [Event(20, "kill", "instance-0"), Event(20, "kill", "instance-1"), Event(20, "add")]))


def test_requests_wait_while_all_instances_are_lost(served: Served, runner: asyncio.Runner) -> None:
    runner.run(disturbed(served, [Event(40, "kill", name) for name in INSTANCES]))
