"""The Fleet service over a real connection, before a scripted fleet."""

import grpc
import pytest
from scripted_server import Running

from spotjax.api.fleet_messages import status_from
from spotjax.api.proto.spotjax.v1 import fleet_pb2 as pb
from spotjax.meshes.instance import InstanceState

Code = grpc.StatusCode


async def test_status_shows_the_placement_grid(running: Running) -> None:
    status = await running.fleet.Status(pb.StatusRequest())
    assert status_from(status) == running.service.status()
    assert status.placement.shape == pb.MeshShape(data=2, stage=2, tensor=1)
    assert [(d.instance, d.index) for d in status.placement.devices] == [("i-0", 0), ("i-0", 1), ("i-1", 0), ("i-1", 1)]
    assert status.instances[1].positions[0] == pb.Position(data=1, stage=0, tensor=0)


async def test_preempt_answers_with_what_the_change_did(running: Running) -> None:
    report = await running.fleet.Preempt(pb.PreemptRequest(instance="i-1", grace_seconds=0.5))
    assert (report.before.shape.data, report.after.shape.data, report.epoch) == (2, 1, 2)
    assert report.pause_seconds == 0.25
    report = await running.fleet.Preempt(pb.PreemptRequest(instance="i-0"))
    assert not report.HasField("after")
    status = await running.fleet.Status(pb.StatusRequest())
    assert not status.HasField("placement") and status_from(status) == running.service.status()


async def test_drain_answers_when_the_instance_has_left_and_refuses_the_last_one(running: Running) -> None:
    report = await running.fleet.Drain(pb.DrainRequest(instance="i-1"))
    assert (report.before.shape.data, report.after.shape.data) == (2, 1)
    before = running.service.status()
    assert before.instances[1].state is InstanceState.GONE
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await running.fleet.Drain(pb.DrainRequest(instance="i-0"))
    assert failure.value.code() is Code.FAILED_PRECONDITION
    assert running.service.status() == before


async def test_add_answers_when_the_instances_serve(running: Running) -> None:
    report = await running.fleet.Add(pb.AddRequest(count=1))
    assert report.after.shape.data == 3


async def test_save_answers_with_what_was_saved(running: Running) -> None:
    saved = await running.fleet.Save(pb.SaveRequest(directory="/here", parameters=True))
    assert (saved.directory, saved.parameter_bytes, saved.requests, list(saved.left_out)) == ("/here", 1 << 22, 0, [])
    saved = await running.fleet.Save(pb.SaveRequest(directory="s3://bucket/here", state=True, seconds=3600))
    assert (saved.parameter_bytes, saved.kv_bytes, list(saved.left_out)) == (0, 1 << 20, ["i-1"])
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await running.fleet.Save(pb.SaveRequest(directory="/here", parameters=True))
    assert failure.value.code() is Code.FAILED_PRECONDITION
    assert dict(failure.value.trailing_metadata())["spotjax-error"] == "CheckpointError"


@pytest.mark.parametrize(
    ("method", "request_", "code", "field"),
    [
        ("Preempt", pb.PreemptRequest(), Code.INVALID_ARGUMENT, "instance"),
        ("Preempt", pb.PreemptRequest(instance="i-0", grace_seconds=-1), Code.INVALID_ARGUMENT, "grace_seconds"),
        ("Preempt", pb.PreemptRequest(instance="i-0", grace_seconds=3601), Code.INVALID_ARGUMENT, "grace_seconds"),
        (
            "Preempt",
            pb.PreemptRequest(instance="i-0", grace_seconds=float("nan")),
            Code.INVALID_ARGUMENT,
            "grace_seconds",
        ),
        ("Preempt", pb.PreemptRequest(instance="i-9"), Code.NOT_FOUND, None),
        ("Drain", pb.DrainRequest(), Code.INVALID_ARGUMENT, "instance"),
        ("Drain", pb.DrainRequest(instance="i-9"), Code.NOT_FOUND, None),
        ("Add", pb.AddRequest(), Code.INVALID_ARGUMENT, "count"),
        ("Add", pb.AddRequest(count=1025), Code.INVALID_ARGUMENT, "count"),
        ("Add", pb.AddRequest(count=2), Code.FAILED_PRECONDITION, None),
        ("Save", pb.SaveRequest(parameters=True), Code.INVALID_ARGUMENT, "directory"),
        ("Save", pb.SaveRequest(directory="here", parameters=True), Code.INVALID_ARGUMENT, "directory"),
        ("Save", pb.SaveRequest(directory="/here"), Code.INVALID_ARGUMENT, "parameters"),
        ("Save", pb.SaveRequest(directory="/here", state=True), Code.INVALID_ARGUMENT, "seconds"),
        ("Save", pb.SaveRequest(directory="/here", state=True, seconds=3601), Code.INVALID_ARGUMENT, "seconds"),
        ("Save", pb.SaveRequest(directory="/here", state=True, seconds=float("nan")), Code.INVALID_ARGUMENT, "seconds"),
    ],
)
async def test_what_cannot_be_done_is_refused(
    running: Running, method: str, request_: object, code: grpc.StatusCode, field: str | None
) -> None:
    before = running.service.status()
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await getattr(running.fleet, method)(request_)
    assert failure.value.code() is code
    assert dict(failure.value.trailing_metadata()).get("spotjax-field") == field
    assert running.service.status() == before


async def test_watch_streams_recent_and_new_events_until_the_service_stops(running: Running) -> None:
    call = running.fleet.Watch(pb.WatchRequest())
    assert (await call.read()).kind == "ready"
    await running.service.preempt("i-0", 2.0)
    lost = await call.read()
    assert lost.fields["instance"].text == "i-0" and lost.fields["seconds"].number == 2.0
    await running.service.stop()
    assert (await call.read()).kind == "switch"
    assert await call.read() is grpc.aio.EOF


async def test_watch_ends_after_the_recent_events_if_asked(running: Running) -> None:
    await running.service.preempt("i-0", 2.0)
    kinds = [event.kind async for event in running.fleet.Watch(pb.WatchRequest(recent_only=True))]
    assert kinds == ["ready", "lost", "switch"]
