"""Nothing is lost between dataclasses and messages, and the checked-in stubs are those of the protos."""

from typing import get_args

from hypothesis import given
from hypothesis import strategies as st

from spotjax.api.errors import STATUS, status_of
from spotjax.api.fleet_messages import (
    event_from,
    event_to,
    reconfiguration_from,
    reconfiguration_to,
    saved_from,
    saved_to,
    status_from,
    status_to,
)
from spotjax.api.generation_messages import delta_from, delta_to
from spotjax.api.proto.spotjax.v1 import fleet_pb2, generation_pb2
from spotjax.engine.generation import Delta, Usage
from spotjax.engine.observer import Work
from spotjax.engine.request import FinishReason, Logprobs
from spotjax.errors import PlanError, SpotjaxError
from spotjax.fleet.notices.intervals import NoticeRecord
from spotjax.fleet.status import (
    CapacityStatus,
    FleetEvent,
    FleetStatus,
    Flow,
    InstanceStatus,
    MachineStatus,
    Reconfiguration,
    ReplicaStatus,
    Saved,
)
from spotjax.meshes.instance import DeviceRef, InstanceState, PriceClass
from spotjax.meshes.placement import Placement
from spotjax.meshes.shape import MeshShape, Position
from spotjax.tools.generate_protos import outdated

count = st.integers(0, 2**32 - 1)
number = st.floats(allow_nan=False)
names = st.text(max_size=5)


@st.composite
def placements(draw: st.DrawFn) -> Placement:
    degree = st.integers(1, 3)
    shape = MeshShape(draw(degree), draw(degree), draw(degree))
    devices = draw(st.permutations([DeviceRef(f"i-{i}", i % 2) for i in range(shape.devices)]))
    layers = tuple((stage, stage + 1) for stage in range(shape.stage))
    return Placement(draw(count), shape, layers, dict(zip(shape.positions(), devices, strict=True)))


logprobs = st.builds(Logprobs, number, st.lists(st.tuples(count, number), max_size=2).map(tuple))
deltas = st.builds(
    Delta,
    request_id=names,
    choice=count,
    offset=count,
    tokens=st.lists(count).map(tuple),
    text=st.text(),
    logprobs=st.lists(logprobs, max_size=2).map(tuple),
    finish=st.none() | st.sampled_from(FinishReason),
    usage=st.none() | st.builds(Usage, count, count),
)
positions = st.dictionaries(count, st.builds(Position, count, count, count), max_size=3)
price_classes = st.sampled_from(get_args(PriceClass))
instances = st.builds(
    InstanceStatus, names, names, st.sampled_from(InstanceState), count, positions, names, price_classes, names,
    st.booleans(), st.none() | number,
)  # fmt: skip
events = st.builds(
    FleetEvent, number, names, count, names, st.dictionaries(names, names | st.integers(-(2**63), 2**63 - 1) | number),
    count, st.lists(st.builds(Flow, names, names, count), max_size=2).map(tuple),
)  # fmt: skip
machines = st.builds(MachineStatus, names, names, names, price_classes, number, names, names)
capacities = st.builds(
    CapacityStatus, names, count, names, names, number, number, number, number,
    st.lists(machines, max_size=2).map(tuple), st.lists(events, max_size=2).map(tuple), number, number,
)  # fmt: skip
records = st.builds(NoticeRecord, names, count, count, count, count, number, number)
statuses = st.builds(
    FleetStatus,
    model=names,
    placement=st.none() | placements(),
    instances=st.lists(instances, max_size=2).map(tuple),
    replicas=st.lists(st.builds(ReplicaStatus, count, count, count, count, count), max_size=2).map(tuple),
    queued=count,
    requests_running=count,
    requests_finished=count,
    tokens_committed=count,
    reconfigurations=count,
    uptime_seconds=number,
    notices=st.lists(records, max_size=2).map(tuple),
    capacity=st.none() | capacities,
    epoch=count,
    log_problem=names,
    work=st.builds(Work, count, count, count, count, count),
)
reports = st.builds(
    Reconfiguration,
    epoch=count,
    before=st.none() | placements(),
    after=st.none() | placements(),
    bytes_in_place=count,
    bytes_moved=count,
    bytes_loaded=count,
    precopy_seconds=number,
    pause_seconds=number,
    requests_kept=count,
    requests_recomputed=count,
)


@given(deltas)
def test_a_delta_crosses_the_wire_unchanged(delta: Delta) -> None:
    assert delta_from(generation_pb2.GenerateResponse.FromString(delta_to(delta).SerializeToString())) == delta


@given(statuses)
def test_a_status_crosses_the_wire_unchanged(status: FleetStatus) -> None:
    assert status_from(fleet_pb2.FleetStatus.FromString(status_to(status).SerializeToString())) == status


@given(events)
def test_an_event_crosses_the_wire_unchanged(event: FleetEvent) -> None:
    assert event_from(fleet_pb2.FleetEvent.FromString(event_to(event).SerializeToString())) == event


@given(reports)
def test_a_reconfiguration_report_crosses_the_wire_unchanged(report: Reconfiguration) -> None:
    message = fleet_pb2.Reconfiguration.FromString(reconfiguration_to(report).SerializeToString())
    assert reconfiguration_from(message) == report


@given(st.builds(Saved, names, count, count, count, count, count, st.lists(names, max_size=3).map(tuple), number))
def test_what_was_saved_crosses_the_wire_unchanged(saved: Saved) -> None:
    assert saved_from(fleet_pb2.Saved.FromString(saved_to(saved).SerializeToString())) == saved


def test_the_checked_in_stubs_are_current() -> None:
    assert outdated() == []


def test_next_id_comments_are_right_and_every_message_has_one() -> None:
    """The comment before a message names the number that the next new field gets."""
    import re

    from spotjax.tools.generate_protos import PROTOS, ROOT

    paths = sorted((ROOT / PROTOS).glob("*.proto"))
    assert [path.stem for path in paths] == ["fleet", "generation"]
    for path in paths:
        wanted: int | None = None
        open_blocks: list[tuple[str, int | None, int]] = []
        for line in path.read_text().splitlines():
            if found := re.match(r"\s*// Next ID: (\d+)", line):
                wanted = int(found[1])
            elif found := re.match(r"\s*(message|enum|oneof|service) (\w+) {", line):
                if line.endswith("{}"):
                    assert wanted == 1, (path.name, line)
                    wanted = None
                    continue
                open_blocks.append((line, wanted, 0))
                assert found[1] in ("oneof", "service") or wanted is not None, (path.name, line)
                wanted = None
            elif found := re.match(r"\s*[\w<>, ]+ = (\d+);", line):
                depth = -2 if "oneof" in open_blocks[-1][0] else -1
                kind, next_id, highest = open_blocks[depth]
                open_blocks[depth] = (kind, next_id, max(highest, int(found[1])))
            elif line.strip() == "}":
                kind, next_id, highest = open_blocks.pop()
                if "oneof" not in kind and "service" not in kind:
                    assert next_id == highest + 1, (path.name, kind)


def test_an_error_class_without_a_status_of_its_own_has_that_of_its_nearest_ancestor() -> None:
    import grpc

    class Special(next(iter(STATUS))):  # type: ignore[misc]
        def __init__(self) -> None:
            SpotjaxError.__init__(self)

    assert status_of(Special()) is STATUS[next(iter(STATUS))]
    assert status_of(PlanError("x")) is grpc.StatusCode.INTERNAL
