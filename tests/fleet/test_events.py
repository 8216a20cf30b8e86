"""Followers see the recent events, then every new one, in order, until the log is closed."""

from __future__ import annotations

import asyncio
import itertools
import logging

import pytest
from pure_model import turns

from spotjax.fleet.events import HISTORY, EventLog
from spotjax.fleet.status import Flow


def make_log(count: int = 0) -> EventLog:
    clock = itertools.count(1000)
    events = EventLog(lambda: float(next(clock)))
    for number in range(count):
        events.record("joined", number, f"event {number}")
    return events


async def follow(events: EventLog, seen: list[str], most: int = 10**9) -> None:
    async for event in events.follow():
        seen.append(event.message)
        if len(seen) == most:
            return


async def test_a_follower_sees_the_past_and_the_future() -> None:
    events, seen = make_log(2), []
    following = asyncio.create_task(follow(events, seen))
    await turns(3)
    assert seen == ["event 0", "event 1"]
    events.record("lost", 3, "event 2")
    events.record("lost", 3, "event 3")
    events.close()
    await following
    assert seen == ["event 0", "event 1", "event 2", "event 3"]


async def test_followers_do_not_take_events_from_each_other() -> None:
    events = make_log(1)
    seen: list[list[str]] = [[], [], []]
    following = [asyncio.create_task(follow(events, one)) for one in seen]
    await turns(2)
    events.record("lost", 1, "event 1")
    events.close()
    await asyncio.gather(*following)
    assert seen == [["event 0", "event 1"]] * 3


async def test_what_happens_while_a_follower_is_busy_is_not_missed() -> None:
    events, seen = make_log(1), []
    async for event in events.follow():
        seen.append(event.message)
        if len(seen) < 5:
            events.record("lost", 1, f"event {len(seen)}")
        else:
            events.close()
    assert seen == [f"event {n}" for n in range(5)]


async def test_a_slow_follower_loses_the_oldest() -> None:
    events, seen = make_log(HISTORY + 10), []
    events.close()
    await follow(events, seen)
    assert seen == [f"event {n}" for n in range(10, HISTORY + 10)]


async def test_a_follower_that_comes_back_sees_what_it_missed_and_nothing_twice() -> None:
    events = make_log(HISTORY + 3)
    events.close()
    assert [event.number async for event in events.follow(HISTORY + 1)] == [HISTORY + 2, HISTORY + 3]
    assert [event.number async for event in events.follow(HISTORY + 3)] == []
    assert [event.number async for event in events.follow()] == list(range(4, HISTORY + 4))


async def test_an_event_has_its_time_epoch_figures_and_flows() -> None:
    events = make_log()
    flow = Flow("i0", "i1", 12)
    events.record("switch", 7, "a switch", (flow,), bytes_moved=12, shape="1x2x1")
    events.close()
    (event,) = [event async for event in events.follow()]
    assert (event.time, event.kind, event.epoch, event.message) == (1000.0, "switch", 7, "a switch")
    assert event.fields == {"bytes_moved": 12, "shape": "1x2x1"}
    assert (event.number, event.flows) == (1, (flow,))


def test_an_event_is_one_log_line_with_its_fields(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "spotjax.fleet.events"):
        make_log().record("lost", 3, "100% of i0 is gone", instance="i0")
    (line,) = caplog.records
    assert (line.getMessage(), line.event, line.epoch, line.instance) == ("100% of i0 is gone", "lost", 3, "i0")
