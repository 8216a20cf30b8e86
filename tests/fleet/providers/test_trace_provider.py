"""Recorded spot markets, replayed: in virtual time against the record itself, and with real processes."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
import pytest
import virtual_time
from hypothesis import given
from hypothesis import strategies as st
from provider_contract import Case, ProviderContract
from stand_ins import WORKER, command

from spotjax.config import ServeConfig
from spotjax.errors import ConfigError, OutOfCapacity, ProviderRefused
from spotjax.fleet.providers.local import LocalConfig, LocalProvider
from spotjax.fleet.providers.machines import Machines
from spotjax.fleet.providers.provider import FleetIdentity, Machine, MachineState, Offer, Provider
from spotjax.fleet.providers.trace import TraceConfig, TraceFile, TraceProvider, read_traces
from spotjax.fleet.providers.trace_capacity import Capacity, Step, What, steps
from spotjax.sim.traces import own
from spotjax.sim.workload import SpotEvent, SpotTrace

KEY = ("local", "", "spot")
SPOT = Offer(*KEY, 0.0)
TRACE = SpotTrace(
    "short",
    (SpotEvent(0, ("a", "b")), SpotEvent(10, ("c",), ("a",)), SpotEvent(20, (), ("b", "c")), SpotEvent(40, ("d",))),
    60.0,
)


@dataclass
class Host:
    """Brings machines to life in no time, and writes down what it is told."""

    machines: Machines
    room: int = 99
    told: list[tuple[float, str, str]] = field(default_factory=list)

    def _note(self, what: str, name: str) -> None:
        self.told.append((asyncio.get_running_loop().time() - 1000.0, what, name))

    async def request(self, name: str, offer: Offer) -> Machine:
        if len([m for m in self.machines.all() if m.state is not MachineState.WAITING]) >= self.room:
            raise OutOfCapacity("full")
        self._note("request", name)
        return self.machines.put(Machine(name, offer, MachineState.RUNNING))

    async def release(self, name: str) -> None:
        self._note("release", name)
        self.machines.drop(name)

    def take(self, name: str, notice: bool) -> None:
        self._note("notice" if notice else "kill", name)
        if not notice and (machine := self.machines.get(name)) is not None:
            self.machines.put(replace(machine, state=MachineState.PREEMPTED))

    async def close(self) -> None:
        pass


def replayed(config: TraceConfig, trace: SpotTrace = TRACE, room: int = 99) -> tuple[TraceProvider, Host]:
    """A provider whose machines live in no time, with that trace for its first market."""
    host = Host(machines := Machines(), room)
    return TraceProvider(config, {config.traces[0].key: trace}, host, machines, now=lambda: 5.0), host


def config(*, price: float | None = None, **settings: object) -> TraceConfig:
    return TraceConfig(traces=(TraceFile(file="-", on_demand_price=price),), **settings)  # type: ignore[arg-type]


def test_machines_come_and_go_as_the_market_gave_and_took_them() -> None:
    async def main() -> tuple[list[tuple[float, str, str]], list[str]]:
        provider, host = replayed(config(speed=2.0, notice_seconds=3.0))
        provider.play()
        for name in ("m0", "m1", "m2", "m3"):
            await provider.request(name, SPOT)
        await asyncio.sleep(100)
        states = [f"{machine.name} {machine.state}" for machine in await provider.list()]
        await provider.close()
        return host.told, states

    told, states = virtual_time.run(main())
    assert told == [
        (0.0, "request", "m0"), (0.0, "request", "m1"), (2.0, "notice", "m0"), (5.0, "kill", "m0"),
        (5.0, "request", "m2"), (7.0, "notice", "m1"), (7.0, "notice", "m2"), (10.0, "kill", "m1"),
        (10.0, "kill", "m2"), (20.0, "request", "m3"),
    ]  # fmt: skip
    assert states == ["m0 preempted", "m1 preempted", "m2 preempted", "m3 running"]
    assert virtual_time.run(main()) == (told, states), "it is the same every time"


def test_beyond_the_market_a_request_waits_its_turn_or_fails_as_it_is_configured() -> None:
    async def main() -> None:
        provider, _ = replayed(config(beyond="fail"))
        provider.play()
        for name in ("m0", "m1"):
            await provider.request(name, SPOT)
        with pytest.raises(OutOfCapacity, match="the market has no local as spot left, of 2 now"):
            await provider.request("m2", SPOT)
        await provider.release("m0")
        assert (await provider.request("m2", SPOT)).state is MachineState.RUNNING
        provider, _ = replayed(config())
        provider.play()
        for name in ("m0", "m1", "m2", "m3"):
            asked = await provider.request(name, SPOT)
        assert asked == Machine("m3", SPOT, MachineState.WAITING, created=5.0)
        await provider.release("m2")
        await provider.release("m0")
        assert [m.name for m in await provider.list() if m.state is MachineState.RUNNING] == ["m1", "m3"]
        await provider.close()

    virtual_time.run(main())


def test_machines_on_demand_are_always_there_and_are_not_taken() -> None:
    async def main() -> None:
        provider, host = replayed(config(price=2.0), replace(TRACE, events=(SpotEvent(9, ("x",), on_demand=True),)))
        provider.play()
        demand = Offer("local", "", "on_demand", 2.0)
        assert list(await provider.offers()) == [SPOT, demand]
        await provider.request("m0", demand)
        await provider.request("m1", SPOT)
        await asyncio.sleep(100)
        assert host.told == [(0.0, "request", "m0")], "what the trace has on demand is not the market's"
        with pytest.raises(ProviderRefused, match="there is no other as spot; there is local as spot, local as on_dem"):
            await provider.request("m2", Offer("other", "", "spot", 0.0))
        await provider.close()

    virtual_time.run(main())


def test_where_the_host_has_no_room_requests_wait_on() -> None:
    async def main() -> None:
        provider, host = replayed(config(), room=1)
        provider.play()
        await provider.request("m0", SPOT)
        with pytest.raises(OutOfCapacity, match="full"):
            await provider.request("m1", SPOT)
        host.room = 99
        assert (await provider.request("m1", SPOT)).state is MachineState.RUNNING, "its place was not lost"
        await provider.request("m2", SPOT)
        host.room = 1
        await asyncio.sleep(15)  # at 10 another one comes
        assert (await provider.list())[-1].state is MachineState.WAITING
        host.room = 99
        await asyncio.sleep(35)
        assert (await provider.list())[-1].state is MachineState.RUNNING
        await provider.close()

    virtual_time.run(main())


@st.composite
def markets(draw: st.DrawFn) -> SpotTrace:
    """Instances that come and go at whole seconds, several at once, also ones that come back or go at once."""
    there: list[str] = []
    events: list[SpotEvent] = []
    seconds = 0
    for number in range(draw(st.integers(0, 12))):
        seconds += draw(st.integers(0, 4))
        added = tuple(f"i{number}-{k}" for k in range(draw(st.integers(0, 3))))
        removed = tuple(draw(st.lists(st.sampled_from(there), unique=True))) if there else ()
        if draw(st.booleans()) and added:
            removed += added[:1]
        there = [name for name in [*there, *added] if name not in removed]
        events.append(SpotEvent(float(seconds), added, removed))
    return SpotTrace("drawn", tuple(events), float(seconds + 1))


@given(markets(), st.lists(st.tuples(st.integers(0, 40), st.booleans()), max_size=12), st.sampled_from([0.0, 2.5]))
def test_never_more_run_than_the_record_has_and_nobody_waits_while_there_is_one(
    trace: SpotTrace, asked: list[tuple[int, bool]], notice: float
) -> None:
    async def main() -> None:
        provider, _ = replayed(config(notice_seconds=notice), trace)
        provider.play()
        loop = asyncio.get_running_loop()
        counts = trace.counts()
        for number, (seconds, release) in enumerate(sorted(asked)):
            await asyncio.sleep(max(0.0, 1000 + seconds + 0.5 - loop.time()))
            await provider.request(f"m{number}", SPOT)
            if release:
                await provider.release(f"m{number // 2}")
            machines = await provider.list()
            running = sum(machine.state is MachineState.RUNNING for machine in machines)
            waiting = sum(machine.state is MachineState.WAITING for machine in machines)
            there = next((count for since, count in reversed(counts) if since <= seconds + 0.5), 0)
            assert running <= there
            assert not waiting or running == there or notice
        await provider.close()

    virtual_time.run(main())


@given(markets(), st.floats(0.1, 10), st.sampled_from([0.0, 0.5, 7.0]))
def test_the_steps_of_a_trace_are_its_events_and_notice_comes_before_the_end(
    trace: SpotTrace, speed: float, notice: float
) -> None:
    found = steps(KEY, trace, speed, notice)
    there: set[str] = set()
    told: set[str] = set()
    counted: dict[float, int] = {}
    for step in found:
        if step.what is What.COMES:
            there.add(step.place)
            told.discard(step.place)
        elif step.what is What.NOTICE:
            told.add(step.place)
            assert step.place in there
        else:
            there.remove(step.place)
            assert (step.place in told) == bool(notice)
        counted[step.seconds] = len(there)
    wanted = {seconds / speed: count for seconds, count in trace.counts()}
    assert {at: count for at, count in wanted.items() if at in counted} == {
        a: c for a, c in counted.items() if a in wanted
    }
    assert [step.seconds for step in found] == sorted(step.seconds for step in found)


def test_a_place_that_has_notice_is_nobodys_any_more() -> None:
    capacity = Capacity([KEY])
    capacity.apply(Step(0, What.COMES, KEY, "a"))
    assert capacity.apply(Step(1, What.NOTICE, KEY, "a")) == "" and not capacity.take("m", KEY)
    assert capacity.apply(Step(2, What.GOES, KEY, "a")) == "" and capacity.count(KEY) == 0


# -- files and processes


def written(path: Path, trace: SpotTrace = TRACE) -> TraceFile:
    own.write_spot(path, trace)
    return TraceFile(file=str(path))


def test_traces_are_read_in_every_format_from_where_the_replay_begins(tmp_path: Path) -> None:
    (tmp_path / "sky.json").write_text('{"metadata": {"gap_seconds": 10}, "data": [1, 3, 2]}')
    (tmp_path / "segment.jsonl").write_text('[0, "add", {"nodes": ["n"]}]\n[50000, "DONE", {"nodes": []}]\n')
    (tmp_path / "record.csv").write_text("0,add,n1\n20000,remove,n1\n")
    files = [written(tmp_path / "own.csv")]
    files += [TraceFile(file=str(tmp_path / n), zone=n[:2]) for n in ("sky.json", "segment.jsonl", "record.csv")]
    counts = [market.counts() for market in read_traces(TraceConfig(traces=tuple(files), begin_seconds=10)).values()]
    assert [[count for _, count in each] for each in counts] == [[2, 0, 1], [3, 2], [1], [1, 0]]
    with pytest.raises(ConfigError, match=r"begin_seconds is 60, but .*own\.csv ends at 60"):
        read_traces(TraceConfig(traces=(files[0],), begin_seconds=60))
    with pytest.raises(ConfigError, match="two are of type local in zone none"):
        read_traces(TraceConfig(traces=(files[0], files[0])))


IDENTITY = FleetIdentity("mine", "127.0.0.1:1", ServeConfig(parameter_store="off"))


async def test_the_grace_of_workers_is_the_notice_of_the_market(tmp_path: Path) -> None:
    files = (written(tmp_path / "own.csv"),)
    with pytest.raises(ConfigError, match="it is notice_seconds in"):
        await TraceConfig(traces=files, worker={"grace_seconds": 5}).open(IDENTITY)
    provider = await TraceConfig(traces=files, notice_seconds=5).open(IDENTITY)
    assert (await provider.list(), provider.name) == ((), "trace")
    await provider.close()


def live(path: Path, trace: TraceFile, settings: TraceConfig) -> TraceProvider:
    """Machines are processes that do nothing."""
    machines = Machines()
    worker = ServeConfig(parameter_store="off", grace_seconds=settings.notice_seconds)
    local = LocalConfig(most=16, offers=trace.offers)
    host = LocalProvider(local, worker, "127.0.0.1:1", command=command(path, WORKER), machines=machines)
    provider = TraceProvider(settings, read_traces(settings), host, machines)
    provider.play()
    return provider


class TestContract(ProviderContract):
    """See ``ProviderContract``. What the market does is in the tests above."""

    @pytest.fixture
    def case(self, tmp_path: Path) -> Case:
        trace = written(tmp_path / "own.csv", SpotTrace("t", (SpotEvent(0, ("a", "b", "c")),), 1.0))

        async def opened(_: FleetIdentity) -> Provider:
            return live(tmp_path, trace, TraceConfig(traces=(trace,)))

        return Case(opened, existing=lambda: len(psutil.Process().children()), outlives=False, alone=True)


async def test_processes_are_killed_and_come_when_the_record_says_so(tmp_path: Path) -> None:
    trace = written(tmp_path / "own.csv", SpotTrace("t", (SpotEvent(0, ("a",)), SpotEvent(9, ("b",), ("a",))), 10.0))
    provider = live(tmp_path, trace, TraceConfig(traces=(trace,), speed=20.0))
    for name in ("m0", "m1"):
        await provider.request(name, SPOT)

    async def states() -> Sequence[str]:
        return [machine.state.value for machine in await provider.list()]

    case = Case(lambda _: asyncio.sleep(0))  # type: ignore[arg-type,return-value]
    await case.until(provider, lambda m: m["m0"].state is MachineState.RUNNING)
    assert await states() == ["running", "waiting"]
    machines = await case.until(provider, lambda m: m["m1"].state is MachineState.RUNNING)
    machines = await case.until(provider, lambda m: m["m0"].state is MachineState.PREEMPTED)
    assert machines["m0"].detail == "SIGKILL" and len(psutil.Process().children()) == 1
    await provider.close()
    assert not psutil.Process().children()
