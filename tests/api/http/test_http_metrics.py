"""``/metrics``: there from the first moment, in the format that the scraper asks for."""

from collections.abc import AsyncIterator

import httpx
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse
from scripted_server import MODEL

from spotjax.api.backend import Backend
from spotjax.api.http.app import application
from spotjax.api.http.server import HttpServer
from spotjax.engine.generation import GenerationRequest
from spotjax.engine.request import RequestState, SamplingParams
from spotjax.telemetry.server_telemetry import ServerTelemetry
from spotjax.testing.scripted_service import ScriptedService

OPENMETRICS = "application/openmetrics-text; version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"


@pytest.fixture
def backend() -> Backend:
    return Backend()


@pytest.fixture
def telemetry(backend: Backend) -> ServerTelemetry:
    return ServerTelemetry(backend.status)


@pytest.fixture
async def client(backend: Backend, telemetry: ServerTelemetry) -> AsyncIterator[httpx.AsyncClient]:
    server = HttpServer(application(backend, registry=telemetry.registry))
    port = await server.start("127.0.0.1:0")
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        yield client
    await server.stop()


def values(text: str) -> dict[str, float]:
    return {sample.name: sample.value for family in parse(text) for sample in family.samples if not sample.labels}


async def test_a_server_without_a_model_yet_can_be_scraped(client: httpx.AsyncClient) -> None:
    answer = await client.get("/metrics")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    scraped = values(answer.text)
    assert scraped["spotjax_ready"] == 0
    assert scraped["process_resident_memory_bytes"] > 0


async def test_it_shows_the_service_once_there_is_one(client: httpx.AsyncClient, backend: Backend) -> None:
    service = ScriptedService()
    backend.attach(service, MODEL)
    scraped = values((await client.get("/metrics")).text)
    assert (scraped["spotjax_ready"], scraped["spotjax_requests_running"]) == (1, 0)
    service.ready = False
    assert values((await client.get("/metrics")).text)["spotjax_ready"] == 0
    await service.stop()


async def test_openmetrics_is_given_to_who_asks_for_it(client: httpx.AsyncClient) -> None:
    answer = await client.get("/metrics", headers={"Accept": OPENMETRICS})
    assert answer.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    families = {family.name: family for family in parse_openmetrics(answer.text)}
    assert families["spotjax_generation_tokens"].type == "counter"


async def test_servers_of_one_process_count_apart(client: httpx.AsyncClient, telemetry: ServerTelemetry) -> None:
    other = ServerTelemetry(lambda: None)
    for told in (telemetry, other):
        told.recorder.arrived(GenerationRequest("a", (1, 2), SamplingParams()), 0.0)
    telemetry.recorder.committed([RequestState("a", 0, (1, 2), SamplingParams(), tokens=(5,))], 0.5)
    assert values((await client.get("/metrics")).text)["spotjax_generation_tokens_total"] == 1
    assert other.recorder.generation_tokens == 0
