"""What orchestrators and tools see of a server: health over its life, and its services by reflection."""

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from scripted_server import MODEL, Running, until

from spotjax.api.proto.spotjax.v1 import fleet_pb2, fleet_pb2_grpc, generation_pb2, generation_pb2_grpc
from spotjax.api.server import ApiServer
from spotjax.errors import ConfigError
from spotjax.testing.scripted_service import ScriptedService

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def health(channel: grpc.aio.Channel, service: str) -> int:
    stub = health_pb2_grpc.HealthStub(channel)
    return (await stub.Check(health_pb2.HealthCheckRequest(service=service))).status  # type: ignore[attr-defined]


@pytest.mark.parametrize("service", ["readiness", "spotjax.v1.Generation"])
async def test_readiness_follows_the_service_and_liveness_does_not(running: Running, service: str) -> None:
    watch = health_pb2_grpc.HealthStub(running.channel).Watch(health_pb2.HealthCheckRequest(service=service))
    assert (await watch.read()).status == SERVING
    running.service.ready = False
    assert (await watch.read()).status == NOT_SERVING
    running.service.ready = True
    assert (await watch.read()).status == SERVING
    running.service.ready = False
    assert (await watch.read()).status == NOT_SERVING
    for alive in ("", "liveness"):
        assert await health(running.channel, alive) == SERVING


async def test_readiness_ends_at_once_when_draining_starts(running: Running) -> None:
    call = running.generation.Generate(generation_pb2.GenerateRequest(text="x", request_id="r"))
    await call.initial_metadata()
    watch = health_pb2_grpc.HealthStub(running.channel).Watch(health_pb2.HealthCheckRequest(service="readiness"))
    assert (await watch.read()).status == SERVING
    assert not await running.server.drain(0.01)
    assert (await watch.read()).status == NOT_SERVING
    running.steps.let_all()
    assert await running.server.drain(5)
    responses = [response async for response in call]
    assert responses[-1].finish_reason == generation_pb2.FINISH_REASON_LENGTH


async def test_a_server_without_its_model_is_alive_but_serves_nothing() -> None:
    server = ApiServer()
    port = await server.start("127.0.0.1:0")
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        assert await health(channel, "liveness") == SERVING
        assert await health(channel, "readiness") == NOT_SERVING
        generation, fleet = generation_pb2_grpc.GenerationStub(channel), fleet_pb2_grpc.FleetStub(channel)
        for call in (
            generation.Models(generation_pb2.ModelsRequest()),
            generation.Generate(generation_pb2.GenerateRequest(text="x")).read(),
            fleet.Status(fleet_pb2.StatusRequest()),
        ):
            with pytest.raises(grpc.aio.AioRpcError, match="starting") as failure:
                await call
            assert failure.value.code() is grpc.StatusCode.UNAVAILABLE
        service = ScriptedService()
        await server.attach(service, MODEL)
        assert await health(channel, "readiness") == SERVING
        assert (await fleet.Status(fleet_pb2.StatusRequest())).ready
        await service.stop()
    assert await server.drain(0)
    await server.stop()


async def test_an_address_in_use_is_a_clear_error(running: Running) -> None:
    second = ApiServer()
    with pytest.raises(ConfigError, match=f"cannot listen on {running.address}"):
        await second.start(running.address)
    await second.stop()


async def test_reflection_lists_all_services(running: Running) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(running.channel)
    ask = reflection_pb2.ServerReflectionRequest(list_services="")
    call = stub.ServerReflectionInfo(iter([ask]))  # type: ignore[attr-defined]
    answer = await call.read()
    assert {service.name for service in answer.list_services_response.service} == {
        "spotjax.v1.Generation",
        "spotjax.v1.Fleet",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }


async def test_a_client_that_leaves_ends_its_watch(running: Running) -> None:
    call = running.fleet.Watch(fleet_pb2.WatchRequest())
    assert (await call.read()).kind == "ready"
    call.cancel()
    await until(call.done)
    assert (await running.fleet.Status(fleet_pb2.StatusRequest())).ready
