"""How long a controller that starts waits for workers, and who of them may keep KV from before."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from fleet_cases import TIGHT, instances, kind
from recording_log import RecordingLog
from remote_cases import PLANNING
from virtual_time import run

from spotjax import fleet_server
from spotjax.config import ServeConfig
from spotjax.engine.generation import GenerationRequest
from spotjax.engine.request import FinishReason, RequestState, SamplingParams
from spotjax.fleet.change import plan_change
from spotjax.fleet.saving import Saves
from spotjax.fleet.sessions import WorkerSession
from spotjax.fleet_server import RETURN_SECONDS, REUNION_SECONDS, FleetServer
from spotjax.meshes.placement import Placement
from spotjax.protocol import control

SETUP = control.ModelSetup("tiny", "print", "float32", 33, 8, 64, 4, 16, (1,))


class Service:
    """A controller that only remembers."""

    epoch = 3

    def __init__(self) -> None:
        self.told: list[str] = []

    async def start(self) -> None:
        self.told.append("start")

    async def close(self) -> None:
        self.told.append("close")

    def arrived(self, instance: str) -> None:
        self.told.append(instance)

    def gone(self, instance: str, how: str) -> None:
        self.told.append(f"{instance} gone")


def registration(name: str) -> control.Register:
    return control.Register(control.VERSION, name, "1", kind(), "cpu", False, "", f"{name}:1")


def earlier(epoch: int = 5, count: int = 2) -> Placement:
    return plan_change(PLANNING, None, instances(count, memory=TIGHT), {}, epoch).placement


class Start:
    """A server that waits for workers."""

    def __init__(self, unfinished: int = 0, workers: int = 0) -> None:
        log = RecordingLog()
        for number in range(unfinished + 1):  # the first has ended
            request = GenerationRequest(f"r{number}", (1, 2), SamplingParams(max_tokens=5), resumable=True)
            state = RequestState(request.request_id, 0, request.prompt, request.sampling)
            log.accept(request, [state if number else state.finished(FinishReason.CANCELLED)], number)
        model: Any = SimpleNamespace(tokenizer=None, name="tiny")
        config = ServeConfig(listen="127.0.0.1:0", data_listen="127.0.0.1:0", advertise="127.0.0.1")
        self.server = FleetServer(config, model, log.after_a_crash(), Saves(), "127.0.0.1:0")
        self.server._config = ServeConfig(workers=workers) if workers else config
        self.service = Service()
        self.server._service, self.server._setup = self.service, SETUP  # type: ignore[assignment]
        self.began = asyncio.get_running_loop().time()

    def ready(self, name: str, placement: Placement | None = None) -> WorkerSession:
        session = WorkerSession(registration(name))
        kept = control.PlacementMessage.of(placement) if placement is not None else None
        session.offer = control.Ready((), 0, kept)
        self.server.ready(session)
        return session

    @property
    def enough(self) -> bool:
        return self.server._enough.is_set()

    async def seconds(self) -> float:
        """When it had waited enough."""
        await asyncio.wait_for(self.server._enough.wait(), 1000)
        return asyncio.get_running_loop().time() - self.began


def in_virtual_time(scenario: Callable[[], Awaitable[None]], monkeypatch: pytest.MonkeyPatch) -> None:
    async def timed() -> None:
        clock = SimpleNamespace(monotonic=asyncio.get_running_loop().time)
        monkeypatch.setattr(fleet_server, "time", clock)
        await scenario()

    run(timed())


def test_where_nothing_is_to_be_gone_on_with_the_first_worker_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        start = Start()
        assert not start.enough
        start.ready("new")
        assert start.enough and start.service.told == ["new"]

    in_virtual_time(scenario, monkeypatch)


def test_with_requests_to_go_on_with_workers_of_before_may_come_for_a_while_and_not_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario() -> None:
        start = Start(unfinished=2)
        await asyncio.sleep(1)
        start.ready("new")
        start.ready("newer")
        assert not start.enough
        assert await start.seconds() == pytest.approx(RETURN_SECONDS, abs=0.01)

        late = Start(unfinished=1)
        await asyncio.sleep(RETURN_SECONDS + 1)
        late.ready("new")
        assert late.enough, "whoever would come back is back"

    in_virtual_time(scenario, monkeypatch)


def test_once_one_of_a_mesh_is_back_the_others_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        start = Start(unfinished=1)
        await asyncio.sleep(RETURN_SECONDS - 1)
        start.ready("i0", earlier())
        await asyncio.sleep(REUNION_SECONDS - 1)
        assert not start.enough
        start.ready("i1", earlier())
        assert start.enough

    in_virtual_time(scenario, monkeypatch)


def test_those_of_a_mesh_who_stay_away_are_not_waited_for_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        start = Start(unfinished=1)
        await asyncio.sleep(1)
        start.ready("i0", earlier(count=4))
        await asyncio.sleep(2)
        start.ready("i2", earlier(count=4))
        start.ready("new")
        assert await start.seconds() == pytest.approx(1 + REUNION_SECONDS, abs=0.01)

    in_virtual_time(scenario, monkeypatch)


def test_whoever_goes_again_while_others_are_waited_for_is_waited_for_too(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        start = Start(unfinished=1)
        gone = start.ready("i0", earlier())
        start.server.ended(gone, "its connection closed")
        await asyncio.sleep(2 * REUNION_SECONDS)
        assert not start.enough, "there is nobody"
        start.ready("i1", earlier())
        assert start.enough and start.service.told == ["i0", "i0 gone", "i1"]

    in_virtual_time(scenario, monkeypatch)


def test_a_controller_with_workers_of_its_own_waits_for_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        start = Start(unfinished=1, workers=2)
        start.ready("instance-0")
        await asyncio.sleep(100)
        assert not start.enough
        start.ready("instance-1")
        assert start.enough

    in_virtual_time(scenario, monkeypatch)


async def test_only_who_comes_before_the_start_may_keep_kv() -> None:
    start = Start()
    opening = asyncio.create_task(start.server.open(SimpleNamespace(add_handlers=lambda handlers: None)))  # type: ignore[arg-type]
    before = await start.server.welcome(registration("i0"))
    assert isinstance(before, control.Welcome) and before.reunion and before.service == "service"
    start.ready("i0")
    await opening
    after = await start.server.welcome(registration("i1"))
    assert isinstance(after, control.Welcome) and not after.reunion
    await start.server.close()
    assert start.service.told == ["i0", "start", "close"]
