"""What Azure's Scheduled Events say of this machine is heard, at once and rightly, and nothing of others."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest
from metadata_cases import URL, Heard, listen, now, wall

from spotjax.errors import MetadataUnavailable
from spotjax.fleet.notices.azure import ANSWERS_TO_BELIEVE, AzureSource
from spotjax.fleet.notices.azure_events import read_document
from spotjax.fleet.notices.notice import Notice, NoticeKind
from spotjax.testing.metadata_azure import AzureMetadata
from spotjax.testing.metadata_faults import Fault, Kind, Reply, Request

AT_ONCE = 1.3
"""Seconds; the longest pause between two asks, and some."""


def platform() -> AzureMetadata:
    return AzureMetadata(wall)


def source(client: httpx.AsyncClient) -> AzureSource:
    return AzureSource("instance-0", client, now, URL, wall=wall)


def test_a_preemption_is_told_once_with_its_deadline_and_again_when_it_begins_early() -> None:
    async def script(azure: AzureMetadata, _: AzureSource, heard: Heard) -> None:
        await asyncio.sleep(10)
        event = azure.schedule("Preempt", 30, ["VM-0"])
        await asyncio.sleep(10)
        azure.start(event)
        await asyncio.sleep(10)

    heard = listen(platform, source, script)
    (told, first), (_, second) = heard.words
    assert isinstance(first, Notice) and isinstance(second, Notice)
    assert told <= 1010 + AT_ONCE
    assert (first.source, first.kind, first.instance) == ("azure", NoticeKind.PREEMPT, "instance-0")
    assert first.deadline == pytest.approx(1040, abs=1)
    assert json.loads(first.evidence)["EventType"] == "Preempt"
    assert (second.kind, second.deadline) == (NoticeKind.PREEMPT, None)


@pytest.mark.parametrize("type", ["Reboot", "Redeploy", "Terminate", "Freeze"])
def test_all_else_is_maintenance_and_is_withdrawn_when_it_does_not_happen(type: str) -> None:
    async def script(azure: AzureMetadata, _: AzureSource, heard: Heard) -> None:
        event = azure.schedule(type, 900)
        await asyncio.sleep(10)
        azure.remove(event)
        await asyncio.sleep(5)

    heard = listen(platform, source, script)
    assert heard.kinds() == ["azure-maintenance maintenance", "azure-maintenance withdrawn"]
    assert isinstance(heard.words[0][1], Notice)
    assert heard.words[0][1].deadline == pytest.approx(1900, abs=1)


def test_events_of_others_are_not_ours() -> None:
    async def script(azure: AzureMetadata, _: AzureSource, heard: Heard) -> None:
        azure.schedule("Preempt", 30, ["vm-1", "vm-00"])
        await asyncio.sleep(60)

    assert not listen(platform, source, script).words


@pytest.mark.parametrize(("duration", "told"), [(0, False), (2, False), (9, True), (-1, True)])
def test_a_short_pause_is_nobody_s_business(duration: int, told: bool, caplog: pytest.LogCaptureFixture) -> None:
    async def script(azure: AzureMetadata, _: AzureSource, heard: Heard) -> None:
        azure.schedule("Freeze", 900, duration=duration)
        await asyncio.sleep(10)

    assert bool(listen(platform, source, script).words) is told
    assert ("the machine will pause" in caplog.text) is not told
    assert caplog.text.count("the machine will pause") <= 1


def test_preemption_and_maintenance_are_told_and_withdrawn_each_for_itself() -> None:
    async def script(azure: AzureMetadata, _: AzureSource, heard: Heard) -> None:
        azure.schedule("Redeploy", 600)
        reboot = azure.schedule("Reboot", 300)
        preemption = azure.schedule("Preempt", 30)
        await asyncio.sleep(5)
        azure.remove(preemption)
        await asyncio.sleep(5)
        azure.remove(reboot)
        await asyncio.sleep(5)

    heard = listen(platform, source, script)
    assert heard.kinds() == [
        "azure preempt", "azure-maintenance maintenance", "azure withdrawn", "azure-maintenance maintenance"
    ]  # fmt: skip
    deadlines = [word.deadline for _, word in heard.words if isinstance(word, Notice)]
    assert deadlines == pytest.approx([1030, 1300, 1600], abs=1)


def test_a_service_that_takes_two_minutes_to_begin_is_waited_for() -> None:
    async def script(azure: AzureMetadata, _: AzureSource, heard: Heard) -> None:
        await asyncio.sleep(115)
        azure.schedule("Preempt", 30)
        await asyncio.sleep(30)

    heard = listen(lambda: AzureMetadata(wall, switch_on_seconds=120.0), source, script)
    assert heard.kinds()[0] == "azure preempt"
    assert 1120 - 1e-6 <= heard.words[0][0] <= 1120 + 2.5


def test_an_older_document_changes_nothing_unless_the_count_began_anew() -> None:
    asked: list[float] = []

    def stale(request: Request) -> Fault | None:
        if request.path == "/metadata/scheduledevents":
            asked.append(now())
        return Fault(Kind.STALE) if len(asked) % 3 == 0 else None

    async def script(azure: AzureMetadata, _: AzureSource, heard: Heard) -> None:
        await asyncio.sleep(10)
        event = azure.schedule("Reboot", 900)
        await asyncio.sleep(20)
        azure.remove(event)
        await asyncio.sleep(20)

    heard = listen(platform, source, script, stale)
    assert heard.kinds() == ["azure-maintenance maintenance", "azure-maintenance withdrawn"]

    async def restarts(azure: AzureMetadata, _: AzureSource, heard: Heard) -> None:
        for _ in range(3):
            azure.remove(azure.schedule("Freeze", 900))
        await asyncio.sleep(5)
        azure.restart()
        azure.schedule("Preempt", 30)
        await asyncio.sleep(AT_ONCE * ANSWERS_TO_BELIEVE)

    heard = listen(platform, source, restarts)
    assert heard.kinds() == ["azure preempt"]
    assert heard.words[0][0] <= 1005 + AT_ONCE * ANSWERS_TO_BELIEVE


def test_what_is_announced_begins_early_on_demand_but_never_what_concerns_others() -> None:
    async def script(azure: AzureMetadata, listened: AzureSource, heard: Heard) -> None:
        assert await listened.acknowledge() == ()
        both = azure.schedule("Reboot", 900, ["vm-0", "vm-1"])
        await asyncio.sleep(3)
        assert await listened.acknowledge() == ()
        assert await listened.acknowledge(["vm-2"]) == ()
        assert not [request for _, request in heard.requests if request.method == "POST"]
        assert await listened.acknowledge(["VM-1"]) == (both,)
        await asyncio.sleep(3)
        assert await listened.acknowledge(["vm-1"]) == (), "it has begun"
        own = azure.schedule("Preempt", 30)
        await asyncio.sleep(3)
        assert await listened.acknowledge() == (own,)
        await asyncio.sleep(3)

    heard = listen(platform, source, script)
    assert [word.deadline is None for _, word in heard.words if isinstance(word, Notice)] == [False, True, False, True]


def test_an_acknowledgement_that_is_not_heard_is_said_so() -> None:
    async def script(azure: AzureMetadata, listened: AzureSource, heard: Heard) -> None:
        azure.schedule("Preempt", 30)
        await asyncio.sleep(3)
        with pytest.raises(MetadataUnavailable, match="500"):
            await listened.acknowledge()

    listen(
        platform, source, script, lambda request: Fault(Kind.STATUS, status=500) if request.method == "POST" else None
    )  # fmt: skip


def test_the_machine_s_name_is_asked_for_until_it_is_one() -> None:
    bad = iter([Fault(Kind.PORTAL), Fault(Kind.EMPTY), Fault(Kind.STATUS, status=410), Fault(Kind.MALFORMED)])

    async def script(azure: AzureMetadata, _: AzureSource, heard: Heard) -> None:
        azure.schedule("Preempt", 60)
        await asyncio.sleep(30)

    heard = listen(
        platform, source, script, lambda request: next(bad, None) if request.path.endswith("compute") else None
    )  # fmt: skip
    assert heard.kinds() == ["azure preempt"]
    assert heard.words[0][0] < 1006


def test_an_event_that_cannot_be_read_does_not_hide_others_and_withdraws_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Strange(AzureMetadata):
        strange: object = None

        async def answer(self, request: Request) -> Reply:
            reply = await super().answer(request)
            if self.strange is None or not request.path.endswith("events"):
                return reply
            value = json.loads(reply.body)
            value["Events"].append(self.strange)
            return Reply(json.dumps(value).encode(), 200, reply.headers)

    async def script(azure: Strange, _: AzureSource, heard: Heard) -> None:
        event = azure.schedule("Reboot", 900)
        await asyncio.sleep(3)
        azure.strange = {"EventId": "1", "EventType": "Melt", "Resources": ["vm-0"], "EventStatus": "Scheduled"}
        azure.schedule("Preempt", 30)
        await asyncio.sleep(3)
        azure.remove(event)
        await asyncio.sleep(3)
        azure.strange = None
        azure.remove(azure.schedule("Freeze", 900))
        await asyncio.sleep(3)

    heard = listen(lambda: Strange(wall), source, script)
    assert heard.kinds() == ["azure-maintenance maintenance", "azure preempt", "azure-maintenance withdrawn"]
    assert heard.words[2][0] >= 1009
    assert caplog.text.count("an event that cannot be read") == 1


@pytest.mark.parametrize(
    "value", [None, [], {}, {"DocumentIncarnation": "1", "Events": []}, {"DocumentIncarnation": 1, "Events": {}}]
)
def test_what_is_no_document_is_refused(value: object) -> None:
    with pytest.raises(MetadataUnavailable):
        read_document(value)


def test_times_that_cannot_be_read_do_not_matter_to_whether_it_happens() -> None:
    event = {
        "EventId": "1", "EventType": "Preempt", "Resources": ["VM"], "EventStatus": "Scheduled", "NotBefore": "soon",
        "DurationInSeconds": "?",
    }  # fmt: skip
    document = read_document({"DocumentIncarnation": 1, "Events": [event, "x", {**event, "Resources": None}]})
    assert [(read.machines, read.begins, read.seconds) for read in document.events] == [(frozenset({"vm"}), None, None)]
    assert len(document.unread) == 2
