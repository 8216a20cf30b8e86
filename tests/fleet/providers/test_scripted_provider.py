"""The cloud in memory: it keeps the contract of all providers, and does what scripts say when they say it."""

import asyncio
from collections.abc import Callable

import pytest
from provider_contract import Case, ProviderContract, Watching

from spotjax.errors import OutOfCapacity, ProviderRefused, ProviderUnavailable, QuotaExceeded
from spotjax.fleet.providers.provider import FleetIdentity, MachineState, Offer, Provider
from spotjax.testing.scripted_provider import ScriptedCloud

SPOT = Offer("small", "a", "spot", 1.0)
DEMAND = Offer("small", "a", "on_demand", 3.0)
DUE = 5.0


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


class TestContract(ProviderContract):
    """See ``ProviderContract``."""

    @pytest.fixture(params=[False, True], ids=["fails", "waits"])
    def case(self, request: pytest.FixtureRequest, clock: Clock) -> Case:
        cloud = ScriptedCloud([SPOT, DEMAND], clock, start_seconds=2, stop_seconds=1, waits=request.param)

        async def opened(fleet: FleetIdentity) -> Provider:
            return cloud.provider(fleet.name)

        async def pass_time() -> None:
            clock.now += 0.5
            cloud.advance()
            await asyncio.sleep(0)

        def told(act: Callable[[], None]) -> Callable[[], "asyncio.Future[None]"]:
            async def telling() -> None:
                act()

            return lambda: asyncio.ensure_future(telling())

        async def preempt(name: str) -> None:
            cloud.preempt(name, "contract")

        def existing() -> int:
            return sum(len(cloud.machines(fleet)) for fleet in ("contract", "others"))

        errors = (OutOfCapacity("none"), QuotaExceeded("0"), ProviderRefused("no"), ProviderUnavailable("later"))
        return Case(
            opened, pass_time, preempt, told(lambda: cloud.set_capacity(SPOT, 1)),
            told(lambda: cloud.set_capacity(SPOT, 9)), request.param,
            {str(error): (type(error), told(lambda e=error: cloud.fail("request", e))) for error in errors},  # type: ignore[misc]
            told(lambda: cloud.lose_answer("request")), existing,
        )  # fmt: skip


async def test_what_is_scripted_happens_at_its_time_and_watchers_are_told(clock: Clock) -> None:
    loop = asyncio.get_running_loop()
    cloud = ScriptedCloud([SPOT], loop.time, start_seconds=0.02)
    provider = cloud.provider()
    watching = Watching(provider)
    await provider.request("a", SPOT)
    cloud.at(loop.time() + 0.04, lambda: cloud.preempt("a"))
    case = Case(open=lambda _: asyncio.sleep(0))  # type: ignore[arg-type,return-value]
    await watching.until(case, lambda: watching.states("a")[-1:] == [MachineState.PREEMPTED])
    assert watching.states("a")[-3:] == [MachineState.STARTING, MachineState.RUNNING, MachineState.PREEMPTED]
    await watching.stop()


async def test_those_that_wait_are_served_in_order_as_capacity_comes(clock: Clock) -> None:
    cloud = ScriptedCloud([SPOT], clock, waits=True)
    cloud.set_capacity(SPOT, 1)
    provider = cloud.provider()
    for name in ("a", "b", "c"):
        await provider.request(name, SPOT)
    cloud.at(105.0, lambda: cloud.preempt("a"))
    cloud.at(107.0, lambda: cloud.set_capacity(SPOT, 2))
    seen = []
    for now in (104.0, 105.0, 107.0):
        clock.now = now
        seen.append([machine.state.value for machine in await provider.list()])
    assert seen == [
        ["running", "waiting", "waiting"],
        ["preempted", "running", "waiting"],
        ["preempted", "running", "running"],
    ]


async def test_it_costs_what_it_costs_at_each_time_from_the_grant_to_the_end(clock: Clock) -> None:
    cloud = ScriptedCloud([SPOT, DEMAND], clock, start_seconds=600, stop_seconds=600)
    provider = cloud.provider()
    await provider.request("a", SPOT)
    await provider.request("b", DEMAND)
    cloud.at(100 + 1800, lambda: cloud.set_price(SPOT, 2.0))
    cloud.at(100 + 3600, lambda: cloud.preempt("a"))
    clock.now = 100 + 7200
    await provider.release("b")
    assert cloud.spent == pytest.approx(0.5 * 1 + 0.5 * 2 + 2 * 3)
    clock.now = 100 + 10_000
    assert [machine.name for machine in cloud.machines()] == ["a"]
    assert cloud.spent == pytest.approx(7.5 + 3 / 6)
    assert [(each.call, each.name, each.seconds) for each in cloud.asked] == [
        ("request", "a", 100.0), ("request", "b", 100.0), ("release", "b", 7300.0),
    ]  # fmt: skip
    assert [offer.price for offer in await provider.offers()] == [2.0, 3.0]


async def test_a_quota_is_for_all_and_broken_machines_say_why(clock: Clock) -> None:
    cloud = ScriptedCloud([SPOT], clock, quota=1)
    await cloud.provider("one").request("a", SPOT)
    with pytest.raises(QuotaExceeded, match="a quota of 1"):
        await cloud.provider("two").request("a", SPOT)
    cloud.break_down("a", OutOfCapacity, fleet="one")
    (broken,) = await cloud.provider("one").list()
    assert (broken.state, broken.failure) == (MachineState.FAILED, OutOfCapacity)
    assert (await cloud.provider("two").request("a", SPOT)).state is MachineState.RUNNING
