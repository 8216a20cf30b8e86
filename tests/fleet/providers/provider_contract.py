"""What every provider promises, as tests: a class to inherit from, with a fixture that says what is under test.

    class TestScripted(ProviderContract):
        @pytest.fixture
        async def case(self) -> AsyncIterator[Case]:
            yield Case(open=...)

A test of something that the provider cannot have is skipped, and says what it is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from spotjax.config import ServeConfig
from spotjax.errors import OutOfCapacity, ProviderError, ProviderRefused
from spotjax.fleet.providers.machines import GONE
from spotjax.fleet.providers.provider import FleetIdentity, Machine, MachineState, Offer, Provider

SECONDS = 60.0
"""For what happens at once, on a busy machine."""
FLEET = FleetIdentity("contract", "127.0.0.1:1", ServeConfig(parameter_store="off"))
OTHERS = FleetIdentity("others", "127.0.0.1:2", ServeConfig(parameter_store="off"))
ALIVE = (MachineState.WAITING, MachineState.STARTING, MachineState.RUNNING)
DEAD = (MachineState.PREEMPTED, MachineState.FAILED)

Act = Callable[[], Awaitable[None]]


async def _a_moment() -> None:
    await asyncio.sleep(0.01)


@dataclass
class Case:
    """A provider under test, and what a test can do to the cloud behind it. What is None it cannot have.

    Attributes:
      open: opens the provider; again for the same fleet, it is as after a restart of the controller.
      pass_time: lets the cloud go on, called again and again by whoever waits for something.
      preempt: takes the machine of that name, which runs.
      exhaust: from now on no more machines are to be had.
      refresh: from now on they are again.
      waits: beyond capacity, requests wait; otherwise they raise OutOfCapacity.
      fails: the next call fails in a way that is to be raised as the error; by a word for the way.
      lose_answer: the next request is carried out, and its answer does not arrive.
      existing: how many machines the cloud has, whoever they belong to, with the remains of dead ones.
      outlives: machines stay when the provider is closed.
      alone: no other fleet can have machines in the same place.
    """

    open: Callable[[FleetIdentity], Awaitable[Provider]]
    pass_time: Act = _a_moment
    preempt: Callable[[str], Awaitable[None]] | None = None
    exhaust: Act | None = None
    refresh: Act | None = None
    waits: bool = False
    fails: Mapping[str, tuple[type[ProviderError], Act]] = field(default_factory=dict)
    lose_answer: Act | None = None
    existing: Callable[[], int] | None = None
    outlives: bool = True
    alone: bool = False

    async def until(self, provider: Provider, what: Callable[[Mapping[str, Machine]], bool]) -> Mapping[str, Machine]:
        """Waits until the machines, by name, are as told."""
        async with asyncio.timeout(SECONDS):
            while True:
                machines = await by_name(provider)
                if what(machines):
                    return machines
                await self.pass_time()

    async def running(self, provider: Provider, *names: str) -> Mapping[str, Machine]:
        """Asks for machines and waits until they run."""
        offer = await first(provider)
        for name in names:
            await provider.request(name, offer)
        return await self.until(provider, lambda m: all(m[n].state is MachineState.RUNNING for n in names))


async def by_name(provider: Provider) -> Mapping[str, Machine]:
    """All machines; no name twice."""
    machines = await provider.list()
    named = {machine.name: machine for machine in machines}
    assert len(named) == len(machines)
    return named


async def first(provider: Provider) -> Offer:
    """The best offer."""
    return (await provider.offers())[0]


def needed(what: Any, why: str) -> Any:
    """What a test needs; without it the test is skipped."""
    if not what:
        pytest.skip(f"not of this provider: {why}")
    return what


class Watching:
    """A watch of a provider while a test goes on.

    Attributes:
      told: what it was told so far.
    """

    def __init__(self, provider: Provider) -> None:
        self.told: list[Machine] = []
        self._task = asyncio.create_task(self._watch(provider))

    async def _watch(self, provider: Provider) -> None:
        async for machine in provider.watch():
            self.told.append(machine)

    def states(self, name: str) -> list[MachineState]:
        """What a machine went through."""
        return [machine.state for machine in self.told if machine.name == name]

    def gone(self, name: str) -> int:
        """How often it was told that a machine is gone for good."""
        return sum(machine.name == name and machine.detail == GONE for machine in self.told)

    async def until(self, case: Case, what: Callable[[], bool]) -> None:
        """Waits for what it is to be told."""
        async with asyncio.timeout(SECONDS):
            while not what():
                if self._task.done():
                    self._task.result()
                    raise AssertionError("a watch never ends by itself")
                await case.pass_time()

    async def stop(self) -> None:
        """Stops watching, which leaves nothing behind."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


class ProviderContract:
    """The tests. They need a fixture ``case``."""

    async def test_offers_can_be_rented_and_say_what_they_cost(self, case: Case) -> None:
        provider = await case.open(FLEET)
        offers = await provider.offers()
        assert offers and len({offer.key for offer in offers}) == len(offers)
        assert all(offer.price >= 0 and offer.price_class in ("spot", "on_demand") for offer in offers)
        assert provider.name and await provider.list() == ()
        await provider.close()

    async def test_a_machine_that_is_asked_for_is_listed_at_once_and_runs_in_time(self, case: Case) -> None:
        provider = await case.open(FLEET)
        offer = await first(provider)
        asked = await provider.request("m-0", offer)
        assert (asked.name, asked.offer.key) == ("m-0", offer.key) and asked.state in ALIVE
        (listed,) = await provider.list()
        assert (listed.name, listed.offer.key) == ("m-0", offer.key) and listed.state in ALIVE
        machines = await case.until(provider, lambda m: m["m-0"].state is MachineState.RUNNING)
        assert machines["m-0"].offer.key == offer.key
        await provider.close()

    async def test_asking_twice_rents_one(self, case: Case) -> None:
        provider = await case.open(FLEET)
        offers = await provider.offers()
        asked = await asyncio.gather(*(provider.request("m-0", offers[0]) for _ in range(3)), return_exceptions=True)
        assert any(isinstance(one, Machine) for one in asked), asked
        again = await provider.request("m-0", offers[-1])
        assert again.offer.key == offers[0].key, "there is one of that name, whatever is asked for now"
        await case.running(provider, "m-0")
        assert (await provider.request("m-0", offers[0])).state is MachineState.RUNNING
        assert len(await provider.list()) == 1
        if case.existing is not None:
            assert case.existing() == 1
        await provider.close()

    async def test_what_is_given_back_goes_and_its_name_can_be_used_again(self, case: Case) -> None:
        provider = await case.open(FLEET)
        await case.running(provider, "m-0", "m-1")
        for _ in range(2):
            await provider.release("m-0")
        await case.until(provider, lambda m: set(m) == {"m-1"})
        assert (await by_name(provider))["m-1"].state is MachineState.RUNNING
        await case.running(provider, "m-0")
        await provider.close()

    async def test_giving_back_what_does_not_exist_is_no_error(self, case: Case) -> None:
        provider = await case.open(FLEET)
        await provider.release("nobody")
        await provider.close()

    async def test_an_offer_that_there_is_not_is_refused(self, case: Case) -> None:
        provider = await case.open(FLEET)
        with pytest.raises(ProviderRefused, match="no-such-type"):
            await provider.request("m-0", Offer("no-such-type", "no-such-zone", "spot", 1.0))
        assert await provider.list() == ()
        await provider.close()

    async def test_one_that_was_taken_is_listed_until_it_is_released_and_then_comes_back(self, case: Case) -> None:
        preempt = needed(case.preempt, "machines that are taken")
        provider = await case.open(FLEET)
        await case.running(provider, "m-0", "m-1")
        await preempt("m-0")
        dead = await case.until(provider, lambda m: m["m-0"].state in DEAD)
        assert dead["m-1"].state is MachineState.RUNNING
        assert (await provider.request("m-0", await first(provider))).state in DEAD
        await provider.release("m-0")
        await case.until(provider, lambda m: "m-0" not in m)
        await case.running(provider, "m-0")
        await provider.close()

    async def test_beyond_capacity_a_request_waits_or_fails_as_that_and_can_be_taken_back(self, case: Case) -> None:
        exhaust, refresh = needed(case.exhaust, "an end of capacity"), case.refresh
        provider = await case.open(FLEET)
        await case.running(provider, "m-0")
        await exhaust()
        offer = await first(provider)
        if not case.waits:
            with pytest.raises(OutOfCapacity):
                await provider.request("m-1", offer)
            assert set(await by_name(provider)) == {"m-0"}
        else:
            await provider.request("m-1", offer)
            await provider.request("m-2", offer)
            await case.until(provider, lambda m: [m[n].state for n in ("m-1", "m-2")] == [MachineState.WAITING] * 2)
            await provider.release("m-1")
            await case.until(provider, lambda m: "m-1" not in m)
        if refresh is not None:
            await refresh()
            await case.running(provider, "m-2")
        await provider.close()

    async def test_errors_are_told_apart_and_leave_nothing(self, case: Case) -> None:
        needed(case.fails, "calls that fail")
        for way, (error, prepare) in case.fails.items():
            provider = await case.open(FLEET)
            await prepare()
            with pytest.raises(ProviderError) as raised:
                await provider.request("m-0", await first(provider))
            assert type(raised.value) is error, f"{way}: {raised.value!r}"
            await case.until(provider, lambda m: "m-0" not in m or m["m-0"].state is MachineState.FAILED)
            await provider.release("m-0")
            await case.until(provider, lambda m: not m)
            await provider.close()

    async def test_a_request_whose_answer_is_lost_is_found_and_not_made_twice(self, case: Case) -> None:
        lose_answer = needed(case.lose_answer, "an answer that could be lost")
        provider = await case.open(FLEET)
        await lose_answer()
        with pytest.raises(ProviderError):
            await provider.request("m-0", await first(provider))
        await provider.close()
        provider = await case.open(FLEET)  # the controller ended there, and is started again
        await case.running(provider, "m-0")
        assert set(await by_name(provider)) == {"m-0"}
        if case.existing is not None:
            assert case.existing() == 1
        await provider.close()

    async def test_closing_leaves_machines_and_the_next_one_finds_them(self, case: Case) -> None:
        provider = await case.open(FLEET)
        before = await case.running(provider, "m-0", "m-1")
        await provider.close()
        provider = await case.open(FLEET)
        found = await by_name(provider)
        assert {(n, m.offer.key, m.state) for n, m in found.items()} == (
            {(n, m.offer.key, m.state) for n, m in before.items()} if case.outlives else set()
        )
        await provider.release("m-0")
        await case.until(provider, lambda m: "m-0" not in m)
        await provider.close()

    async def test_a_fleet_sees_and_gives_back_its_own_machines_only(self, case: Case) -> None:
        needed(not case.alone, "other fleets in the same place")
        ours, theirs = await case.open(FLEET), await case.open(OTHERS)
        await case.running(ours, "m-0")
        assert await theirs.list() == ()
        await case.running(theirs, "m-0", "m-1")
        await theirs.release("m-0")
        await case.until(theirs, lambda m: set(m) == {"m-1"})
        assert (await by_name(ours))["m-0"].state is MachineState.RUNNING and len(await ours.list()) == 1
        await ours.close()
        await theirs.close()

    async def test_a_watcher_is_told_what_there_is_and_then_what_changes(self, case: Case) -> None:
        provider = await case.open(FLEET)
        await case.running(provider, "m-0")
        watching = Watching(provider)
        await watching.until(case, lambda: len(watching.told) > 0)
        assert watching.told[0].name == "m-0" and watching.states("m-0") == [MachineState.RUNNING]
        await case.running(provider, "m-1")
        await watching.until(case, lambda: watching.states("m-1")[-1:] == [MachineState.RUNNING])
        await provider.release("m-0")
        await watching.until(case, lambda: watching.gone("m-0") == 1)
        assert watching.states("m-0")[-1] is MachineState.STOPPING and watching.gone("m-1") == 0
        assert set(await by_name(provider)) == {"m-1"}
        await watching.stop()
        await provider.close()

    async def test_two_watchers_are_told_of_a_machine_that_is_taken(self, case: Case) -> None:
        preempt = needed(case.preempt, "machines that are taken")
        provider = await case.open(FLEET)
        await case.running(provider, "m-0")
        watching = [Watching(provider) for _ in range(2)]
        for each in watching:
            await each.until(case, lambda each=each: each.told)  # type: ignore[misc]
        await preempt("m-0")
        for each in watching:
            await each.until(case, lambda each=each: each.states("m-0")[-1] in DEAD)  # type: ignore[misc]
            await each.stop()
        await provider.close()
