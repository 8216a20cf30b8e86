"""What the metadata service of AWS says is heard, at once and rightly, and nothing else."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

import httpx
import pytest
from metadata_cases import EPOCH, URL, Heard, listen, now, wall

from spotjax.errors import MetadataUnavailable
from spotjax.fleet.notices.aws import (
    ANSWERS_TO_BELIEVE,
    MAINTENANCE_INTERVAL,
    AwsSource,
    interruption,
    scheduled_events,
)
from spotjax.fleet.notices.notice import Notice, NoticeKind, Withdrawn
from spotjax.testing.metadata_aws import AwsMetadata
from spotjax.testing.metadata_faults import Fault, Kind, Request

ACTION, REBALANCE, SCHEDULED = "spot/instance-action", "recommendations/rebalance", "maintenance/scheduled"
AT_ONCE = 1.3
"""Seconds; the longest pause between two asks, and some."""


def platform() -> AwsMetadata:
    return AwsMetadata(wall)


def source(client: httpx.AsyncClient) -> AwsSource:
    return AwsSource("instance-0", client, now, URL, wall=wall)


def test_an_interruption_is_told_once_with_its_deadline() -> None:
    async def script(aws: AwsMetadata, _: AwsSource, heard: Heard) -> None:
        await asyncio.sleep(10)
        aws.interrupt(seconds=120)
        await asyncio.sleep(60)

    heard = listen(platform, source, script)
    ((moment, notice),) = heard.words
    assert isinstance(notice, Notice)
    assert moment <= 1010 + AT_ONCE
    assert (notice.source, notice.kind, notice.instance) == ("aws", NoticeKind.PREEMPT, "instance-0")
    assert notice.deadline == pytest.approx(1130, abs=1)
    assert json.loads(notice.evidence)["action"] == "terminate"


def test_hibernation_begins_at_once_and_a_stop_at_its_time() -> None:
    async def hibernates(aws: AwsMetadata, _: AwsSource, heard: Heard) -> None:
        aws.interrupt(action="hibernate")
        await asyncio.sleep(5)
        aws.interrupt(seconds=60, action="stop")
        await asyncio.sleep(5)

    heard = listen(platform, source, hibernates)
    assert [word.deadline for _, word in heard.words if isinstance(word, Notice)] == [None, pytest.approx(1065, abs=1)]


def test_advice_and_maintenance_are_told_apart_and_maintenance_is_withdrawn() -> None:
    async def script(aws: AwsMetadata, _: AwsSource, heard: Heard) -> None:
        aws.recommend()
        aws.schedule("event-1", 7200)
        aws.schedule("event-2", 3600, "instance-stop")
        await asyncio.sleep(20)
        aws.cancel("event-2")
        await asyncio.sleep(20)
        aws.cancel("event-1")
        await asyncio.sleep(MAINTENANCE_INTERVAL * 1.2 * (ANSWERS_TO_BELIEVE + 1))

    heard = listen(platform, source, script)
    assert sorted(heard.kinds()[:2]) == ["aws-maintenance maintenance", "aws-rebalance rebalance"]
    assert heard.kinds()[2:] == ["aws-maintenance maintenance", "aws-maintenance withdrawn"]
    deadlines = [
        word.deadline for _, word in heard.words if word.source == "aws-maintenance" and isinstance(word, Notice)
    ]
    assert deadlines == pytest.approx([4600, 8200], abs=1)


def test_an_older_answer_neither_withdraws_maintenance_nor_brings_it_back() -> None:
    moments: list[float] = []

    async def script(aws: AwsMetadata, _: AwsSource, heard: Heard) -> None:
        await asyncio.sleep(20)
        aws.schedule("event-1", 7200)
        await asyncio.sleep(200)
        aws.cancel("event-1")
        await asyncio.sleep(400)

    def stale(request: Request) -> Fault | None:
        if request.path.endswith(SCHEDULED):
            moments.append(now())
        return Fault(Kind.STALE) if request.path.endswith(SCHEDULED) and len(moments) % 4 == 0 else None

    assert listen(platform, source, script, stale).kinds() == [
        "aws-maintenance maintenance",
        "aws-maintenance withdrawn",
    ]


def test_tokens_are_renewed_before_they_end_and_fetched_anew_when_they_are_refused() -> None:
    async def script(aws: AwsMetadata, _: AwsSource, heard: Heard) -> None:
        await asyncio.sleep(100)
        aws.orders["forget_tokens"]()
        await asyncio.sleep(5)
        aws.interrupt()
        await asyncio.sleep(5)

    statuses: list[int] = []

    class Watched(AwsMetadata):
        async def answer(self, request):  # type: ignore[no-untyped-def]
            reply = await super().answer(request)
            statuses.append(reply.status)
            return reply

    heard = listen(lambda: Watched(wall, longest_ttl=20), source, script)
    assert heard.kinds() == ["aws preempt"]
    assert len(heard.asked("/api/token")) == pytest.approx(100 / 18 + 2, abs=1)
    assert statuses.count(401) <= 3, "only when all tokens were forgotten, once for each path"


def test_without_a_token_nothing_is_asked() -> None:
    async def script(aws: AwsMetadata, _: AwsSource, heard: Heard) -> None:
        aws.interrupt()
        await asyncio.sleep(30)

    def no_tokens(request: Request) -> Fault | None:
        return Fault(Kind.STATUS, status=403) if request.path == "/latest/api/token" else None

    heard = listen(platform, source, script, no_tokens)
    assert not heard.words
    assert {request.path for _, request in heard.requests} == {"/latest/api/token"}


def test_one_session_serves_all_paths() -> None:
    async def script(aws: AwsMetadata, _: AwsSource, heard: Heard) -> None:
        await asyncio.sleep(50)

    heard = listen(platform, source, script)
    assert len(heard.asked("/api/token")) == 1
    assert len(heard.asked(ACTION)) == pytest.approx(50, rel=0.2)
    assert len(heard.asked(SCHEDULED)) <= 5


def test_a_path_that_hangs_does_not_keep_others_from_being_heard() -> None:
    async def script(aws: AwsMetadata, _: AwsSource, heard: Heard) -> None:
        await asyncio.sleep(5)
        aws.interrupt()
        await asyncio.sleep(5)

    heard = listen(
        platform, source, script, lambda request: Fault(Kind.HANG, 1e6) if "events" in request.path else None
    )  # fmt: skip
    assert heard.kinds() == ["aws preempt"]
    assert heard.words[0][0] <= 1005 + AT_ONCE


@pytest.mark.parametrize("skew", [-600.0, 600.0])
def test_a_machine_whose_clock_is_wrong_goes_by_the_platform_s(skew: float) -> None:
    async def script(aws: AwsMetadata, _: AwsSource, heard: Heard) -> None:
        aws.interrupt(seconds=90)
        await asyncio.sleep(5)

    heard = listen(
        platform, lambda client: AwsSource("instance-0", client, now, URL, wall=lambda: wall() + skew), script
    )
    ((_, notice),) = heard.words
    assert isinstance(notice, Notice)
    assert notice.deadline is not None
    assert 1088 <= notice.deadline <= 1090


def test_an_end_that_is_past_is_at_any_moment_and_none_is_later_than_two_minutes() -> None:
    async def script(aws: AwsMetadata, _: AwsSource, heard: Heard) -> None:
        aws.interrupt(seconds=-5)
        await asyncio.sleep(5)
        aws.interrupt(seconds=500)
        await asyncio.sleep(5)

    words = [word for _, word in listen(platform, source, script).words if isinstance(word, Notice)]
    assert words[0].deadline is None
    assert words[1].deadline is not None and words[1].deadline <= 1005 + AT_ONCE + 120


@pytest.mark.parametrize(
    "value", [None, [], "terminate", 1, {}, {"action": "noop"}, {"time": "2017-09-18T08:22:00Z"}, {"action": ["stop"]}]
)
def test_what_is_no_interruption_is_refused(value: object) -> None:
    with pytest.raises(MetadataUnavailable):
        interruption(value)


def test_an_interruption_without_a_time_is_one() -> None:
    assert interruption({"action": "stop", "time": "2017-09-18T08:22:00Z"}) == ("stop", 1505722920.0)
    for time in (None, 5, "soon", "2017-09-18T08:22:00"):
        assert interruption({"action": "stop", "time": time}) == ("stop", None)


@pytest.mark.parametrize(
    "change", [lambda e: e.pop("State"), lambda e: e.update(NotBefore="soon"), lambda e: e.clear()]
)
def test_events_that_cannot_be_read_are_refused(change: Callable[[dict[str, str]], object]) -> None:
    event = {
        "NotBefore": "21 Jan 2019 09:00:43 GMT", "Code": "system-reboot", "Description": "scheduled reboot",
        "EventId": "instance-event-0d59937288b749b32", "NotAfter": "21 Jan 2019 09:17:23 GMT", "State": "active",
    }  # fmt: skip
    (read,) = scheduled_events([event])
    assert (read.code, read.begins) == ("system-reboot", 1548061243.0)
    assert scheduled_events([{**event, "State": "completed"}]) == []
    change(event)
    with pytest.raises(MetadataUnavailable):
        scheduled_events([event])
    with pytest.raises(MetadataUnavailable):
        scheduled_events({})


def test_nothing_is_withdrawn_that_was_an_interruption() -> None:
    async def script(aws: AwsMetadata, _: AwsSource, heard: Heard) -> None:
        aws.interrupt()
        await asyncio.sleep(5)
        del aws.values["spot/instance-action"]
        await asyncio.sleep(5)

    heard = listen(platform, source, script)
    assert not [word for _, word in heard.words if isinstance(word, Withdrawn)]
    assert heard.kinds() == ["aws preempt"]
    assert EPOCH + heard.words[0][0] < EPOCH + 1000 + AT_ONCE
