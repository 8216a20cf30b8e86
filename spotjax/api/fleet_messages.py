"""Fleet messages to and from the dataclasses of ``spotjax.fleet.status``. Every ``_to`` is undone by its ``_from``."""

from __future__ import annotations

from spotjax.api.proto.spotjax.v1 import fleet_pb2 as pb
from spotjax.engine.observer import Work
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

STATES = {
    InstanceState.JOINING: pb.INSTANCE_STATE_JOINING,
    InstanceState.READY: pb.INSTANCE_STATE_READY,
    InstanceState.NOTICED: pb.INSTANCE_STATE_NOTICED,
    InstanceState.DRAINING: pb.INSTANCE_STATE_DRAINING,
    InstanceState.GONE: pb.INSTANCE_STATE_GONE,
}
STATES_BACK = {number: state for state, number in STATES.items()}

PRICE_CLASSES: dict[PriceClass, pb.PriceClass] = {
    "spot": pb.PRICE_CLASS_SPOT,
    "on_demand": pb.PRICE_CLASS_ON_DEMAND,
}
PRICE_CLASSES_BACK = {number: price_class for price_class, number in PRICE_CLASSES.items()}

STATUS_FIELDS = (
    "model",
    "ready",
    "draining",
    "queued",
    "requests_running",
    "requests_finished",
    "tokens_committed",
    "reconfigurations",
    "uptime_seconds",
    "epoch",
    "log_problem",
)
WORK_FIELDS = ("prefilled", "queried", "reused", "recomputed", "preempted")
REPLICA_FIELDS = (
    "data",
    "running",
    "waiting",
    "pages_used",
    "pages_total",
    "pages_cached",
    "tokens_prefilled",
    "tokens_reused",
)
RECONFIGURATION_FIELDS = (
    "epoch",
    "bytes_in_place",
    "bytes_moved",
    "bytes_loaded",
    "precopy_seconds",
    "pause_seconds",
    "requests_kept",
    "requests_recomputed",
)
NOTICE_FIELDS = ("source", "given", "withdrawn", "left", "taken", "shortest_seconds", "longest_seconds")
SAVED_FIELDS = ("directory", "parameter_bytes", "requests", "sequences", "positions", "kv_bytes", "seconds")


def placement_to(placement: Placement | None) -> pb.Placement | None:
    """The message for a placement; None stays None."""
    if placement is None:
        return None
    shape = placement.shape
    return pb.Placement(
        epoch=placement.epoch,
        shape=pb.MeshShape(data=shape.data, stage=shape.stage, tensor=shape.tensor),
        layers=[pb.LayerRange(start=start, stop=stop) for start, stop in placement.layers],
        devices=[
            pb.PlacedDevice(
                position=pb.Position(data=at.data, stage=at.stage, tensor=at.tensor),
                instance=placement.devices[at].instance,
                index=placement.devices[at].index,
            )
            for at in shape.positions()
        ],
    )


def position_from(message: pb.Position) -> Position:
    """A place in the mesh."""
    return Position(message.data, message.stage, message.tensor)


def placement_from(message: pb.Placement) -> Placement:
    """The placement that a message carries."""
    return Placement(
        epoch=message.epoch,
        shape=MeshShape(message.shape.data, message.shape.stage, message.shape.tensor),
        layers=tuple((layer.start, layer.stop) for layer in message.layers),
        devices={
            position_from(device.position): DeviceRef(device.instance, device.index) for device in message.devices
        },
    )


def instance_to(instance: InstanceStatus) -> pb.InstanceStatus:
    """The message for one instance."""
    return pb.InstanceStatus(
        name=instance.name,
        type=instance.type,
        state=STATES[instance.state],
        devices=instance.devices,
        positions={
            index: pb.Position(data=data, stage=stage, tensor=tensor)
            for index, (data, stage, tensor) in instance.positions.items()
        },
        zone=instance.zone,
        price_class=PRICE_CLASSES[instance.price_class],
        address=instance.address,
        advised=instance.advised,
        seconds_left=instance.seconds_left,
    )


def instance_from(message: pb.InstanceStatus) -> InstanceStatus:
    """The instance that a message describes."""
    return InstanceStatus(
        name=message.name,
        type=message.type,
        state=STATES_BACK[message.state],
        devices=message.devices,
        positions={index: position_from(position) for index, position in sorted(message.positions.items())},
        zone=message.zone,
        price_class=PRICE_CLASSES_BACK[message.price_class],
        address=message.address,
        advised=message.advised,
        seconds_left=message.seconds_left if message.HasField("seconds_left") else None,
    )


CAPACITY_FIELDS = (
    "provider",
    "wanted",
    "why",
    "waiting",
    "cost_per_hour",
    "most_per_hour",
    "spent_today",
    "most_per_day",
    "on_demand_per_hour",
    "spent",
)
MACHINE_FIELDS = ("name", "type", "zone", "price", "state", "standing")


def capacity_to(capacity: CapacityStatus | None) -> pb.CapacityStatus | None:
    """The message for how a controller comes by its machines; None stays None."""
    if capacity is None:
        return None
    return pb.CapacityStatus(
        **{name: getattr(capacity, name) for name in CAPACITY_FIELDS},
        machines=[
            pb.MachineStatus(
                **{name: getattr(machine, name) for name in MACHINE_FIELDS},
                price_class=PRICE_CLASSES[machine.price_class],
            )
            for machine in capacity.machines
        ],
        actions=map(event_to, capacity.actions),
    )


def capacity_from(message: pb.CapacityStatus) -> CapacityStatus:
    """What a message says of it."""
    return CapacityStatus(
        **{name: getattr(message, name) for name in CAPACITY_FIELDS},
        machines=tuple(
            MachineStatus(
                **{name: getattr(machine, name) for name in MACHINE_FIELDS},
                price_class=PRICE_CLASSES_BACK[machine.price_class],
            )
            for machine in message.machines
        ),
        actions=tuple(map(event_from, message.actions)),
    )


def status_to(status: FleetStatus) -> pb.FleetStatus:
    """The message for a snapshot."""
    return pb.FleetStatus(
        **{name: getattr(status, name) for name in STATUS_FIELDS},
        placement=placement_to(status.placement),
        capacity=capacity_to(status.capacity),
        instances=map(instance_to, status.instances),
        replicas=[
            pb.ReplicaStatus(**{name: getattr(replica, name) for name in REPLICA_FIELDS}) for replica in status.replicas
        ],
        notices=[
            pb.NoticeRecord(**{name: getattr(record, name) for name in NOTICE_FIELDS}) for record in status.notices
        ],
        work=pb.Work(**{name: getattr(status.work, name) for name in WORK_FIELDS}),
    )


def status_from(message: pb.FleetStatus) -> FleetStatus:
    """The snapshot that a message carries."""
    return FleetStatus(
        **{name: getattr(message, name) for name in STATUS_FIELDS},
        placement=placement_from(message.placement) if message.HasField("placement") else None,
        capacity=capacity_from(message.capacity) if message.HasField("capacity") else None,
        instances=tuple(map(instance_from, message.instances)),
        replicas=tuple(
            ReplicaStatus(**{name: getattr(replica, name) for name in REPLICA_FIELDS}) for replica in message.replicas
        ),
        notices=tuple(
            NoticeRecord(**{name: getattr(record, name) for name in NOTICE_FIELDS}) for record in message.notices
        ),
        work=Work(**{name: getattr(message.work, name) for name in WORK_FIELDS}),
    )


def value_to(value: str | int | float) -> pb.Value:
    """The message for one datum of an event."""
    match value:
        case str():
            return pb.Value(text=value)
        case int():
            return pb.Value(integer=value)
    return pb.Value(number=value)


def value_from(message: pb.Value) -> str | int | float:
    """The datum that a message carries."""
    match message.WhichOneof("value"):
        case "text":
            return message.text
        case "integer":
            return message.integer
    return message.number


def event_to(event: FleetEvent) -> pb.FleetEvent:
    """The message for an event."""
    return pb.FleetEvent(
        time=event.time,
        kind=event.kind,
        epoch=event.epoch,
        message=event.message,
        fields={name: value_to(value) for name, value in event.fields.items()},
        number=event.number,
        flows=[pb.Flow(source=flow.source, target=flow.target, bytes=flow.bytes) for flow in event.flows],
    )


def event_from(message: pb.FleetEvent) -> FleetEvent:
    """The event that a message carries."""
    return FleetEvent(
        time=message.time,
        kind=message.kind,
        epoch=message.epoch,
        message=message.message,
        fields={name: value_from(value) for name, value in sorted(message.fields.items())},
        number=message.number,
        flows=tuple(Flow(flow.source, flow.target, flow.bytes) for flow in message.flows),
    )


def reconfiguration_to(report: Reconfiguration) -> pb.Reconfiguration:
    """The message for a report."""
    return pb.Reconfiguration(
        **{name: getattr(report, name) for name in RECONFIGURATION_FIELDS},
        before=placement_to(report.before),
        after=placement_to(report.after),
    )


def reconfiguration_from(message: pb.Reconfiguration) -> Reconfiguration:
    """The report that a message carries."""
    return Reconfiguration(
        **{name: getattr(message, name) for name in RECONFIGURATION_FIELDS},
        before=placement_from(message.before) if message.HasField("before") else None,
        after=placement_from(message.after) if message.HasField("after") else None,
    )


def saved_to(saved: Saved) -> pb.Saved:
    """The message for what was saved."""
    return pb.Saved(**{name: getattr(saved, name) for name in SAVED_FIELDS}, left_out=saved.left_out)


def saved_from(message: pb.Saved) -> Saved:
    """What was saved, as a message carries it."""
    return Saved(**{name: getattr(message, name) for name in SAVED_FIELDS}, left_out=tuple(message.left_out))
