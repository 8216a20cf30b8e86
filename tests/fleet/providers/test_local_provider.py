"""Machines as child processes, with stand-ins for the worker."""

import asyncio
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from pathlib import Path

import psutil
import pytest
from provider_contract import Case, ProviderContract
from stand_ins import STUBBORN, WORKER, command

from spotjax.config import ServeConfig
from spotjax.errors import ConfigError, OutOfCapacity, ProviderRefused
from spotjax.fleet.providers.local import LocalConfig, LocalOffer, LocalProvider, worker_settings
from spotjax.fleet.providers.provider import FleetIdentity, Machine, MachineState, Offer, Provider

SPOT = LocalOffer(type="small", zone="a", price=0.5, most=2)
DEMAND = LocalOffer(type="small", zone="a", price_class="on_demand", price=2.0)
CONFIG = LocalConfig(most=3, offers=(SPOT, DEMAND))
Make = Callable[..., LocalProvider]


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Make]:
    """Opens providers of stand-ins, and closes them."""
    opened: list[LocalProvider] = []

    def opening(config: LocalConfig = CONFIG, program: str = WORKER, grace: float = 30.0) -> LocalProvider:
        settings = ServeConfig(parameter_store="off", grace_seconds=grace)
        opened.append(
            LocalProvider(config, settings, "127.0.0.1:1", command=command(tmp_path, program), now=lambda: 77.0)
        )
        return opened[-1]

    yield opening
    for each in opened:
        await each.close()
        assert await each.list() == ()
    assert not psutil.Process().children()


class TestContract(ProviderContract):
    """See ``ProviderContract``. Capacity is in tests of its own."""

    @pytest.fixture
    def case(self, make: Make) -> Case:
        async def opened(_: FleetIdentity) -> Provider:
            return make()

        async def preempt(_: str) -> None:
            max(psutil.Process().children(), key=lambda child: -child.create_time()).kill()

        return Case(
            opened, preempt=preempt, existing=lambda: len(psutil.Process().children()), outlives=False, alone=True
        )


async def seen(provider: LocalProvider, name: str, *states: MachineState) -> Machine:
    """The machine when it is in one of these states."""
    async with asyncio.timeout(60), aclosing(provider.watch()) as watching:
        async for machine in watching:
            if machine.name == name and machine.state in states:
                return machine
    raise AssertionError("watch never ends")


async def written(path: Path) -> str:
    """What a stand-in has written, once it has."""
    async with asyncio.timeout(60):
        while not path.exists() or not path.read_text():
            await asyncio.sleep(0.01)
    return path.read_text()


async def test_a_machine_is_a_process_that_is_told_what_it_was_rented_as(make: Make, tmp_path: Path) -> None:
    provider = make()
    asked = await provider.request("m-1", Offer("small", "a", "on_demand", 99.0))
    assert asked == Machine("m-1", DEMAND.offer, MachineState.STARTING, created=77.0), "the price is today's"
    await seen(provider, "m-1", MachineState.RUNNING)
    assert await written(tmp_path / "m-1") == "--price-class=on_demand --zone=a"
    assert len(psutil.Process().children()) == 1


async def test_a_machine_takes_its_time_to_start_and_can_be_given_back_meanwhile(make: Make, tmp_path: Path) -> None:
    provider = make(LocalConfig(start_seconds=3600.0, offers=(SPOT,)))
    assert (await provider.request("m", SPOT.offer)).state is MachineState.STARTING
    await asyncio.sleep(0)
    await provider.release("m")
    await seen_gone(provider, "m")
    assert not psutil.Process().children()


async def seen_gone(provider: LocalProvider, name: str) -> None:
    """Waits until the machine is not listed any more."""
    async with asyncio.timeout(60):
        while any(machine.name == name for machine in await provider.list()):
            await asyncio.sleep(0.01)


async def test_there_are_no_more_than_there_may_be_of_one_offer_and_of_all(make: Make) -> None:
    provider = make()
    for name in ("a", "b"):
        await provider.request(name, SPOT.offer)
    with pytest.raises(OutOfCapacity, match="another small in zone a as spot: there may be 2 of these"):
        await provider.request("c", SPOT.offer)
    await provider.request("c", DEMAND.offer)
    with pytest.raises(OutOfCapacity, match="there may be 3 machines"):
        await provider.request("d", DEMAND.offer)
    with pytest.raises(ProviderRefused, match="no huge in zone a as spot; there is small in zone a as spot, small"):
        await provider.request("e", Offer("huge", "a", "spot", 1.0))


@pytest.mark.parametrize(
    ("program", "number", "state", "detail"),
    [
        (WORKER, signal.SIGKILL, MachineState.PREEMPTED, "SIGKILL"),
        (WORKER, signal.SIGTERM, MachineState.PREEMPTED, "SIGTERM"),
        ("import sys; sys.exit(0)", None, MachineState.PREEMPTED, "exit code 0"),
        ("import sys; sys.exit(3)", None, MachineState.FAILED, "exit code 3"),
    ],
)
async def test_what_is_left_of_a_machine_that_ended_keeps_its_name_until_it_is_released(
    make: Make, program: str, number: signal.Signals | None, state: MachineState, detail: str
) -> None:
    provider = make(program=program)
    await provider.request("m", SPOT.offer)
    if number is not None:
        await seen(provider, "m", MachineState.RUNNING)
        psutil.Process().children()[0].send_signal(number)
    ended = await seen(provider, "m", MachineState.PREEMPTED, MachineState.FAILED)
    assert (ended.state, ended.detail) == (state, detail)
    assert await provider.request("m", SPOT.offer) == ended, "no new one as long as there is that"
    await provider.release("m")
    assert await provider.list() == ()
    assert (await provider.request("m", SPOT.offer)).state is MachineState.STARTING


async def test_a_machine_is_taken_when_its_notice_is_over_or_at_once(make: Make, tmp_path: Path) -> None:
    provider = make(program=STUBBORN, grace=0.05)
    for name, notice in (("a", True), ("b", False)):
        await provider.request(name, SPOT.offer)
        await seen(provider, name, MachineState.RUNNING)
        await written(tmp_path / name)
        provider.take(name, notice)
        assert (await seen(provider, name, MachineState.PREEMPTED)).detail == "SIGKILL"
    provider.take("nobody", True)


async def test_notice_is_cut_short_when_the_machine_is_taken_after_all(make: Make, tmp_path: Path) -> None:
    provider = make(program=STUBBORN, grace=3600.0)
    await provider.request("m", SPOT.offer)
    await seen(provider, "m", MachineState.RUNNING)
    await written(tmp_path / "m")
    await provider.release("m")
    await seen(provider, "m", MachineState.STOPPING)
    provider.take("m", notice=False)
    await seen_gone(provider, "m")


async def test_a_process_that_cannot_be_started_is_a_machine_that_failed(make: Make, tmp_path: Path) -> None:
    settings = ServeConfig(parameter_store="off")
    provider = LocalProvider(CONFIG, settings, "127.0.0.1:1", command=lambda *_: [str(tmp_path / "nothing")])
    await provider.request("m", SPOT.offer)
    assert "No such file" in (await seen(provider, "m", MachineState.FAILED)).detail
    await provider.close()
    with pytest.raises(ProviderRefused, match="closed"):
        await provider.request("m", SPOT.offer)


def test_workers_get_settings_of_their_own_from_the_table_and_the_others_from_the_controller() -> None:
    controller = ServeConfig(listen="127.0.0.1:5", log_level="debug", tls_key="k")
    settings = worker_settings({"devices_per_instance": 1, "grace_seconds": 3.5}, controller)
    assert (settings.devices_per_instance, settings.grace_seconds) == (1, 3.5)
    assert (settings.log_level, settings.tls_key) == ("debug", "k")
    with pytest.raises(ConfigError, match=r"grace in worker of \[provider\]; there are .*grace_seconds"):
        worker_settings({"grace": 1}, controller)
    with pytest.raises(ConfigError, match=r"devices_per_instance in worker of \[provider\]: .*>= 1"):
        worker_settings({"devices_per_instance": 0}, controller)
    with pytest.raises(ConfigError, match="give each of them once"):
        LocalProvider(LocalConfig(offers=(SPOT, SPOT)), controller, "127.0.0.1:1")
