from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class InstanceState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    INSTANCE_STATE_UNSPECIFIED: _ClassVar[InstanceState]
    INSTANCE_STATE_JOINING: _ClassVar[InstanceState]
    INSTANCE_STATE_READY: _ClassVar[InstanceState]
    INSTANCE_STATE_NOTICED: _ClassVar[InstanceState]
    INSTANCE_STATE_DRAINING: _ClassVar[InstanceState]
    INSTANCE_STATE_GONE: _ClassVar[InstanceState]

class PriceClass(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PRICE_CLASS_UNSPECIFIED: _ClassVar[PriceClass]
    PRICE_CLASS_SPOT: _ClassVar[PriceClass]
    PRICE_CLASS_ON_DEMAND: _ClassVar[PriceClass]
INSTANCE_STATE_UNSPECIFIED: InstanceState
INSTANCE_STATE_JOINING: InstanceState
INSTANCE_STATE_READY: InstanceState
INSTANCE_STATE_NOTICED: InstanceState
INSTANCE_STATE_DRAINING: InstanceState
INSTANCE_STATE_GONE: InstanceState
PRICE_CLASS_UNSPECIFIED: PriceClass
PRICE_CLASS_SPOT: PriceClass
PRICE_CLASS_ON_DEMAND: PriceClass

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("recent_only",)
    RECENT_ONLY_FIELD_NUMBER: _ClassVar[int]
    recent_only: bool
    def __init__(self, recent_only: _Optional[bool] = ...) -> None: ...

class PreemptRequest(_message.Message):
    __slots__ = ("instance", "grace_seconds")
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    GRACE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    instance: str
    grace_seconds: float
    def __init__(self, instance: _Optional[str] = ..., grace_seconds: _Optional[float] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("instance",)
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    instance: str
    def __init__(self, instance: _Optional[str] = ...) -> None: ...

class AddRequest(_message.Message):
    __slots__ = ("count",)
    COUNT_FIELD_NUMBER: _ClassVar[int]
    count: int
    def __init__(self, count: _Optional[int] = ...) -> None: ...

class SaveRequest(_message.Message):
    __slots__ = ("directory", "parameters", "state", "seconds")
    DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    directory: str
    parameters: bool
    state: bool
    seconds: float
    def __init__(self, directory: _Optional[str] = ..., parameters: _Optional[bool] = ..., state: _Optional[bool] = ..., seconds: _Optional[float] = ...) -> None: ...

class Saved(_message.Message):
    __slots__ = ("directory", "parameter_bytes", "requests", "sequences", "positions", "kv_bytes", "left_out", "seconds")
    DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    PARAMETER_BYTES_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    LEFT_OUT_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    directory: str
    parameter_bytes: int
    requests: int
    sequences: int
    positions: int
    kv_bytes: int
    left_out: _containers.RepeatedScalarFieldContainer[str]
    seconds: float
    def __init__(self, directory: _Optional[str] = ..., parameter_bytes: _Optional[int] = ..., requests: _Optional[int] = ..., sequences: _Optional[int] = ..., positions: _Optional[int] = ..., kv_bytes: _Optional[int] = ..., left_out: _Optional[_Iterable[str]] = ..., seconds: _Optional[float] = ...) -> None: ...

class FleetStatus(_message.Message):
    __slots__ = ("model", "ready", "draining", "placement", "instances", "replicas", "queued", "requests_running", "requests_finished", "tokens_committed", "reconfigurations", "uptime_seconds", "notices", "capacity", "epoch", "log_problem", "work")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_FIELD_NUMBER: _ClassVar[int]
    INSTANCES_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_RUNNING_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FINISHED_FIELD_NUMBER: _ClassVar[int]
    TOKENS_COMMITTED_FIELD_NUMBER: _ClassVar[int]
    RECONFIGURATIONS_FIELD_NUMBER: _ClassVar[int]
    UPTIME_SECONDS_FIELD_NUMBER: _ClassVar[int]
    NOTICES_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    LOG_PROBLEM_FIELD_NUMBER: _ClassVar[int]
    WORK_FIELD_NUMBER: _ClassVar[int]
    model: str
    ready: bool
    draining: bool
    placement: Placement
    instances: _containers.RepeatedCompositeFieldContainer[InstanceStatus]
    replicas: _containers.RepeatedCompositeFieldContainer[ReplicaStatus]
    queued: int
    requests_running: int
    requests_finished: int
    tokens_committed: int
    reconfigurations: int
    uptime_seconds: float
    notices: _containers.RepeatedCompositeFieldContainer[NoticeRecord]
    capacity: CapacityStatus
    epoch: int
    log_problem: str
    work: Work
    def __init__(self, model: _Optional[str] = ..., ready: _Optional[bool] = ..., draining: _Optional[bool] = ..., placement: _Optional[_Union[Placement, _Mapping]] = ..., instances: _Optional[_Iterable[_Union[InstanceStatus, _Mapping]]] = ..., replicas: _Optional[_Iterable[_Union[ReplicaStatus, _Mapping]]] = ..., queued: _Optional[int] = ..., requests_running: _Optional[int] = ..., requests_finished: _Optional[int] = ..., tokens_committed: _Optional[int] = ..., reconfigurations: _Optional[int] = ..., uptime_seconds: _Optional[float] = ..., notices: _Optional[_Iterable[_Union[NoticeRecord, _Mapping]]] = ..., capacity: _Optional[_Union[CapacityStatus, _Mapping]] = ..., epoch: _Optional[int] = ..., log_problem: _Optional[str] = ..., work: _Optional[_Union[Work, _Mapping]] = ...) -> None: ...

class Work(_message.Message):
    __slots__ = ("prefilled", "queried", "reused", "recomputed", "preempted")
    PREFILLED_FIELD_NUMBER: _ClassVar[int]
    QUERIED_FIELD_NUMBER: _ClassVar[int]
    REUSED_FIELD_NUMBER: _ClassVar[int]
    RECOMPUTED_FIELD_NUMBER: _ClassVar[int]
    PREEMPTED_FIELD_NUMBER: _ClassVar[int]
    prefilled: int
    queried: int
    reused: int
    recomputed: int
    preempted: int
    def __init__(self, prefilled: _Optional[int] = ..., queried: _Optional[int] = ..., reused: _Optional[int] = ..., recomputed: _Optional[int] = ..., preempted: _Optional[int] = ...) -> None: ...

class CapacityStatus(_message.Message):
    __slots__ = ("provider", "wanted", "why", "waiting", "cost_per_hour", "most_per_hour", "spent_today", "most_per_day", "machines", "actions", "on_demand_per_hour", "spent")
    PROVIDER_FIELD_NUMBER: _ClassVar[int]
    WANTED_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    COST_PER_HOUR_FIELD_NUMBER: _ClassVar[int]
    MOST_PER_HOUR_FIELD_NUMBER: _ClassVar[int]
    SPENT_TODAY_FIELD_NUMBER: _ClassVar[int]
    MOST_PER_DAY_FIELD_NUMBER: _ClassVar[int]
    MACHINES_FIELD_NUMBER: _ClassVar[int]
    ACTIONS_FIELD_NUMBER: _ClassVar[int]
    ON_DEMAND_PER_HOUR_FIELD_NUMBER: _ClassVar[int]
    SPENT_FIELD_NUMBER: _ClassVar[int]
    provider: str
    wanted: int
    why: str
    waiting: str
    cost_per_hour: float
    most_per_hour: float
    spent_today: float
    most_per_day: float
    machines: _containers.RepeatedCompositeFieldContainer[MachineStatus]
    actions: _containers.RepeatedCompositeFieldContainer[FleetEvent]
    on_demand_per_hour: float
    spent: float
    def __init__(self, provider: _Optional[str] = ..., wanted: _Optional[int] = ..., why: _Optional[str] = ..., waiting: _Optional[str] = ..., cost_per_hour: _Optional[float] = ..., most_per_hour: _Optional[float] = ..., spent_today: _Optional[float] = ..., most_per_day: _Optional[float] = ..., machines: _Optional[_Iterable[_Union[MachineStatus, _Mapping]]] = ..., actions: _Optional[_Iterable[_Union[FleetEvent, _Mapping]]] = ..., on_demand_per_hour: _Optional[float] = ..., spent: _Optional[float] = ...) -> None: ...

class MachineStatus(_message.Message):
    __slots__ = ("name", "type", "zone", "price_class", "price", "state", "standing")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TYPE_FIELD_NUMBER: _ClassVar[int]
    ZONE_FIELD_NUMBER: _ClassVar[int]
    PRICE_CLASS_FIELD_NUMBER: _ClassVar[int]
    PRICE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    STANDING_FIELD_NUMBER: _ClassVar[int]
    name: str
    type: str
    zone: str
    price_class: PriceClass
    price: float
    state: str
    standing: str
    def __init__(self, name: _Optional[str] = ..., type: _Optional[str] = ..., zone: _Optional[str] = ..., price_class: _Optional[_Union[PriceClass, str]] = ..., price: _Optional[float] = ..., state: _Optional[str] = ..., standing: _Optional[str] = ...) -> None: ...

class NoticeRecord(_message.Message):
    __slots__ = ("source", "given", "withdrawn", "left", "taken", "shortest_seconds", "longest_seconds")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    GIVEN_FIELD_NUMBER: _ClassVar[int]
    WITHDRAWN_FIELD_NUMBER: _ClassVar[int]
    LEFT_FIELD_NUMBER: _ClassVar[int]
    TAKEN_FIELD_NUMBER: _ClassVar[int]
    SHORTEST_SECONDS_FIELD_NUMBER: _ClassVar[int]
    LONGEST_SECONDS_FIELD_NUMBER: _ClassVar[int]
    source: str
    given: int
    withdrawn: int
    left: int
    taken: int
    shortest_seconds: float
    longest_seconds: float
    def __init__(self, source: _Optional[str] = ..., given: _Optional[int] = ..., withdrawn: _Optional[int] = ..., left: _Optional[int] = ..., taken: _Optional[int] = ..., shortest_seconds: _Optional[float] = ..., longest_seconds: _Optional[float] = ...) -> None: ...

class Placement(_message.Message):
    __slots__ = ("epoch", "shape", "layers", "devices")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    shape: MeshShape
    layers: _containers.RepeatedCompositeFieldContainer[LayerRange]
    devices: _containers.RepeatedCompositeFieldContainer[PlacedDevice]
    def __init__(self, epoch: _Optional[int] = ..., shape: _Optional[_Union[MeshShape, _Mapping]] = ..., layers: _Optional[_Iterable[_Union[LayerRange, _Mapping]]] = ..., devices: _Optional[_Iterable[_Union[PlacedDevice, _Mapping]]] = ...) -> None: ...

class MeshShape(_message.Message):
    __slots__ = ("data", "stage", "tensor")
    DATA_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    data: int
    stage: int
    tensor: int
    def __init__(self, data: _Optional[int] = ..., stage: _Optional[int] = ..., tensor: _Optional[int] = ...) -> None: ...

class LayerRange(_message.Message):
    __slots__ = ("start", "stop")
    START_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    start: int
    stop: int
    def __init__(self, start: _Optional[int] = ..., stop: _Optional[int] = ...) -> None: ...

class PlacedDevice(_message.Message):
    __slots__ = ("position", "instance", "index")
    POSITION_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    position: Position
    instance: str
    index: int
    def __init__(self, position: _Optional[_Union[Position, _Mapping]] = ..., instance: _Optional[str] = ..., index: _Optional[int] = ...) -> None: ...

class Position(_message.Message):
    __slots__ = ("data", "stage", "tensor")
    DATA_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    data: int
    stage: int
    tensor: int
    def __init__(self, data: _Optional[int] = ..., stage: _Optional[int] = ..., tensor: _Optional[int] = ...) -> None: ...

class InstanceStatus(_message.Message):
    __slots__ = ("name", "type", "state", "devices", "positions", "zone", "price_class", "address", "advised", "seconds_left")
    class PositionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: Position
        def __init__(self, key: _Optional[int] = ..., value: _Optional[_Union[Position, _Mapping]] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    TYPE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    ZONE_FIELD_NUMBER: _ClassVar[int]
    PRICE_CLASS_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    ADVISED_FIELD_NUMBER: _ClassVar[int]
    SECONDS_LEFT_FIELD_NUMBER: _ClassVar[int]
    name: str
    type: str
    state: InstanceState
    devices: int
    positions: _containers.MessageMap[int, Position]
    zone: str
    price_class: PriceClass
    address: str
    advised: bool
    seconds_left: float
    def __init__(self, name: _Optional[str] = ..., type: _Optional[str] = ..., state: _Optional[_Union[InstanceState, str]] = ..., devices: _Optional[int] = ..., positions: _Optional[_Mapping[int, Position]] = ..., zone: _Optional[str] = ..., price_class: _Optional[_Union[PriceClass, str]] = ..., address: _Optional[str] = ..., advised: _Optional[bool] = ..., seconds_left: _Optional[float] = ...) -> None: ...

class ReplicaStatus(_message.Message):
    __slots__ = ("data", "running", "waiting", "pages_used", "pages_total", "pages_cached", "tokens_prefilled", "tokens_reused")
    DATA_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    PAGES_USED_FIELD_NUMBER: _ClassVar[int]
    PAGES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    PAGES_CACHED_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PREFILLED_FIELD_NUMBER: _ClassVar[int]
    TOKENS_REUSED_FIELD_NUMBER: _ClassVar[int]
    data: int
    running: int
    waiting: int
    pages_used: int
    pages_total: int
    pages_cached: int
    tokens_prefilled: int
    tokens_reused: int
    def __init__(self, data: _Optional[int] = ..., running: _Optional[int] = ..., waiting: _Optional[int] = ..., pages_used: _Optional[int] = ..., pages_total: _Optional[int] = ..., pages_cached: _Optional[int] = ..., tokens_prefilled: _Optional[int] = ..., tokens_reused: _Optional[int] = ...) -> None: ...

class FleetEvent(_message.Message):
    __slots__ = ("time", "kind", "epoch", "message", "fields", "number", "flows")
    class FieldsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Value
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Value, _Mapping]] = ...) -> None: ...
    TIME_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    FIELDS_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    FLOWS_FIELD_NUMBER: _ClassVar[int]
    time: float
    kind: str
    epoch: int
    message: str
    fields: _containers.MessageMap[str, Value]
    number: int
    flows: _containers.RepeatedCompositeFieldContainer[Flow]
    def __init__(self, time: _Optional[float] = ..., kind: _Optional[str] = ..., epoch: _Optional[int] = ..., message: _Optional[str] = ..., fields: _Optional[_Mapping[str, Value]] = ..., number: _Optional[int] = ..., flows: _Optional[_Iterable[_Union[Flow, _Mapping]]] = ...) -> None: ...

class Flow(_message.Message):
    __slots__ = ("source", "target", "bytes")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    source: str
    target: str
    bytes: int
    def __init__(self, source: _Optional[str] = ..., target: _Optional[str] = ..., bytes: _Optional[int] = ...) -> None: ...

class Value(_message.Message):
    __slots__ = ("text", "integer", "number")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    INTEGER_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    text: str
    integer: int
    number: float
    def __init__(self, text: _Optional[str] = ..., integer: _Optional[int] = ..., number: _Optional[float] = ...) -> None: ...

class Reconfiguration(_message.Message):
    __slots__ = ("epoch", "before", "after", "bytes_in_place", "bytes_moved", "bytes_loaded", "precopy_seconds", "pause_seconds", "requests_kept", "requests_recomputed")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    BEFORE_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    BYTES_IN_PLACE_FIELD_NUMBER: _ClassVar[int]
    BYTES_MOVED_FIELD_NUMBER: _ClassVar[int]
    BYTES_LOADED_FIELD_NUMBER: _ClassVar[int]
    PRECOPY_SECONDS_FIELD_NUMBER: _ClassVar[int]
    PAUSE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_KEPT_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_RECOMPUTED_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    before: Placement
    after: Placement
    bytes_in_place: int
    bytes_moved: int
    bytes_loaded: int
    precopy_seconds: float
    pause_seconds: float
    requests_kept: int
    requests_recomputed: int
    def __init__(self, epoch: _Optional[int] = ..., before: _Optional[_Union[Placement, _Mapping]] = ..., after: _Optional[_Union[Placement, _Mapping]] = ..., bytes_in_place: _Optional[int] = ..., bytes_moved: _Optional[int] = ..., bytes_loaded: _Optional[int] = ..., precopy_seconds: _Optional[float] = ..., pause_seconds: _Optional[float] = ..., requests_kept: _Optional[int] = ..., requests_recomputed: _Optional[int] = ...) -> None: ...
