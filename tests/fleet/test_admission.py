"""The way in: a request counts once it is recorded, and what happens meanwhile leaves nothing behind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pure_model import PurePipeline, turns
from recording_log import RecordingLog

from spotjax.engine.generation import GenerationRequest
from spotjax.engine.replica import Replica
from spotjax.engine.request import FinishReason, RequestState, SamplingParams
from spotjax.engine.scheduler import Limits, Scheduler
from spotjax.errors import CommitLogError, InvalidRequest, LogUnavailable, Overloaded, RequestExists, UnknownRequest
from spotjax.fleet.admission import Admission, ServiceLimits
from spotjax.fleet.dispatch import Dispatcher
from spotjax.fleet.requests import RequestTable

PAGES, PAGE_SIZE = 10, 4


def limits(depth: int) -> Limits:
    return Limits(4, 8, depth, lambda lengths: True)


class LateLog(RecordingLog):
    """A log that learns too late that its disk is full: what it has taken, it cannot record."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: dict[str, asyncio.Future[None]] = {}

    def accept(self, request: GenerationRequest, states: object, key: int) -> asyncio.Future[None]:
        self.taken[request.request_id] = asyncio.get_running_loop().create_future()
        return self.taken[request.request_id]

    def refuse(self, name: str) -> None:
        self.taken[name].set_exception(LogUnavailable("the disk is full"))


class Service:
    """An admission and what is behind it; no replica runs."""

    def __init__(self, log: RecordingLog, queue: int = 5, positions: int = 20) -> None:
        def make_replica(scheduler: Scheduler, pipeline: PurePipeline) -> Replica:
            return Replica(scheduler, pipeline, log, None, print)  # type: ignore[arg-type]  # nothing runs

        def fail(problem: BaseException) -> None:
            raise problem

        self.log, self.ended = log, list[RequestState]()
        self.requests = RequestTable(log, 60.0)
        self.dispatcher = Dispatcher(make_replica, limits, PAGES, PAGE_SIZE, fail)  # type: ignore[arg-type]
        bounds = ServiceLimits(positions, PAGES, PAGE_SIZE, queue, 60.0, limits)
        self.admission = Admission(log, self.requests, self.dispatcher, bounds, frozenset({7}), self.end)

    def end(self, states: object) -> None:
        states = list(states)  # type: ignore[call-overload]
        self.ended += states
        if states:
            self.log.append(states, lambda: self.requests.committed(states, 0.0))

    def submit(self, name: str, n: int = 1, resumable: bool = True, prompt: int = 3) -> asyncio.Future[None]:
        request = GenerationRequest(name, (1,) * prompt, SamplingParams(max_tokens=5), n, resumable)
        return asyncio.ensure_future(self.admission.submit(request))

    def cancel(self, name: str) -> None:
        self.admission.cancel(self.requests.get(name), FinishReason.CANCELLED)

    @property
    def queued(self) -> list[tuple[str, int]]:
        return [(one.state.request_id, one.state.choice) for one in self.dispatcher.parked]


def slow(turns: int = 20) -> RecordingLog:
    return RecordingLog(lambda: turns)


async def test_a_request_is_queued_when_it_is_recorded_and_not_before() -> None:
    service = Service(slow())
    accepted = service.submit("r", n=2)
    await turns(5)
    assert not accepted.done() and service.queued == [] and "r" not in service.log.recorded
    assert service.admission.recording == 2 and service.requests.running == 1
    await accepted
    assert service.queued == [("r", 0), ("r", 1)] and service.admission.recording == 0
    assert service.log.recorded["r"].states == tuple(one.state for one in service.dispatcher.parked)
    assert service.log.recorded["r"].key == service.dispatcher.parked[0].key
    assert all(one.state.end_tokens == {7} for one in service.dispatcher.parked)


async def test_requests_are_queued_in_the_order_in_which_they_came() -> None:
    delays = iter([9, 0, 5, 1])
    service = Service(RecordingLog(lambda: next(delays, 0)))
    await asyncio.gather(*(service.submit(f"r{n}") for n in range(4)))
    assert service.queued == [(f"r{n}", 0) for n in range(4)]
    keys = [one.key for one in service.dispatcher.parked]
    assert keys == sorted(keys) == [entry.key for entry in service.log.recorded.values()]


async def test_a_log_that_is_full_takes_nothing() -> None:
    service = Service(slow())
    service.log.full = True
    with pytest.raises(LogUnavailable):
        service.submit("r")
    assert "r" not in service.requests and service.requests.running == service.admission.recording == 0


async def test_what_cannot_be_recorded_after_all_has_never_been() -> None:
    log = LateLog()
    service = Service(log)
    lost, kept = service.submit("lost", n=2), service.submit("kept")
    log.refuse("lost")
    with pytest.raises(LogUnavailable):
        await lost
    assert "lost" not in service.requests and service.admission.recording == 1
    log.taken["kept"].set_result(None)
    await kept
    assert service.queued == [("kept", 0)] and service.ended == []
    service.submit("lost")  # its name is free
    log.taken["lost"].set_result(None)
    await turns(3)
    assert service.queued == [("kept", 0), ("lost", 0)]


async def test_nobody_waits_for_the_end_of_what_was_not_accepted() -> None:
    log = LateLog()
    service = Service(log)
    assert service.requests.idle.is_set()
    accepted = service.submit("r")
    assert not service.requests.idle.is_set()
    log.refuse("r")
    with pytest.raises(LogUnavailable):
        await accepted
    assert service.requests.idle.is_set()


async def test_what_was_cancelled_and_cannot_be_recorded_ends_nowhere() -> None:
    log = LateLog()
    service = Service(log)
    accepted = service.submit("r")
    service.cancel("r")
    log.refuse("r")
    with pytest.raises(LogUnavailable):
        await accepted
    assert service.ended == [] and service.queued == [] and "r" not in service.requests


async def test_a_name_is_taken_as_soon_as_it_is_being_recorded() -> None:
    service = Service(slow())
    accepted = service.submit("r")
    with pytest.raises(RequestExists, match="'r'"):
        service.submit("r")
    await accepted
    with pytest.raises(RequestExists, match="'r'"):
        service.submit("r")
    assert service.queued == [("r", 0)]


async def test_a_request_that_is_cancelled_while_it_is_recorded_ends_when_that_is_done() -> None:
    service = Service(slow())
    accepted = service.submit("r", n=2)
    service.cancel("r")
    service.cancel("r")
    assert service.ended == [], "nobody is told of what is not recorded"
    stream = service.requests.stream("r", ())
    await accepted
    assert service.queued == []
    assert [(state.choice, state.finish) for state in service.ended] == [(n, FinishReason.CANCELLED) for n in range(2)]
    assert [delta.finish async for delta in stream] == [FinishReason.CANCELLED] * 2
    assert service.requests.running == 0


async def test_whoever_does_not_wait_for_the_answer_is_served_all_the_same() -> None:
    service = Service(slow())
    accepted = service.submit("r")
    await turns(2)
    accepted.cancel()
    await turns(40)
    assert accepted.cancelled() and service.queued == [("r", 0)]


async def test_whoever_does_not_wait_for_a_refusal_is_no_error_of_the_service() -> None:
    log = LateLog()
    service = Service(log)
    problems: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: problems.append(context))
    accepted = service.submit("r")
    accepted.cancel()
    log.refuse("r")
    await turns(3)
    del accepted
    assert "r" not in service.requests and not problems


async def test_what_is_being_recorded_counts_as_waiting() -> None:
    service = Service(slow(), queue=5)
    first = service.submit("a", n=3)
    with pytest.raises(Overloaded, match="3 sequences are waiting, at most 5"):
        service.submit("b", n=3)
    second = service.submit("c", n=2)
    await asyncio.gather(first, second)
    with pytest.raises(Overloaded, match="5 sequences are waiting"):
        service.submit("d")
    service.cancel("c")
    await service.submit("d")
    assert service.queued == [("a", 0), ("a", 1), ("a", 2), ("d", 0)]


@pytest.mark.parametrize(
    ("build", "field"),
    [
        (lambda service: service.submit("r", prompt=16), "sampling.max_tokens"),
        (lambda service: service.submit("r", n=6), "n"),
    ],
)
async def test_what_is_too_long_or_too_much_is_recorded_nowhere(build: Callable[[Service], object], field: str) -> None:
    service = Service(RecordingLog())
    with pytest.raises(InvalidRequest) as refused:
        build(service)
    assert refused.value.field == field
    assert not service.log.recorded and service.requests.running == 0


# --- what the log has from before ------------------------------------------------------------------------------------


async def earlier(service: Service) -> Service:
    """Another service that goes on from what the log of this one has."""
    await service.log.close()
    return Service(service.log.after_a_crash())


async def test_requests_of_before_wait_and_new_ones_get_other_keys() -> None:
    before = Service(RecordingLog())
    await before.submit("a", n=2)
    await before.submit("b")
    service = await earlier(before)
    waiting = service.admission.recall(5.0)
    assert list(waiting) == [0, 1, 2] and service.queued == [("a", 0), ("a", 1), ("b", 0)]
    assert [one.key for one in service.dispatcher.parked] == [0, 1, 2]
    with pytest.raises(RequestExists):
        service.submit("a")
    await service.submit("c")
    assert service.dispatcher.parked[-1].key == 3
    assert service.requests.running == 3


async def test_requests_whose_clients_cannot_come_back_end_as_cancelled() -> None:
    before = Service(RecordingLog())
    await before.submit("kept", n=2)
    await before.submit("left", n=2, resumable=False)
    service = await earlier(before)
    assert list(service.admission.recall(5.0)) == [0, 1]
    assert service.queued == [("kept", 0), ("kept", 1)]
    assert [state.finish for state in service.log.states("left")] == [FinishReason.CANCELLED] * 2
    assert service.requests.running == 1 and service.requests.get("left").finished_at == 0.0
    again = await earlier(service)
    assert list(again.admission.recall(9.0)) == [0, 1], "it has ended for good"


async def test_finished_requests_of_before_can_be_read_and_are_kept_from_now_on() -> None:
    before = Service(RecordingLog())
    await before.submit("done")
    before.cancel("done")
    await before.submit("half", n=2)
    half = before.dispatcher.parked[0]
    assert before.dispatcher.cancel(half, FinishReason.CANCELLED)
    before.end([half.state])
    service = await earlier(before)
    waiting = service.admission.recall(5.0)
    assert list(waiting) == [2] and service.queued == [("half", 1)]
    assert service.requests.get("done").finished_at == 5.0 and service.requests.running == 1
    assert [delta.finish async for delta in service.requests.stream("done", ())] == [FinishReason.CANCELLED]
    service.requests.purge(65.0)
    assert "done" not in service.requests and "half" in service.requests
    assert not service.requests.idle.is_set()
    service.cancel("half")
    assert service.requests.idle.is_set()


@given(st.lists(st.sampled_from(["submit", "cancel", "turn", "full", "room"]), max_size=30), st.integers(0, 9))
def test_whatever_comes_while_requests_are_recorded_all_that_were_accepted_are_there(
    operations: list[str], delay: int
) -> None:
    async def check() -> None:
        service = Service(slow(delay), queue=8)
        asked: dict[str, asyncio.Future[None]] = {}
        cancelled: set[str] = set()
        for number, operation in enumerate(operations):
            if operation == "submit":
                name = f"r{number}"
                try:
                    asked[name] = service.submit(name, n=2)
                except (LogUnavailable, Overloaded):
                    assert name not in service.requests
            elif operation == "cancel" and asked:
                name = list(asked)[number % len(asked)]
                service.cancel(name)
                cancelled.add(name)
            elif operation == "turn":
                await turns(4)
            else:
                service.log.full = operation == "full"
            assert service.dispatcher.waiting + service.admission.recording <= 8
        service.log.full = False
        await asyncio.gather(*asked.values())
        await service.log.close()
        assert service.log.recorded.keys() == asked.keys()
        assert service.queued == [(name, n) for name in asked if name not in cancelled for n in range(2)]
        for name in cancelled:
            assert [state.finish for state in service.log.states(name)] == [FinishReason.CANCELLED] * 2
        assert service.requests.running == len(asked) - len(cancelled) and not service.admission._recording

    asyncio.run(check())


async def test_who_follows_a_request_that_is_refused_late_is_told() -> None:
    log = LateLog()
    service = Service(log)
    accepted = service.submit("r")
    following = asyncio.create_task(anext(service.requests.stream("r", ())))  # type: ignore[arg-type]
    await turns(3)
    log.refuse("r")
    with pytest.raises(UnknownRequest, match="could not be recorded"):
        await asyncio.wait_for(following, 20)
    with pytest.raises(LogUnavailable):
        await accepted


async def test_a_request_that_can_never_end_within_smaller_limits_is_refused_at_the_start() -> None:
    before = Service(RecordingLog())
    await before.submit("long", prompt=14)
    log = before.log.after_a_crash()
    small = Service(log, positions=18)
    with pytest.raises(CommitLogError, match=r"request long of the commit log may take 19 positions, .* allow 18"):
        small.admission.recall(0.0)
    assert set(Service(log).admission.recall(0.0)) == {0}
