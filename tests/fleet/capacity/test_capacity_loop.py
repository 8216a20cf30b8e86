"""The loop, in virtual time: what it does to provider and fleet, and what becomes of it when something fails."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import wraps
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest
from capacity_cases import KIND, OFFERS, SETTINGS
from virtual_time import run

from spotjax.errors import NoFeasibleShape, NoSpareDevices, ProviderUnavailable, UnknownInstance
from spotjax.fleet.capacity.keeper import Keeper
from spotjax.fleet.capacity.ledger import Ledger
from spotjax.fleet.capacity.ledger_file import LedgerFile
from spotjax.fleet.capacity.load import Meter
from spotjax.fleet.capacity.loop import CapacityLoop
from spotjax.fleet.capacity.served import Clocks
from spotjax.fleet.change import Planning
from spotjax.fleet.notices.notice import Notice, Withdrawn
from spotjax.fleet.providers.provider import MachineState
from spotjax.fleet.status import FleetStatus, InstanceStatus
from spotjax.meshes.instance import Instance, InstanceState
from spotjax.models.config import DecoderConfig
from spotjax.models.spec import ModelSpec
from spotjax.planner.demand import Demand
from spotjax.testing.scripted_provider import ScriptedCloud

SPEC = ModelSpec(DecoderConfig(vocab=64, width=16, layers=4, heads=4, kv_heads=2, head_size=4, mlp=32))
LIMITS = msgspec.structs.replace(SETTINGS, on_demand="never", shrink_seconds=5.0)


def timed(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    @wraps(test)
    def in_virtual_time(*arguments: Any, **named: Any) -> None:
        run(test(*arguments, **named))

    return in_virtual_time


class Fleet:
    """Members are machines that run and were not told to go. A ``Served``."""

    planning = Planning(SPEC, Demand(batch=4, prompt=8, output=8, page_size=4))

    def __init__(self, cloud: ScriptedCloud) -> None:
        self.cloud = cloud
        self.gone_: set[str] = set()
        self.going: dict[str, InstanceState] = {}
        self.advised: set[str] = set()
        self.told: list[str] = []
        self.needs_all = False
        self.broken = False

    def members(self) -> list[Instance]:
        return [
            Instance(machine.name, KIND, self.going.get(machine.name, InstanceState.READY))
            for machine in self.cloud.machines("f")
            if machine.state in (MachineState.RUNNING, MachineState.STOPPING) and machine.name not in self.gone_
        ]

    def status(self) -> FleetStatus:
        if self.broken:
            raise RuntimeError("a mistake in the program")
        instances = tuple(
            InstanceStatus(member.name, "box", member.state, 1, advised=member.name in self.advised)
            for member in self.members()
        )
        return FleetStatus("m", True, False, None, instances, (), 0, 0, 0, 0, 0, 0.0)

    async def release(self, instance: str) -> Any:
        await asyncio.sleep(3)
        if self.needs_all:
            raise NoFeasibleShape("no mesh fits without it")
        if instance in self.gone_:
            raise UnknownInstance("it is gone")
        self.told.append(f"release {instance}")
        self.gone_.add(instance)

    async def preempt(self, instance: str, grace_seconds: float) -> Any:
        self.told.append(f"preempt {instance}")
        await asyncio.sleep(grace_seconds)
        self.gone_.add(instance)

    def noticed(self, word: Any) -> None:
        assert isinstance(word, Notice | Withdrawn) and word.source == "provider-scripted"
        if isinstance(word, Withdrawn):
            self.told.append(f"withdrawn {word.instance}")
            del self.going[word.instance]
            return
        self.told.append(f"noticed {word.instance}")
        self.going[word.instance] = InstanceState.NOTICED

    def gone(self, instance: str, how: str) -> None:
        self.told.append(f"gone {instance} {how}")
        self.gone_.add(instance)

    def record(self, kind: str, message: str, **fields: object) -> None:
        self.told.append(f"{kind} {message}")


class Case:
    """A loop over a cloud, both in the event loop's time."""

    def __init__(self, directory: Path | None = None, **changes: object) -> None:
        self.time = asyncio.get_running_loop().time
        self.cloud = ScriptedCloud(OFFERS, self.time, start_seconds=20.0, stop_seconds=10.0)
        self.fleet = Fleet(self.cloud)
        self.settings = msgspec.structs.replace(LIMITS, **changes)
        self.file = LedgerFile(directory)
        self.start()

    def start(self) -> None:
        """A new controller."""
        self.keeper = Keeper(self.settings, self.file.read(), Random(0), self.time())
        self.meter = Meter(self.settings.window_seconds, self.time())
        self.loop = CapacityLoop(
            self.settings, self.cloud.provider("f"), self.keeper, self.write, self.meter, lambda: self.fleet,
            Clocks(self.time, self.time),
        )  # fmt: skip
        self.running = asyncio.create_task(self.loop.run())

    async def write(self, ledger: Ledger) -> None:
        self.file.write(ledger)

    async def stop(self) -> None:
        self.running.cancel()
        await asyncio.gather(self.running, return_exceptions=True)

    @property
    def names(self) -> list[str]:
        return [member.name for member in self.fleet.members() if member.state is InstanceState.READY]


@timed
async def test_machines_are_rented_and_an_operators_more_are_kept_for_a_time() -> None:
    case = Case(add_seconds=200.0)
    await asyncio.sleep(60)
    assert case.names == ["f-0"]
    assert await case.loop.add(2) == ["f-1", "f-2"]
    assert len(case.names) == 3 and case.loop.status().wanted == 3
    await asyncio.sleep(300)
    assert len(case.names) == 1 and len(case.cloud.machines("f")) == 1
    assert [event.kind for event in case.loop.status().actions] == ["requested"] * 3 + ["released"] * 2
    with pytest.raises(NoSpareDevices, match="allows 8"):
        await case.loop.add(8)
    await case.stop()


@timed
async def test_an_operator_who_waits_for_machines_that_cannot_come_is_told_so() -> None:
    case = Case(add_seconds=200.0, cost_per_hour=1.5)
    await asyncio.sleep(60)
    assert case.names == ["f-0"]
    with pytest.raises(NoSpareDevices, match=r"2 instances were wanted, 1 are there: .*cap"):
        await case.loop.add(1)
    await case.stop()


@timed
async def test_the_fleet_moves_off_a_machine_before_it_is_given_back() -> None:
    case = Case(add_seconds=100.0)
    await asyncio.sleep(60)
    await case.loop.add(1)
    await asyncio.sleep(200)
    released = [asked for asked in case.cloud.asked if asked.call == "release"]
    (left,) = [told for told in case.fleet.told if told.startswith("release ")]
    assert [f"release {asked.name}" for asked in released] == [left]
    await case.stop()


@timed
async def test_a_machine_that_no_mesh_can_do_without_is_not_given_back() -> None:
    case = Case(add_seconds=100.0)
    await asyncio.sleep(60)
    await case.loop.add(1)
    case.fleet.needs_all = True
    await asyncio.sleep(300)
    assert len(case.names) == 2 and not [asked for asked in case.cloud.asked if asked.call == "release"]
    await case.stop()


@timed
async def test_a_machine_that_runs_again_after_all_loses_the_notice_that_its_provider_gave() -> None:
    case = Case(least=1, most=1)
    await asyncio.sleep(60)
    case.cloud.say("f-0", MachineState.STOPPING, "f")
    await asyncio.sleep(1.5)
    assert "noticed f-0" in case.fleet.told and "f-0" not in case.names
    case.cloud.say("f-0", MachineState.RUNNING, "f")
    await asyncio.sleep(1.5)
    assert case.fleet.told.count("withdrawn f-0") == 1 and "f-0" in case.names
    await case.stop()


@timed
async def test_what_the_provider_knows_first_the_fleet_is_told() -> None:
    case = Case(least=2)
    await asyncio.sleep(60)
    case.cloud.preempt("f-0", "f")
    await asyncio.sleep(1.5)
    assert "f-0" in case.fleet.gone_ or "f-0" not in case.names
    assert "f-0" not in [machine.name for machine in case.cloud.machines("f")], "its remains were released"
    await asyncio.sleep(60)
    assert case.names == ["f-1", "f-2"]
    case.cloud.release("f", "f-1")  # somebody else stops it, in the provider's console
    await asyncio.sleep(1.5)
    assert "noticed f-1" in case.fleet.told
    await asyncio.sleep(60)
    assert case.names == ["f-2", "f-3"]
    await case.stop()


@timed
async def test_an_advised_instance_is_left_when_another_has_come() -> None:
    case = Case()
    await asyncio.sleep(60)
    case.fleet.advised = {"f-0"}
    await asyncio.sleep(15)
    assert case.names == ["f-0"] and len(case.cloud.machines("f")) == 2
    await asyncio.sleep(60)
    assert case.names == ["f-1"] and "release f-0" in case.fleet.told
    await case.stop()


@timed
async def test_an_idle_fleet_goes_to_nothing_and_is_back_on_the_first_request() -> None:
    case = Case(idle=0, idle_seconds=100.0)
    await asyncio.sleep(60)
    assert case.names == ["f-0"]
    await asyncio.sleep(150)
    assert case.names == [] and case.cloud.machines("f") == () and case.loop.status().wanted == 0
    case.meter.arrived(case.time(), 10)
    await asyncio.sleep(2)
    assert len(case.cloud.machines("f")) == 1
    await case.stop()


@timed
async def test_a_restarted_controller_goes_on_with_its_account(tmp_path: Path) -> None:
    case = Case(tmp_path, least=2)
    await asyncio.sleep(600)
    before = case.loop.status()
    assert 0 < case.cloud.spent <= before.spent_today
    await case.stop()
    await asyncio.sleep(600)
    case.start()
    await asyncio.sleep(30)
    after = case.loop.status()
    assert case.cloud.spent <= after.spent_today and len(case.names) == 2
    assert sum(asked.call == "request" for asked in case.cloud.asked) == 2, "those of before are there"
    await case.stop()


@timed
async def test_a_provider_that_is_away_delays_and_breaks_nothing() -> None:
    case = Case()
    for _ in range(5):
        case.cloud.fail("list", ProviderUnavailable("down", retry_after=30.0))
    case.cloud.fail("request", ProviderUnavailable("down"))
    await asyncio.sleep(400)
    assert len(case.names) == 1 and len(case.keeper.ledger.entries) == 1
    await case.stop()


@timed
async def test_a_provider_that_was_away_for_long_is_tried_again_soon_for_machines_cost_meanwhile() -> None:
    case = Case(most_retry_seconds=1800.0, retry_seconds=30.0)
    for _ in range(40):
        case.cloud.fail("list", ProviderUnavailable("down"))
    await asyncio.sleep(40 * 60)
    assert len(case.names) == 1
    await case.stop()


@timed
async def test_a_machine_whose_release_fails_by_mistake_is_given_back_later(caplog: pytest.LogCaptureFixture) -> None:
    case, broken = Case(add_seconds=100.0), True
    release = case.fleet.release

    async def mistaken(instance: str) -> None:
        if broken:
            raise KeyError("a mistake in the program")
        await release(instance)

    case.fleet.release = mistaken  # type: ignore[method-assign]
    await asyncio.sleep(60)
    await case.loop.add(1)
    await asyncio.sleep(200)
    assert len(case.names) == 2 and "could not be given back" in caplog.text
    broken = False
    await asyncio.sleep(100)
    assert len(case.names) == 1 and len(case.cloud.machines("f")) == 1
    await case.stop()


@timed
async def test_a_crash_of_the_loop_is_loud_and_it_begins_again(caplog: pytest.LogCaptureFixture) -> None:
    case = Case()
    case.fleet.broken = True
    await asyncio.sleep(100)
    failures = [record for record in caplog.records if record.levelname == "CRITICAL"]
    assert 3 <= len(failures) <= 8, "loud, and less and less often"
    case.fleet.broken = False
    await asyncio.sleep(120)
    assert case.names == ["f-0"]
    await case.stop()


@timed
async def test_nothing_is_rented_while_the_account_cannot_be_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    case = Case(tmp_path / "gone")
    await asyncio.sleep(100)
    assert case.cloud.machines("f") == () and "capacity is not kept" in caplog.text
    (tmp_path / "gone").mkdir()
    await asyncio.sleep(200)
    assert len(case.names) == 1
    await case.stop()


@timed
async def test_a_cap_takes_the_fleet_down_with_notice_and_is_told_once() -> None:
    case = Case(least=2, idle=2, cost_per_hour=0.0, cost_per_day=1.0)
    await asyncio.sleep(7200)
    assert case.cloud.spent <= 1.0 and case.names == []
    assert {"preempt f-0", "preempt f-1"} <= set(case.fleet.told)
    assert 1 <= sum(told.startswith("cap ") for told in case.fleet.told) <= 2
    await case.stop()
