"""The controller's ends of control streams, with a real server and workers that do as they please."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest

from spotjax.errors import InstanceLost
from spotjax.fleet import sessions as module
from spotjax.fleet.door import Door
from spotjax.fleet.leases import Leases
from spotjax.fleet.sessions import FIRST_BEAT_SECONDS, LOOKS_PER_LEASE, CommandFailed, Sessions, WorkerSession
from spotjax.meshes.instance import InstanceType
from spotjax.protocol import control
from spotjax.protocol.beats import Beat

KIND = InstanceType("box", 2, 2**30, 1e9, 1e9, 1e9, 1e9)
SETUP = control.ModelSetup("tiny", "print", "float32", 33, 8, 64, 4, 16, (1, 2))
LEASE = 0.032
"""Seconds; its looks are 2 ms apart."""


def registration(name: str = "a", incarnation: str = "1", version: int = control.VERSION) -> control.Register:
    return control.Register(version, name, incarnation, KIND, "cpu", False, "", "127.0.0.1:1")


NOTICED = control.Noticed("gce", "preempt", 3.0, "instance/preempted: TRUE")
WITHDRAWN = control.NoticeWithdrawn("gce", "instance/preempted: FALSE")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Recorder:
    """A watcher that remembers what it was told; newcomers wait while ``open`` is clear."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []
        self.more = asyncio.Event()
        self.open = asyncio.Event()
        self.open.set()
        self.answer: control.Welcome | control.Refused = control.Welcome(SETUP, 1, LEASE, "service", 0, reunion=False)
        self.arriving = 0
        self.raises: Exception | None = None

    async def welcome(self, registration: control.Register) -> control.Welcome | control.Refused:
        self.arriving += 1
        self.more.set()
        await self.open.wait()
        return self.answer

    def _tell(self, *what: Any) -> None:
        self.told.append(what)
        self.more.set()

    def registered(self, session: WorkerSession) -> None:
        self._tell("registered", session.instance)

    def ready(self, session: WorkerSession) -> None:
        self._tell("ready", session.instance)

    def noticed(self, session: WorkerSession, word: control.Noticed | control.NoticeWithdrawn) -> None:
        if self.raises is not None:
            raise self.raises
        self._tell("noticed", session.instance, word)

    def step_lost(self, session: WorkerSession, instance: str, problem: str) -> None:
        self._tell("step_lost", session.instance, instance, problem)

    def ended(self, session: WorkerSession, why: str) -> None:
        self._tell("ended", session.instance, why)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not condition():
                self.more.clear()
                await self.more.wait()

    async def until_told(self, *kinds: str) -> None:
        await self.until(lambda: [what[0] for what in self.told] == list(kinds))


class Worker:
    """A worker's end of a stream."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.stream: Any = channel.stream_stream(
            control.METHOD,
            request_serializer=lambda message: message if isinstance(message, bytes) else control.encode(message),
            response_deserializer=control.decode_from_controller,
        )()

    async def say(self, message: Any) -> None:
        await self.stream.write(message)

    async def hear(self) -> Any:
        """The next message; None when the stream has ended."""
        async with asyncio.timeout(20):
            message = await self.stream.read()
        return None if message is grpc.aio.EOF else message

    async def end(self) -> tuple[grpc.StatusCode, str]:
        """How the call ended."""
        async with asyncio.timeout(20):
            return await self.stream.code(), await self.stream.details()


class Fleet:
    """Sessions on a server."""

    def __init__(self) -> None:
        self.clock, self.watcher = Clock(), Recorder()
        self.leases = Leases(LEASE)
        self.sessions = Sessions(self.leases, self.clock, self.watcher)
        self.server = grpc.aio.server()
        door = Door()
        door.join = self.sessions.join
        self.server.add_generic_rpc_handlers((door.handler(),))
        self.port = self.server.add_insecure_port("127.0.0.1:0")
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{self.port}")

    def worker(self) -> Worker:
        return Worker(self.channel)

    async def join(self, *args: Any) -> Worker:
        """A worker that was welcomed."""
        worker = self.worker()
        await worker.say(registration(*args))
        assert isinstance(await worker.hear(), control.Welcome)
        return worker


async def nothing_under_way(fleet: Fleet) -> None:
    """Waits for the end of every session, and of every task of sessions and of commands."""
    async with asyncio.timeout(60):
        while fleet.sessions.all() or any("Session" in str(task.get_coro()) for task in asyncio.all_tasks()):
            await asyncio.sleep(0.001)


@pytest.fixture
async def fleet() -> AsyncIterator[Fleet]:
    fleet = Fleet()
    await fleet.server.start()
    yield fleet
    await fleet.channel.close()
    await fleet.server.stop(1.0)
    await nothing_under_way(fleet)
    assert fleet.leases.next_expiry() is None


def ask(session: WorkerSession) -> asyncio.Task[control.Done]:
    return asyncio.create_task(session.ask(control.Clear))


async def test_a_worker_registers_gets_ready_and_carries_out_commands(fleet: Fleet) -> None:
    worker = await fleet.join()
    session = fleet.sessions["a"]
    assert fleet.sessions.all() == (session,)
    assert session.offer is None
    held = (control.Parts(0, {"embed": ((0, 3), (0, 4))}),)
    await worker.say(control.Ready(held, 7))
    await fleet.watcher.until_told("registered", "ready")
    assert session.offer == control.Ready(held, 7)
    assert session.compiled == 7
    first, second = ask(session), ask(session)
    commands = [await worker.hear(), await worker.hear()]
    assert commands == [control.Clear(0), control.Clear(1)]
    await worker.say(control.Done(1, 5, 6, 8))
    assert await second == control.Done(1, 5, 6, 8)
    await worker.say(control.Failed(0, "b", "no way"))
    with pytest.raises(CommandFailed, match="no way") as failed:
        await first
    assert (failed.value.instance, failed.value.unreachable) == ("a", "b")
    assert session.compiled == 8
    await worker.say(NOTICED)
    await worker.say(WITHDRAWN)
    await worker.say(control.StepLost("b", "reset"))
    await fleet.watcher.until_told("registered", "ready", "noticed", "noticed", "step_lost")
    assert fleet.watcher.told[2:] == [
        ("noticed", "a", NOTICED),
        ("noticed", "a", WITHDRAWN),
        ("step_lost", "a", "b", "reset"),
    ]


async def test_what_a_worker_says_of_itself_is_kept_until_it_says_it_anew(fleet: Fleet) -> None:
    worker = await fleet.join()
    session = fleet.sessions["a"]
    assert session.vitals is None
    for told in (control.Vitals(sent=1), control.Vitals((control.StageWork(0, 1, 5, 0.5),), sent=2)):
        await worker.say(told)
        while session.vitals != told:
            await asyncio.sleep(0)
    assert [kind for kind, *_ in fleet.watcher.told] == ["registered"], "nobody acts on it"


async def test_an_instance_is_as_silent_as_its_last_sign_of_life_is_old(fleet: Fleet) -> None:
    worker = await fleet.join()
    await worker.say(control.Ready((), 0))
    await fleet.watcher.until_told("registered", "ready")
    fleet.clock.now += LEASE / 4
    assert fleet.sessions.silence("a") == pytest.approx(LEASE / 4)
    fleet.sessions.beat(Beat("a", "1"))
    assert fleet.sessions.silence("a") == pytest.approx(0, abs=1e-9)


async def test_another_version_is_refused_for_good_and_nobody_is_told(fleet: Fleet) -> None:
    worker = fleet.worker()
    await worker.say(registration(version=control.VERSION + 1))
    refused = await worker.hear()
    assert isinstance(refused, control.Refused) and not refused.retry
    assert str(control.VERSION + 1) in refused.reason
    assert await worker.hear() is None
    assert not fleet.watcher.told and not fleet.watcher.arriving


async def test_whom_the_fleet_refuses_is_told_why(fleet: Fleet) -> None:
    fleet.watcher.answer = control.Refused("it is too old", retry=False)
    worker = fleet.worker()
    await worker.say(registration())
    assert await worker.hear() == fleet.watcher.answer
    assert await worker.hear() is None
    assert not fleet.watcher.told


@pytest.mark.parametrize(
    "first", [b"\xc1 garbage", control.encode(control.Refused("no", True)), control.encode(NOTICED)]
)
async def test_a_first_message_that_is_no_registration_is_an_error_of_the_caller(fleet: Fleet, first: bytes) -> None:
    worker = fleet.worker()
    await worker.say(first)
    code, details = await worker.end()
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "registration" in details
    assert not fleet.watcher.told


async def test_hanging_up_before_the_first_message_leaves_nothing(fleet: Fleet) -> None:
    worker = fleet.worker()
    await worker.stream.done_writing()
    assert (await worker.end())[0] is grpc.StatusCode.INVALID_ARGUMENT
    assert not fleet.watcher.told


async def test_garbage_later_ends_the_session_and_is_reported(fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    worker = await fleet.join()
    await worker.say(b"\xc1 garbage")
    await fleet.watcher.until_told("registered", "ended")
    assert await worker.hear() is None
    assert "the session with a fails" in caplog.text


async def test_what_is_being_written_when_a_session_fails_is_written_to_its_end() -> None:
    """Else gRPC cannot end the stream: its last message is still under way."""

    class Context:
        """A worker that says garbage before its welcome is on its way."""

        def __init__(self) -> None:
            self.begun, self.may_end, self.written = asyncio.Event(), asyncio.Event(), 0
            self.said = [registration(), ValueError("garbage")]

        async def read(self) -> Any:
            message = self.said.pop(0)
            if isinstance(message, Exception):
                await self.begun.wait()
                asyncio.get_running_loop().call_later(0.01, self.may_end.set)
                raise message
            return message

        async def write(self, message: Any) -> None:
            self.begun.set()
            await self.may_end.wait()
            self.written += 1

    watcher, context = Recorder(), Context()
    await Sessions(Leases(LEASE), Clock(), watcher).join(None, context)  # type: ignore[arg-type]
    assert context.written == 1
    assert [what[0] for what in watcher.told] == ["registered", "ended"]


async def test_an_error_of_the_fleet_itself_is_not_hidden(fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    worker = await fleet.join()
    fleet.watcher.raises = KeyError("a bug")
    await worker.say(NOTICED)
    await fleet.watcher.until_told("registered", "ended")
    assert "a bug" in caplog.text


async def test_a_second_worker_of_a_name_is_refused_while_the_first_lives_and_may_try_again(fleet: Fleet) -> None:
    first = await fleet.join("a", "1")
    second = fleet.worker()
    await second.say(registration("a", "2"))
    refused = await second.hear()
    assert isinstance(refused, control.Refused) and refused.retry
    fleet.sessions["a"].tell(control.Forget((5,)))
    assert await first.hear() == control.Forget((5,))
    first.stream.cancel()
    await fleet.watcher.until_told("registered", "ended")
    await fleet.join("a", "2")


async def test_of_two_that_come_at_once_one_is_welcomed(fleet: Fleet) -> None:
    fleet.watcher.open.clear()
    workers = [fleet.worker(), fleet.worker()]
    for number, worker in enumerate(workers):
        await worker.say(registration("a", str(number)))
    await fleet.watcher.until(lambda: fleet.watcher.arriving == 2)
    fleet.watcher.open.set()
    answers = [type(await worker.hear()) for worker in workers]
    assert sorted(answers, key=str) == [control.Refused, control.Welcome]
    await fleet.watcher.until_told("registered")


async def test_the_same_process_takes_over_from_its_old_stream(fleet: Fleet) -> None:
    old = await fleet.join("a", "1")
    before = fleet.sessions["a"]
    waiting = ask(before)
    assert await old.hear() == control.Clear(0)
    await fleet.join("a", "1")
    with pytest.raises(InstanceLost, match="registers again"):
        await waiting
    assert fleet.sessions["a"] is not before
    assert [what[0] for what in fleet.watcher.told] == ["registered", "ended", "registered"]
    assert await old.hear() is None
    assert fleet.sessions["a"].over.done() is False


async def test_a_broken_stream_ends_the_session_and_every_command(fleet: Fleet) -> None:
    worker = await fleet.join()
    session = fleet.sessions["a"]
    waiting = [ask(session) for _ in range(3)]
    await worker.hear()
    worker.stream.cancel()
    for one in waiting:
        with pytest.raises(InstanceLost, match="connection closed"):
            await one
    with pytest.raises(InstanceLost):
        await session.ask(control.Clear)
    with pytest.raises(InstanceLost):
        fleet.sessions["a"]
    assert fleet.sessions.get("a") is None
    assert fleet.watcher.told[1:] == [("ended", "a", "its connection closed")]


async def test_answers_that_nobody_waits_for_are_ignored(fleet: Fleet) -> None:
    worker = await fleet.join()
    session = fleet.sessions["a"]
    given_up = ask(session)
    await worker.hear()
    given_up.cancel()
    await asyncio.gather(given_up, return_exceptions=True)
    for message in (control.Done(0), control.Failed(0, "", "late"), control.Done(99), control.Failed(98, "", "?")):
        await worker.say(message)
    asked = ask(session)
    assert await worker.hear() == control.Clear(1)
    await worker.say(control.Done(1, 1))
    await worker.say(control.Done(1, 2))
    await worker.say(control.Failed(1, "", "after all"))
    assert (await asked).moved == 1
    await worker.say(NOTICED)
    await fleet.watcher.until_told("registered", "noticed")


async def test_a_second_registration_on_a_stream_is_ignored(fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    worker = await fleet.join()
    await worker.say(registration("b"))
    await worker.say(NOTICED)
    await fleet.watcher.until_told("registered", "noticed")
    assert [session.instance for session in fleet.sessions.all()] == ["a"]
    assert "second registration" in caplog.text


async def test_what_comes_after_the_end_is_ignored_and_what_was_told_before_is_still_sent(fleet: Fleet) -> None:
    worker = await fleet.join()
    session = fleet.sessions["a"]
    for number in range(50):
        session.tell(control.Forget((number,)))
    session.tell(control.Release(at_once=False))
    fleet.sessions.end("a", "released")
    session.tell(control.Forget((99,)))
    await worker.say(NOTICED)
    heard = [await worker.hear() for _ in range(52)]
    assert heard == [*(control.Forget((number,)) for number in range(50)), control.Release(False), None]
    assert fleet.watcher.told == [("registered", "a"), ("ended", "a", "released")]


async def test_a_worker_that_does_not_listen_cannot_hold_up_its_end(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "GOODBYE_SECONDS", 0.02)
    worker = await fleet.join()
    session = fleet.sessions["a"]
    for _ in range(30):
        session.tell(control.Forget(tuple(range(10**5, 2 * 10**5))))
    fleet.sessions.end("a", "enough")
    await nothing_under_way(fleet)
    worker.stream.cancel()


async def test_the_silent_are_ended_and_those_who_beat_are_not(fleet: Fleet) -> None:
    await fleet.join("loud")
    silent = await fleet.join("silent")
    fleet.sessions.beat(Beat("silent", "1"))
    stranger = Beat("silent", "another incarnation")
    watching = asyncio.create_task(fleet.sessions.watch(LEASE))
    async with asyncio.timeout(10):
        while fleet.sessions.get("silent") is not None:
            fleet.clock.now += LEASE / LOOKS_PER_LEASE
            fleet.sessions.beat(Beat("loud", "1"))
            fleet.sessions.beat(stranger)
            await asyncio.sleep(LEASE / LOOKS_PER_LEASE)
    watching.cancel()
    assert fleet.sessions.get("loud") is not None
    assert fleet.watcher.told[2:] == [("ended", "silent", f"silent for {LEASE} s")]
    assert await silent.hear() is None


async def test_a_newcomer_has_time_until_its_first_beat_or_until_it_is_ready(fleet: Fleet) -> None:
    beats = await fleet.join("beats")
    ready = await fleet.join("ready")
    assert fleet.leases.remaining("beats", fleet.clock.now) == FIRST_BEAT_SECONDS
    fleet.sessions.beat(Beat("beats", "1"))
    assert fleet.leases.remaining("beats", fleet.clock.now) == LEASE
    await ready.say(control.Ready((), 0))
    await fleet.watcher.until_told("registered", "registered", "ready")
    assert fleet.leases.remaining("ready", fleet.clock.now) == LEASE
    beats.stream.cancel()
    ready.stream.cancel()


async def test_a_controller_that_stood_still_blames_nobody(fleet: Fleet) -> None:
    await fleet.join()
    looks = 0

    def clock() -> float:
        nonlocal looks
        looks += 1
        return fleet.clock.now

    fleet.sessions._clock = clock
    watching = asyncio.create_task(fleet.sessions.watch(LEASE))
    async with asyncio.timeout(10):
        while looks < 20:
            fleet.clock.now += 1000 if looks % 3 == 1 else 0  # while it sleeps
            await asyncio.sleep(0)
    watching.cancel()
    assert fleet.sessions.get("a") is not None


async def test_a_worker_that_was_given_up_must_stay_out_for_a_while(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    for seconds in (1, 2, 4):
        worker = await fleet.join()
        fleet.watcher.told.clear()
        await worker.say(control.Ready((), 0))
        await fleet.watcher.until_told("ready")
        with caplog.at_level(logging.ERROR):
            fleet.sessions.give_up("a", "it cannot be reached")
        assert f"must stay out for {seconds} s: it cannot be reached" in caplog.text
        assert fleet.watcher.told[1:] == [("ended", "a", "it cannot be reached")]
        early = fleet.worker()
        await early.say(registration())
        refused = await early.hear()
        assert isinstance(refused, control.Refused) and refused.retry
        assert f"{seconds}.0 s" in refused.reason
        fleet.clock.now += seconds
    await fleet.join()
    fleet.sessions.give_up("a", "again")
    await fleet.join("a", "2")  # another process, which did nothing wrong


async def test_a_worker_whose_connection_ended_may_come_back_at_once(fleet: Fleet) -> None:
    for _ in range(3):
        worker = await fleet.join()
        worker.stream.cancel()
        await fleet.watcher.until(lambda: fleet.sessions.get("a") is None)


async def test_ending_whoever_is_not_there_is_nothing(fleet: Fleet) -> None:
    fleet.sessions.end("nobody", "why not")
    fleet.sessions.give_up("nobody", "why not")
    fleet.sessions.beat(Beat("nobody", "1"))
    assert not fleet.watcher.told


async def test_who_knocks_while_the_controller_starts_is_asked_to_come_again() -> None:
    server, door = grpc.aio.server(), Door()
    server.add_generic_rpc_handlers((door.handler(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        worker = Worker(channel)
        await worker.say(registration())
        answer = await worker.hear()
        assert isinstance(answer, control.Refused) and answer.retry
        assert await worker.end() == (grpc.StatusCode.OK, "")
    await server.stop(None)
