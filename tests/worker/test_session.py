"""A worker's stay in a fleet, with a real stream to a controller that does as it pleases."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest

from spotjax.errors import ConfigError, ConnectionLost, PeerUnreachable, SliceUnavailable
from spotjax.meshes.instance import InstanceType
from spotjax.meshes.shape import MeshShape
from spotjax.protocol import control
from spotjax.worker.session import End, Session

REGISTRATION = control.Register(
    control.VERSION, "a", "1", InstanceType("box", 2, 2**30, 1e9, 1e9, 1e9, 1e9), "cpu", False, "", "127.0.0.1:1"
)
SETUP = control.ModelSetup("tiny", "print", "float32", 33, 8, 64, 4, 16, (1,))
WELCOME = control.Welcome(SETUP, 1, 2.0, "service", 0, reunion=True)
READY = control.Ready((), 3)
SWITCH = control.Switch(1, ())


class Worker:
    """Remembers what it was asked; commands wait while ``gates`` say so, and raise ``problems``."""

    def __init__(self) -> None:
        self.did: list[Any] = []
        self.gates: dict[int, asyncio.Event] = {}
        self.problems: dict[int, Exception] = {}
        self.pauses = self.supersedes = 0
        self.forgotten: list[tuple[int, ...]] = []

    def ready(self) -> control.Ready:
        return READY

    async def carry_out(self, command: control.Command) -> control.Done:
        if command.id in self.gates:
            await self.gates[command.id].wait()
        self.did.append(command)
        if command.id in self.problems:
            raise self.problems[command.id]
        return control.Done(command.id, moved=command.id)

    def supersede(self) -> None:
        self.supersedes += 1
        for gate in self.gates.values():
            gate.set()

    def forget(self, sequences: tuple[int, ...]) -> None:
        self.forgotten.append(sequences)

    def pause(self) -> None:
        self.pauses += 1


class Controller:
    """The other end of one stream at a time."""

    def __init__(self) -> None:
        self.context: grpc.aio.ServicerContext[Any, Any] | None = None
        self.there = asyncio.Event()
        self.hang_up = asyncio.Event()
        self.refuse: grpc.StatusCode | None = None
        self.worker = Worker()
        self.prepare: Callable[[control.Welcome], Awaitable[Any]] = self._prepare
        self.welcomed: list[control.Welcome] = []
        self.channel: grpc.aio.Channel | None = None
        self.news: list[control.FromWorker] = []

    async def _prepare(self, welcome: control.Welcome) -> Worker:
        self.welcomed.append(welcome)
        return self.worker

    async def _join(self, requests: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        self.context = context
        if self.refuse is not None:
            await context.read()  # A stream that ends under the registration's write may end as INTERNAL instead.
            await context.abort(self.refuse, "not you")
        self.there.set()
        await self.hang_up.wait()

    def start(self) -> asyncio.Task[End]:
        """The worker's stay begins."""
        assert self.channel is not None
        self.session = Session(self.channel, REGISTRATION, self.prepare, lambda: self.news)  # type: ignore[arg-type]
        return asyncio.create_task(self.session.run())

    async def hear(self) -> Any:
        async with asyncio.timeout(10):
            await self.there.wait()
            assert self.context is not None
            return await self.context.read()

    async def say(self, *messages: Any) -> None:
        assert self.context is not None
        for message in messages:
            await self.context.write(message)

    async def welcome(self) -> asyncio.Task[End]:
        """A stay up to where the worker is ready."""
        stay = self.start()
        assert await self.hear() == REGISTRATION
        await self.say(WELCOME)
        assert await self.hear() == READY
        return stay


async def ended(stay: asyncio.Task[End]) -> End:
    async with asyncio.timeout(10):
        return await stay


@pytest.fixture
async def controller() -> AsyncIterator[Controller]:
    controller, server = Controller(), grpc.aio.server()
    service, _, method = control.METHOD.strip("/").partition("/")
    join = grpc.stream_stream_rpc_method_handler(controller._join, control.decode_from_worker, control.encode)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: join}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    controller.channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=control.OPTIONS)
    yield controller
    controller.hang_up.set()
    await controller.channel.close()
    await server.stop(1.0)
    assert not [task for task in asyncio.all_tasks() if "Session" in str(task.get_coro())]


async def test_a_worker_gets_ready_and_answers_commands_in_order(controller: Controller) -> None:
    stay = await controller.welcome()
    assert controller.welcomed == [WELCOME] and controller.session.ready
    controller.worker.gates[1] = asyncio.Event()
    await controller.say(control.CopyPages(1, ()), control.Switch(2, ()), control.Forget((7, 8)))
    while not controller.worker.forgotten:
        await asyncio.sleep(0)
    assert controller.worker.did == [] and controller.worker.forgotten == [(7, 8)]
    controller.worker.gates[1].set()
    assert await controller.hear() == control.Done(1, moved=1)
    assert await controller.hear() == control.Done(2, moved=2)
    controller.hang_up.set()
    assert await ended(stay) is End.LOST
    assert controller.worker.pauses == 1


@pytest.mark.parametrize(
    ("problem", "unreachable"),
    [
        (PeerUnreachable("b", "it is gone"), "b"),
        (PeerUnreachable("", "superseded"), ""),
        (ConnectionLost("nobody there"), ""),
        (SliceUnavailable("not here"), ""),
        (RuntimeError("out of memory"), ""),
        (AssertionError("prepare comes first"), ""),
    ],
)
async def test_what_goes_wrong_is_told_with_who_is_at_fault_and_the_next_command_is_carried_out(
    controller: Controller, problem: Exception, unreachable: str
) -> None:
    stay = await controller.welcome()
    controller.worker.problems[1] = problem
    await controller.say(SWITCH, control.Clear(2))
    assert await controller.hear() == control.Failed(1, unreachable, str(problem))
    assert await controller.hear() == control.Done(2, moved=2)
    controller.hang_up.set()
    await ended(stay)


@pytest.mark.parametrize("message", [control.Clear(2), None])
async def test_a_new_preparation_or_none_puts_an_end_to_what_reads_from_others(
    controller: Controller, message: control.Clear | None
) -> None:
    stay = await controller.welcome()
    controller.worker.gates[1] = asyncio.Event()
    empty = control.PlacementMessage(1, MeshShape(1, 1, 1), ((0, 1),), ())
    after = message or control.Prepare(2, empty, None, (), (), {}, {}, (), {}, ())
    await controller.say(SWITCH, after)
    assert (await controller.hear()).id == 1
    assert (await controller.hear()).id == 2
    assert controller.worker.supersedes == 1
    controller.hang_up.set()
    await ended(stay)


async def test_a_command_before_the_worker_is_ready_fails(controller: Controller) -> None:
    getting_ready = asyncio.Event()

    async def prepare(welcome: control.Welcome) -> Worker:
        await getting_ready.wait()
        return controller.worker

    controller.prepare = prepare
    stay = controller.start()
    await controller.hear()
    await controller.say(WELCOME, SWITCH)
    assert await controller.hear() == control.Failed(1, "", "not ready yet")
    getting_ready.set()
    assert await controller.hear() == READY
    controller.hang_up.set()
    await ended(stay)


@pytest.mark.parametrize(
    ("message", "end"),
    [
        (control.Release(at_once=False), End.RELEASED),
        (control.Release(at_once=True), End.TAKEN),
    ],
)
async def test_a_released_worker_ends_as_it_was_told(
    controller: Controller, message: control.Release, end: End
) -> None:
    stay = await controller.welcome()
    await controller.say(message)
    assert await ended(stay) is end
    assert controller.worker.pauses == 1


@pytest.mark.parametrize(("retry", "end"), [(True, End.LOST), (False, End.REFUSED)])
async def test_a_refused_worker_tries_again_only_if_that_can_help(
    controller: Controller, retry: bool, end: End
) -> None:
    stay = controller.start()
    await controller.hear()
    await controller.say(control.Refused("there is one of that name", retry))
    assert await ended(stay) is end


@pytest.mark.parametrize(
    ("problem", "end"),
    [
        (ConfigError("other weights"), End.REFUSED),
        (RuntimeError("no memory on the device"), End.REFUSED),
        (ConnectionLost("the controller is gone"), End.LOST),
    ],
)
async def test_a_worker_that_cannot_get_ready_does_not_stay(
    controller: Controller, caplog: pytest.LogCaptureFixture, problem: Exception, end: End
) -> None:
    async def prepare(welcome: control.Welcome) -> Worker:
        raise problem

    controller.prepare = prepare
    stay = controller.start()
    await controller.hear()
    await controller.say(WELCOME)
    assert await ended(stay) is end
    assert str(problem) in caplog.text


@pytest.mark.parametrize(
    ("code", "said"), [(grpc.StatusCode.INVALID_ARGUMENT, True), (grpc.StatusCode.UNAVAILABLE, False)]
)
async def test_an_end_that_will_come_again_is_said(
    controller: Controller, caplog: pytest.LogCaptureFixture, code: grpc.StatusCode, said: bool
) -> None:
    controller.refuse = code
    assert await ended(controller.start()) is End.LOST
    assert ("not you" in "".join(record.message for record in caplog.records if record.levelname == "ERROR")) is said


async def test_nobody_there_is_a_lost_stay() -> None:
    async with grpc.aio.insecure_channel("127.0.0.1:1", options=control.OPTIONS) as channel:
        assert await ended(asyncio.create_task(Session(channel, REGISTRATION, None).run())) is End.LOST  # type: ignore[arg-type]


async def test_the_end_of_a_stay_waits_for_what_is_under_way_and_puts_an_end_to_it(controller: Controller) -> None:
    stay = await controller.welcome()
    controller.worker.gates[1] = asyncio.Event()
    await controller.say(SWITCH, control.Forget(()))
    while not controller.worker.forgotten:
        await asyncio.sleep(0)
    controller.hang_up.set()
    assert await ended(stay) is End.LOST
    assert controller.worker.did == [SWITCH], "superseded, and ended before the worker was paused"
    assert (controller.worker.supersedes, controller.worker.pauses) == (1, 1)


async def test_a_stay_that_is_cancelled_ends_when_what_cannot_be_interrupted_has_ended(controller: Controller) -> None:
    entered, leave = asyncio.Event(), asyncio.Event()

    async def prepare(welcome: control.Welcome) -> Worker:
        entered.set()
        await leave.wait()
        return controller.worker

    controller.prepare = prepare
    stay = controller.start()
    await controller.hear()
    await controller.say(WELCOME)
    await entered.wait()
    stay.cancel()
    await asyncio.wait({stay}, timeout=0.01)
    assert not stay.done()
    leave.set()
    with pytest.raises(asyncio.CancelledError):
        await ended(stay)
    assert controller.worker.pauses == 1


async def test_what_is_told_after_the_end_is_lost_without_an_error(controller: Controller) -> None:
    stay = await controller.welcome()
    await controller.session.tell(control.NoticeWithdrawn("gce", ""))
    assert await controller.hear() == control.NoticeWithdrawn("gce", "")
    controller.hang_up.set()
    await ended(stay)
    await controller.session.tell(control.NoticeWithdrawn("gce", ""))


async def test_what_is_taken_back_while_it_is_told_is_taken_back_after_it(controller: Controller) -> None:
    controller.news = [control.Noticed(source, "maintenance", 3600.0, "") for source in ("a", "b")]
    back = control.NoticeWithdrawn("b", "")
    telling: list[asyncio.Task[None]] = []

    async def prepare(welcome: control.Welcome) -> Worker:
        tell = controller.session.tell

        async def tell_and_take_back(message: control.FromWorker) -> None:
            if message == controller.news[0]:  # while this one is written
                telling.append(asyncio.create_task(tell(back)))
            await tell(message)

        controller.session.tell = tell_and_take_back  # type: ignore[method-assign]
        return controller.worker

    controller.prepare = prepare
    stay = await controller.welcome()
    told = [await controller.hear() for _ in range(3)]
    assert told == [*controller.news, back]
    controller.hang_up.set()
    await ended(stay)


async def test_a_controller_hears_what_is_to_be_told_right_after_what_the_worker_has(controller: Controller) -> None:
    controller.news = [control.Noticed("gce-upcoming", "maintenance", 3600.0, "")]
    stay = await controller.welcome()
    assert await controller.hear() == controller.news[0]
    controller.hang_up.set()
    await ended(stay)
