"""What a client asks next, and how long it waits for it, without a connection."""

import math

import pytest

from spotjax.api import patience
from spotjax.api.errors import Unavailable, Unreachable
from spotjax.api.patience import LONGEST_WAIT, Patience, backoff
from spotjax.api.proto.spotjax.v1 import generation_pb2 as pb
from spotjax.api.resumption import Progress, Pursuit
from spotjax.errors import (
    ConfigError,
    Draining,
    InvalidRequest,
    LogUnavailable,
    Overloaded,
    RequestExists,
    SpotjaxError,
    UnknownRequest,
)

GONE = Unreachable("nobody answers")
LOADING = Unavailable("the server is starting")
TAKEN = RequestExists("r")
UNKNOWN = UnknownRequest("no request 'r' is known")


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(patience.time, "monotonic", clock)
    monkeypatch.setattr(patience.random, "uniform", lambda low, high: 1.0)
    return clock


def pursuit(patience: float = 60.0, choices: int = 1, taking_up: bool = False) -> Pursuit:
    generate = None if taking_up else pb.GenerateRequest(request_id="r", text="hello", resumable=True)
    return Pursuit(Progress("r", [0] * choices), generate, patience, "server:1")


def piece(offset: int = 0, count: int = 1, finish: bool = False, choice: int = 0) -> pb.GenerateResponse:
    reason = pb.FINISH_REASON_LENGTH if finish else pb.FINISH_REASON_UNSPECIFIED
    return pb.GenerateResponse(
        request_id="r", choice=choice, offset=offset, token_ids=[7] * count, finish_reason=reason
    )


def calls(wanted: Pursuit, *errors: Exception) -> list[str]:
    """The methods that are called when these errors answer one call after the other, and the one after them."""
    methods = []
    for error in errors:
        methods.append(wanted.next_call()[0])
        wanted.wait_after(error)
    return [*methods, wanted.next_call()[0]]


def test_a_request_is_sent_again_until_it_is_accepted_then_taken_up() -> None:
    wanted = pursuit()
    assert calls(wanted, GONE, LOADING) == ["Generate", "Generate", "Generate"]
    wanted.opened()
    wanted.take(piece(count=3))
    wanted.wait_after(GONE)
    assert wanted.next_call() == ("Resume", pb.ResumeRequest(request_id="r", offsets=[3]))
    assert calls(wanted, LOADING, GONE) == ["Resume"] * 3


def test_a_request_whose_answer_was_lost_is_taken_up_at_once() -> None:
    wanted = pursuit()
    wanted.next_call()
    wanted.wait_after(GONE)
    wanted.next_call()
    assert wanted.wait_after(TAKEN) == 0
    assert wanted.next_call()[0] == "Resume"


def test_a_request_that_was_taken_but_never_recorded_is_sent_again() -> None:
    assert calls(pursuit(), GONE, TAKEN, UNKNOWN, GONE) == ["Generate", "Generate", "Resume", "Generate", "Generate"]


@pytest.mark.parametrize("before", [(), (LOADING,), (LOADING, LOADING)])
def test_an_id_that_somebody_else_has_is_refused(before: tuple[Exception, ...]) -> None:
    wanted = pursuit()
    calls(wanted, *before)
    with pytest.raises(RequestExists):
        wanted.wait_after(TAKEN)
    assert not wanted.abandoned


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequest("n", "too many"),
        Overloaded("full", 1.0),
        Draining("leaving"),
        LogUnavailable("disk full"),
        TimeoutError("late"),
        SpotjaxError("internal error"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_other_errors_are_raised_at_once_and_a_request_that_may_be_there_is_cancelled(error: Exception) -> None:
    fresh, again, accepted = pursuit(), pursuit(), pursuit()
    calls(again, GONE)
    accepted.next_call()
    accepted.opened()
    fresh.next_call()
    for wanted in (fresh, again, accepted):
        with pytest.raises(type(error)):
            wanted.wait_after(error)
    assert again.abandoned and accepted.abandoned
    assert fresh.abandoned == (type(error) in (TimeoutError, SpotjaxError))  # nobody said that it was refused


def test_a_request_that_the_server_forgot_is_said_to_be_lost() -> None:
    for wanted in (pursuit(), pursuit(taking_up=True)):
        wanted.next_call()
        wanted.opened()
        wanted.take(piece(count=2))
        wanted.wait_after(GONE)
        wanted.next_call()
        with pytest.raises(UnknownRequest, match=r"server:1 does not know request 'r' any more, of which 2 tokens"):
            wanted.wait_after(UNKNOWN)


def test_taking_up_a_request_that_never_was_raises_what_the_server_says() -> None:
    wanted = pursuit(taking_up=True)
    assert calls(wanted, LOADING) == ["Resume", "Resume"]
    with pytest.raises(UnknownRequest, match=r"^no request 'r' is known$"):
        wanted.wait_after(UNKNOWN)
    assert not wanted.abandoned


def test_each_end_of_a_choice_is_told_once() -> None:
    wanted = pursuit(choices=2)
    wanted.next_call()
    wanted.opened()
    assert wanted.take(piece(finish=True)) is not None
    wanted.wait_after(GONE)
    wanted.next_call()
    wanted.opened()
    assert wanted.take(piece(1, 0, finish=True)) is None
    assert not wanted.progress.complete and wanted.abandoned
    assert wanted.take(piece(finish=True, choice=1)) is not None
    assert wanted.progress.complete and not wanted.abandoned


def test_a_gap_in_the_tokens_is_an_error_not_a_loss() -> None:
    progress = Progress("r", [0])
    progress.take(piece(count=2))
    with pytest.raises(SpotjaxError, match="goes on at token 3"):
        progress.take(piece(3))


def test_waits_double_and_are_bounded() -> None:
    assert [backoff(failures) for failures in (1, 2, 3, 5, 6, 50, 100_000)] == [0.1, 0.2, 0.4, 1.6, 2.0, 2.0, 2.0]


@pytest.mark.parametrize("seconds", [0.0, 0.05, 17.0, 120.0])
def test_patience_ends_after_its_seconds(clock: Clock, seconds: float) -> None:
    waits, start = Patience(seconds), clock.now
    with pytest.raises(Unreachable):
        while True:
            clock.now += waits.wait_after(GONE)
    assert clock.now == pytest.approx(start + seconds)


def test_patience_can_be_endless_but_not_negative() -> None:
    assert Patience(math.inf).wait_after(GONE) == 0.1
    for seconds in (-1.0, math.nan):
        with pytest.raises(ConfigError, match="patience must be 0 or more seconds"):
            Patience(seconds)


@pytest.mark.parametrize("tokens, seconds", [(1, 0.0), (0, LONGEST_WAIT + 1)])
def test_patience_is_renewed_by_output_and_by_a_stream_that_lasted(clock: Clock, tokens: int, seconds: float) -> None:
    wanted = pursuit(patience=10)
    for offset in range(4):
        wanted.next_call()
        wanted.opened()
        clock.now += seconds
        if tokens:
            wanted.take(piece(offset))
        assert wanted.wait_after(GONE) == 0.1
        clock.now += 9


def test_patience_is_not_renewed_by_streams_that_break_at_once(clock: Clock) -> None:
    wanted = pursuit(patience=10)
    start = clock.now
    with pytest.raises(Unavailable):
        while True:
            wanted.next_call()
            wanted.opened()
            clock.now += wanted.wait_after(LOADING)
    assert clock.now == pytest.approx(start + 10)


def test_waiting_is_told_once_and_so_is_going_on(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "spotjax.client")
    wanted = pursuit(choices=2)
    calls(wanted, LOADING, LOADING, GONE)
    wanted.opened()
    wanted.take(piece(count=17))
    calls(wanted, GONE, LOADING)
    wanted.opened()
    assert [record.getMessage() for record in caplog.records] == [
        "waiting for the server: the server is starting",
        "the server is back",
        "connection lost; waiting for the server",
        "resumed at token 17, 0",
    ]
    assert {record.request for record in caplog.records} == {"r"}
