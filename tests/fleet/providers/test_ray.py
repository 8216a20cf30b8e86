"""Machines of a Ray cluster of several nodes on this machine, with stand-ins for the worker."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from provider_contract import DEAD, FLEET, Case, ProviderContract, by_name
from ray_cases import RayNodes, is_on, process_of, ray_nodes
from stand_ins import STUBBORN, WORKER, command

from spotjax.config import ServeConfig
from spotjax.errors import ConfigError, ProviderUnavailable
from spotjax.fleet.providers.provider import FleetIdentity, Machine, MachineState, Provider
from spotjax.fleet.providers.ray import RayConfig, RayOffer, RayProvider
from spotjax.fleet.providers.ray_records import Found, Wish

SPOT = RayOffer(type="small", price=0.5)
DEMAND = RayOffer(type="small", price_class="on_demand", price=2.0)
BIG = RayOffer(type="big", price=9.0, gpus=8)
FILLING = FleetIdentity("filling", "127.0.0.1:3", ServeConfig(parameter_store="off"))
MORTAL = (
    "import ctypes, os; ctypes.CDLL(None).prctl(1, 9);"
    "os.getppid() == int(os.environ['SPOTJAX_PARENT']) or os._exit(1);" + WORKER
)
"""Dies with its parent, as workers do, also when that died before."""
NOTED = (
    "import pathlib, sys, time; wait = [a[14:] for a in sys.argv if a.startswith('--notice-file=')][0];"
    "exec('while not pathlib.Path(wait).exists(): time.sleep(0.05)');"
    "pathlib.Path({file!r}).write_text(pathlib.Path(wait).read_text())"
)
"""Says what notice it got, and leaves."""
FAILS = "{file!r}; raise SystemExit(3)"
Open = Callable[..., RayProvider]
FORKS = "ignore:os.fork\\(\\) was called:RuntimeWarning"
"""Of jax, which other tests of the process may have loaded: Ray forks to start a node, and the child does no more."""
pytestmark = [pytest.mark.timeout(300), pytest.mark.filterwarnings(FORKS)]


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayNodes]:
    """A head, and two nodes with room for three machines."""
    with ray_nodes() as cluster:
        cluster.add(2)
        cluster.add(1)
        yield cluster


@pytest.fixture
async def opened(nodes: RayNodes, tmp_path: Path) -> AsyncIterator[Open]:
    """Opens providers; gives back what they rented, which leaves no process."""
    providers: list[RayProvider] = []

    def opening(
        fleet: FleetIdentity = FLEET,
        program: str = MORTAL,
        offers: Sequence[RayOffer] = (SPOT, DEMAND, BIG),
        grace: float = 30.0,
    ) -> RayProvider:
        config = RayConfig(address=nodes.address, offers=tuple(offers), poll_seconds=0.1)
        settings = ServeConfig(parameter_store="off", grace_seconds=grace)
        providers.append(RayProvider(config, fleet, settings, command=command(tmp_path, program), now=lambda: 77.0))
        return providers[-1]

    yield opening
    last = {provider._fleet.name: provider for provider in providers}.values()
    for provider in last:
        for machine in await provider.list():
            await provider.release(machine.name)
    for provider in last:
        await until(provider, lambda machines: not machines)
    for provider in providers:
        await provider.close()
    assert process_of(str(tmp_path)) is None


async def until(provider: Provider, what: Callable[[Any], bool]) -> Any:
    """Waits until the machines, by name, are as told."""

    async def refused(_: FleetIdentity) -> Provider:
        raise NotImplementedError

    return await Case(refused).until(provider, what)


async def child(directory: Path, name: str) -> psutil.Process:
    """The process of a machine's stand-in, once it is there."""
    async with asyncio.timeout(60):
        while (found := process_of(str(directory / name))) is None:
            await asyncio.sleep(0.02)
    return found


@pytest.mark.slow
class TestContract(ProviderContract):
    """See ``ProviderContract``."""

    @pytest.fixture
    def case(self, opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
        last: list[RayProvider] = []

        async def open_(fleet: FleetIdentity) -> Provider:
            last.append(opened(fleet))
            return last[-1]

        async def preempt(name: str) -> None:
            (await child(tmp_path, name)).parent().kill()  # type: ignore[union-attr]

        filling: list[RayProvider] = []

        async def exhaust() -> None:
            filling.append(opened(FILLING))
            for name in ("f-0", "f-1"):
                await filling[0].request(name, SPOT.offer)
            await until(filling[0], lambda m: all(each.state is MachineState.RUNNING for each in m.values()))

        async def refresh() -> None:
            for name in ("f-0", "f-1"):
                await filling[0].release(name)

        async def lose_answer() -> None:
            link = last[-1]._link
            ask = link._ask

            async def lost(*arguments: Any) -> Sequence[Found]:
                await ask(*arguments)
                raise ProviderUnavailable("the answer was lost")

            monkeypatch.setattr(link, "_ask", lost)

        return Case(open_, preempt=preempt, exhaust=exhaust, refresh=refresh, waits=True, lose_answer=lose_answer)


async def test_a_worker_that_fails_is_a_machine_that_failed(opened: Open) -> None:
    provider = opened(program=FAILS)
    await provider.request("m-0", SPOT.offer)
    machines = await until(provider, lambda m: m["m-0"].state in DEAD)
    assert machines["m-0"] == Machine("m-0", SPOT.offer, MachineState.FAILED, "worker ended: exit code 3", 77.0)


async def test_a_worker_that_does_not_end_is_killed_when_its_time_is_over(
    opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spotjax.fleet.providers.ray.STOP_SECONDS", 1.0)
    provider = opened(program=STUBBORN, grace=0.5)
    await provider.request("m-0", SPOT.offer)
    process = await child(tmp_path, "m-0")
    await until(provider, lambda _: (tmp_path / "m-0").exists())
    await provider.release("m-0")
    await until(provider, lambda m: not m)
    assert not process.is_running()


async def test_what_no_node_has_is_waited_for_and_said(opened: Open) -> None:
    provider = opened()
    assert (await provider.request("m-0", BIG.offer)).state is MachineState.WAITING
    assert "no node of the cluster has what it needs" in (await by_name(provider))["m-0"].detail
    assert (await provider.request("m-1", DEMAND.offer)).state is MachineState.WAITING
    assert "no node" in (await by_name(provider))["m-1"].detail, "no node has the label of on-demand ones"


async def test_a_wish_whose_actor_was_never_made_has_failed_and_asking_again_makes_it(opened: Open) -> None:
    """The controller died between the two."""
    provider = opened()
    await put(provider, provider._wish("m-0", SPOT))
    machines = await by_name(provider)
    assert machines["m-0"].state is MachineState.FAILED and "never made" in machines["m-0"].detail
    await provider.request("m-0", SPOT.offer)
    await until(provider, lambda m: m["m-0"].state is MachineState.RUNNING)


async def put(provider: RayProvider, wish: Wish) -> None:
    """Writes a wish and does nothing else."""
    import msgspec
    from ray._raylet import GcsClient

    from spotjax.fleet.providers.ray_records import STORE, key_of

    key = key_of(FLEET.name, wish.name).encode()
    store = GcsClient(address=provider._config.address)
    await asyncio.to_thread(store.internal_kv_put, key, msgspec.json.encode(wish), False, STORE)


async def test_a_node_that_is_drained_gives_its_worker_the_deadline_and_one_that_dies_was_taken(
    opened: Open, nodes: RayNodes, tmp_path: Path
) -> None:
    node = nodes.add(1, {"ray.io/market-type": "spot", "ray.io/availability-zone": "b"})
    there = RayOffer(type="small", zone="b", price=0.5)
    provider = opened(program=NOTED, offers=(there,))
    await provider.request("m-0", there.offer)
    process = await child(tmp_path, "m-0")
    assert is_on(process, node), "the zone is a label of the node"
    await until(provider, lambda m: m["m-0"].state is MachineState.RUNNING)
    nodes.drain(node, 50.0)
    machines = await until(provider, lambda m: m["m-0"].state is not MachineState.RUNNING)
    assert machines["m-0"].state in (MachineState.STOPPING, MachineState.PREEMPTED)
    await until(provider, lambda m: m["m-0"].state is MachineState.PREEMPTED)
    kind, seconds = (tmp_path / "m-0").read_text().split()
    assert kind == "preempt" and 30 < float(seconds) < 50
    nodes.kill(node)


async def test_a_node_that_dies_takes_its_machine_and_no_process_is_left(
    opened: Open, nodes: RayNodes, tmp_path: Path
) -> None:
    node = nodes.add(1, {"ray.io/market-type": "spot", "ray.io/availability-zone": "c"})
    there = RayOffer(type="small", zone="c", price=0.5)
    provider = opened(offers=(there,))
    await provider.request("m-0", there.offer)
    process = await child(tmp_path, "m-0")
    assert is_on(process, node)
    nodes.kill(node)
    machines = await until(provider, lambda m: m["m-0"].state in DEAD)
    assert machines["m-0"].state is MachineState.PREEMPTED and "NODE_DIED" in machines["m-0"].detail
    async with asyncio.timeout(60):
        while process.is_running():
            await asyncio.sleep(0.05)


async def test_a_connection_that_dies_is_made_again(opened: Open) -> None:
    provider = opened()
    await provider.list()
    process = provider._link._process
    assert process is not None
    process.send_signal(signal.SIGKILL)
    with pytest.raises(ProviderUnavailable, match="SIGKILL"):
        await provider.list()
    assert await provider.list() == ()


async def test_a_cluster_that_is_not_there_is_unavailable() -> None:
    config = RayConfig(address="127.0.0.1:1", offers=(SPOT,), timeout_seconds=3.0)
    provider = await config.open(FLEET)
    with pytest.raises(ProviderUnavailable, match=r"127\.0\.0\.1:1"):
        await provider.list()
    await provider.close()


async def test_what_cannot_be_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="ray start --num-cpus=0"):
        await RayConfig(address="ray://head:10001", offers=(SPOT,)).open(FLEET)
    with pytest.raises(ConfigError, match="give each of them once"):
        await RayConfig(offers=(SPOT, SPOT)).open(FLEET)
    with pytest.raises(ConfigError, match="notice_file"):
        await RayConfig(offers=(SPOT,), worker={"notice_file": "/x"}).open(FLEET)
