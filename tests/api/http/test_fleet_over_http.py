"""The fleet over HTTP: the same as over gRPC, as JSON; events that a client takes up where it was."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import msgspec
import pytest
from scripted_server import MODEL, Steps, until

from spotjax.api.backend import Backend
from spotjax.api.http.app import application
from spotjax.api.http.server import HttpServer
from spotjax.api.plain import plain
from spotjax.api.proto.spotjax.v1 import fleet_pb2 as pb
from spotjax.meshes.instance import InstanceState
from spotjax.testing.scripted_service import ScriptedService


@pytest.fixture
async def service() -> AsyncIterator[ScriptedService]:
    service = ScriptedService(delay=Steps())
    yield service
    await service.stop()


@pytest.fixture
async def client(service: ScriptedService) -> AsyncIterator[httpx.AsyncClient]:
    backend = Backend()
    backend.service, backend.model = service, MODEL
    server = HttpServer(application(backend))
    port = await server.start("127.0.0.1:0")
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        yield client
    await server.stop()


async def events_of(client: httpx.AsyncClient, count: int, last: str | None = None) -> list[tuple[str, Any]]:
    """The ids and data of so many events."""
    found: list[tuple[str, Any]] = []
    name = ""
    async with client.stream("GET", "/fleet/events", headers={"Last-Event-ID": last} if last else {}) as stream:
        assert stream.headers["content-type"] == "text/event-stream; charset=utf-8"
        async for line in stream.aiter_lines():
            field, _, value = line.partition(": ")
            if field == "id":
                name = value
            elif field == "data":
                found.append((name, json.loads(value)))
                if len(found) == count:
                    return found
    return found


async def test_status_has_what_grpc_has_under_the_same_names(
    client: httpx.AsyncClient, service: ScriptedService
) -> None:
    answer = await client.get("/fleet/status")
    assert answer.headers["cache-control"] == "no-store"
    status = answer.json()
    assert status == msgspec.json.decode(msgspec.json.encode(plain(service.status())))
    assert status.keys() >= {field.name for field in pb.FleetStatus.DESCRIPTOR.fields}
    assert status["instances"][1]["positions"] == {"0": [1, 0, 0], "1": [1, 1, 0]}
    assert status["instances"][0].keys() == {field.name for field in pb.InstanceStatus.DESCRIPTOR.fields}
    assert (status["placement"]["shape"], status["instances"][0]["state"]) == ("2x2x1", "ready")


async def test_events_have_ids_and_a_client_that_comes_back_misses_nothing(
    client: httpx.AsyncClient, service: ScriptedService
) -> None:
    ((first, ready),) = await events_of(client, 1)
    assert ready.keys() == {field.name for field in pb.FleetEvent.DESCRIPTOR.fields}
    await service.preempt("i-0", 2.0)
    later = await events_of(client, 2, first)
    assert [event["kind"] for _, event in later] == ["lost", "switch"]
    assert [event["number"] for _, event in later] == [2, 3]
    assert [name.rpartition("-")[2] for name, _ in later] == ["2", "3"]
    assert (await events_of(client, 3, "0badf00d-2"))[0] == (first, ready), (
        "an id of another process counts for nothing"
    )
    assert len(await events_of(client, 3, "-".join([first.partition("-")[0], "9" * 5000]))) == 3


async def test_a_stream_of_events_goes_on_as_they_happen_and_ends_with_the_service(
    client: httpx.AsyncClient, service: ScriptedService
) -> None:
    following = asyncio.create_task(events_of(client, 100))
    await service.preempt("i-0", 2.0)
    await service.add(1)
    await service.stop()
    assert [event["kind"] for _, event in await following] == ["ready", "lost", "switch", "joined", "switch"]


async def test_a_client_that_leaves_a_stream_leaves_nothing_behind(client: httpx.AsyncClient) -> None:
    tasks = len(asyncio.all_tasks())
    await events_of(client, 1)
    await until(lambda: len(asyncio.all_tasks()) == tasks)


async def test_what_changes_the_fleet_answers_with_what_it_did(
    client: httpx.AsyncClient, service: ScriptedService
) -> None:
    report = (await client.post("/fleet/preempt", json={"instance": "i-1", "grace_seconds": 0.5})).json()
    assert (report["before"]["shape"], report["after"]["shape"], report["pause_seconds"]) == ("2x2x1", "1x2x1", 0.25)
    assert report.keys() == {field.name for field in pb.Reconfiguration.DESCRIPTOR.fields}
    assert (await client.post("/fleet/add", json={"count": 1})).json()["after"]["shape"] == "2x2x1"
    assert (await client.post("/fleet/release", json={"instance": "i-0"})).json()["after"]["shape"] == "1x2x1"
    assert service.status().instances[0].state is InstanceState.GONE


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("preempt", {}, 400, "instance"),
        ("preempt", {"instance": "i-0", "grace_seconds": -1}, 400, "grace_seconds"),
        ("preempt", {"instance": "i-0", "grace_seconds": "NaN"}, 400, "body"),
        ("preempt", {"instance": "i-0", "grace": 1}, 400, "body"),
        ("preempt", {"instance": 1}, 400, "body"),
        ("preempt", [], 400, "body"),
        ("preempt", {"instance": "i-9"}, 404, None),
        ("release", {}, 400, "instance"),
        ("release", {"instance": "i-9"}, 404, None),
        ("add", {}, 400, "count"),
        ("add", {"count": 1025}, 400, "count"),
        ("add", {"count": -1}, 400, "body"),
        ("add", {"count": 1.5}, 400, "body"),
        ("add", {"count": 2}, 409, None),
    ],
)
async def test_what_cannot_be_done_is_refused(
    client: httpx.AsyncClient, service: ScriptedService, path: str, body: object, status: int, param: str | None
) -> None:
    before = service.status()
    answer = await client.post(f"/fleet/{path}", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)
    assert service.status() == before


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 10_000, b'{"instance": "i-0"} x'])
async def test_a_body_that_is_no_json_is_refused(client: httpx.AsyncClient, content: bytes) -> None:
    answer = await client.post("/fleet/preempt", content=content, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "body")


async def test_what_a_form_of_any_site_can_send_is_refused(client: httpx.AsyncClient, service: ScriptedService) -> None:
    before = service.status()
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        content = b'{"instance": "i-0"}'
        answer = await client.post("/fleet/preempt", content=content, headers={"Content-Type": kind})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "body")
    assert (await client.get("/fleet/preempt")).status_code == 405
    assert service.status() == before
