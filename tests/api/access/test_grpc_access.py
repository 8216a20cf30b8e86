"""Callers over gRPC: who is let in, what each may do, and whose requests are whose."""

import grpc
import pytest
from access_cases import as_caller, failure, guarded
from grpc_health.v1 import health_pb2, health_pb2_grpc
from scripted_server import Running, until

from spotjax.api.proto.spotjax.v1 import fleet_pb2, generation_pb2
from spotjax.errors import LogUnavailable

pb = generation_pb2
NOT_FOUND = grpc.StatusCode.NOT_FOUND


def asked(request_id: str, max_tokens: int = 4, resumable: bool = True) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        text="hello", request_id=request_id, resumable=resumable, sampling=pb.Sampling(max_tokens=max_tokens, seed=1)
    )


async def generated(running: Running, caller: str, request_id: str) -> int:
    """Tokens of a whole request."""
    stream = running.generation.Generate(asked(request_id), metadata=as_caller(caller))
    return sum([len(response.token_ids) async for response in stream])


@pytest.mark.parametrize(
    "metadata",
    [
        (),
        (("authorization", "Bearer nobody"),),
        (("authorization", "Basic YW5u"),),
        (("authorization", "Bearer"),),
        (("authorization", "Bearer ann"), ("authorization", "Bearer root")),
    ],
)
async def test_a_call_without_one_valid_key_is_unauthenticated(metadata: tuple[tuple[str, str], ...]) -> None:
    async with guarded() as running:
        for call in (
            lambda: running.generation.Models(pb.ModelsRequest(), metadata=metadata),
            lambda: running.generation.Generate(asked("r"), metadata=metadata),
            lambda: running.fleet.Preempt(fleet_pb2.PreemptRequest(instance="i-0"), metadata=metadata),
        ):
            error = await failure(call)
            assert error.code() is grpc.StatusCode.UNAUTHENTICATED
            assert ("spotjax-error", "Unauthenticated") in tuple(error.trailing_metadata() or ())
        assert not running.service.requests


async def test_health_is_open_and_reflection_takes_a_key() -> None:
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    async with guarded() as running:
        health = health_pb2_grpc.HealthStub(running.channel)
        answer = await health.Check(health_pb2.HealthCheckRequest(service="liveness"))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        stub = reflection_pb2_grpc.ServerReflectionStub(running.channel)
        asking = [reflection_pb2.ServerReflectionRequest(list_services="")]
        error = await failure(lambda: stub.ServerReflectionInfo(iter(asking)))
        assert error.code() is grpc.StatusCode.UNAUTHENTICATED
        answers = [a async for a in stub.ServerReflectionInfo(iter(asking), metadata=as_caller("ann"))]
        assert answers[0].list_services_response.service


@pytest.mark.parametrize(
    ("caller", "generates", "watches", "operates"),
    [("ann", True, False, False), ("eve", False, True, False), ("root", True, True, True)],
)
async def test_a_role_has_its_rights_and_no_others(caller: str, generates: bool, watches: bool, operates: bool) -> None:
    async with guarded() as running:
        running.steps.let_all()
        metadata = as_caller(caller)
        calls = {
            lambda: running.generation.Generate(asked("one"), metadata=metadata): generates,
            lambda: running.generation.Cancel(pb.CancelRequest(request_id="none"), metadata=metadata): generates,
            lambda: running.fleet.Status(fleet_pb2.StatusRequest(), metadata=metadata): watches,
            lambda: running.fleet.Watch(fleet_pb2.WatchRequest(recent_only=True), metadata=metadata): watches,
            lambda: running.fleet.Add(fleet_pb2.AddRequest(count=1), metadata=metadata): operates,
            lambda: running.fleet.Drain(fleet_pb2.DrainRequest(instance="x"), metadata=metadata): operates,
            lambda: running.fleet.Preempt(fleet_pb2.PreemptRequest(instance="x"), metadata=metadata): operates,
            lambda: running.fleet.Save(fleet_pb2.SaveRequest(directory="x"), metadata=metadata): operates,
        }
        for call, allowed in calls.items():
            try:
                code = (await failure(call)).code()
            except AssertionError:
                code = grpc.StatusCode.OK
            assert (code is not grpc.StatusCode.PERMISSION_DENIED) is allowed


async def test_the_requests_of_others_are_not_there() -> None:
    async with guarded() as running:
        running.steps.let_all()
        assert await generated(running, "ann", "anns") == 4
        resume = pb.ResumeRequest(request_id="anns", offsets=[0])
        unknown = pb.ResumeRequest(request_id="none", offsets=[0])
        foreign = await failure(lambda: running.generation.Resume(resume, metadata=as_caller("bob")))
        missing = await failure(lambda: running.generation.Resume(unknown, metadata=as_caller("bob")))
        assert foreign.code() is missing.code() is NOT_FOUND
        assert str(foreign.details()).replace("anns", "none") == missing.details()
        cancel = pb.CancelRequest(request_id="anns")
        error = await failure(lambda: running.generation.Cancel(cancel, metadata=as_caller("bob")))
        assert error.code() is NOT_FOUND
        for caller in ("ann", "root"):
            answers = [a async for a in running.generation.Resume(resume, metadata=as_caller(caller))]
            assert sum(len(answer.token_ids) for answer in answers) == 4


async def test_requests_belong_to_their_callers_after_another_server_took_over_the_log() -> None:
    async with guarded() as running:
        running.steps.let_all()
        await generated(running, "ann", "anns")
        log = tuple(running.service.requests.values())
    async with guarded(log) as running:
        resume = pb.ResumeRequest(request_id="anns", offsets=[0])
        error = await failure(lambda: running.generation.Resume(resume, metadata=as_caller("bob")))
        assert error.code() is NOT_FOUND
        assert [a async for a in running.generation.Resume(resume, metadata=as_caller("ann"))]


async def test_concurrent_requests_count_until_they_end_even_when_nobody_reads_them() -> None:
    async with guarded() as running:
        first = running.generation.Generate(asked("first"), metadata=as_caller("busy"))
        await first.initial_metadata()
        first.cancel()  # it is resumable, so it goes on
        error = await failure(lambda: running.generation.Generate(asked("second"), metadata=as_caller("busy")))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert ("retry-after-seconds", "1") in tuple(error.trailing_metadata() or ())
        other = running.generation.Generate(asked("others"), metadata=as_caller("ann"))
        await other.initial_metadata()
        running.steps.let_all()
        await until(lambda: running.service.requests["first"].finished)
        assert await generated(running, "busy", "third") == 4


async def test_a_request_that_is_sent_again_is_told_that_it_exists_not_that_the_limit_is_used_up() -> None:
    async with guarded() as running:
        running.steps.let_all()
        for name in ("one", "two"):
            await generated(running, "brief", name)
        again = await failure(lambda: running.generation.Generate(asked("two"), metadata=as_caller("brief")))
        assert again.code() is grpc.StatusCode.ALREADY_EXISTS
        more = await failure(lambda: running.generation.Generate(asked("three"), metadata=as_caller("brief")))
        assert more.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert float(dict(more.trailing_metadata() or ())["retry-after-seconds"]) == pytest.approx(30, abs=1)


async def test_a_request_that_was_not_accepted_costs_nothing() -> None:
    async with guarded() as running:
        running.steps.let_all()
        running.service.overloaded = True
        for _ in range(5):
            error = await failure(lambda: running.generation.Generate(asked("one"), metadata=as_caller("brief")))
            assert ("spotjax-error", "Overloaded") in tuple(error.trailing_metadata() or ())
        running.service.overloaded = False
        assert await generated(running, "brief", "one") == 4


async def test_a_request_that_could_not_be_recorded_costs_nothing() -> None:
    async def full() -> None:
        raise LogUnavailable("the disk is full")

    async with guarded() as running:
        running.steps.let_all()
        running.service._record = full
        for _ in range(5):
            error = await failure(lambda: running.generation.Generate(asked("one"), metadata=as_caller("brief")))
            assert ("spotjax-error", "LogUnavailable") in tuple(error.trailing_metadata() or ())
        running.service._record = None
        assert await generated(running, "brief", "one") == 4


async def test_a_model_that_a_caller_may_not_use_is_not_listed_and_not_served() -> None:
    async with guarded() as running:
        metadata = as_caller("elsewhere")
        assert not (await running.generation.Models(pb.ModelsRequest(), metadata=metadata)).models
        error = await failure(lambda: running.generation.Generate(asked("one"), metadata=metadata))
        assert error.code() is grpc.StatusCode.PERMISSION_DENIED
