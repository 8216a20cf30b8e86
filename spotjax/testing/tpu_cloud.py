"""What Cloud TPU does with queued resources and nodes, as far as its documents say, in memory and on a given clock.

Owns their lives, capacity and quota; speaks no protocol (``tpu_service`` does). Harsher than the documents where they
are silent: a request that is being made or suspended cannot be deleted, and one that has ended counts for the quota.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import grpc
from google.cloud.tpu_v2 import (
    AcceleratorConfig,
    CreateNodeRequest,
    CreateQueuedResourceRequest,
    Node,
    OperationMetadata,
    QueuedResource,
    QueuedResourceState,
)
from google.longrunning.operations_pb2 import Operation
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message
from google.rpc.status_pb2 import Status

ID = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")
PARENT = re.compile(r"projects/[a-z][a-z0-9-]*/locations/[a-z0-9-]+")
STATE = QueuedResourceState.State
INITIATOR = QueuedResourceState.StateInitiator
CHIPS = {
    AcceleratorConfig.Type.V4: "v4",
    AcceleratorConfig.Type.V5LITE_POD: "v5litepod",
    AcceleratorConfig.Type.V5P: "v5p",
    AcceleratorConfig.Type.V6E: "v6e",
}


class Refused(Exception):
    """The service's answer is an error."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass
class TpuCloud:
    """One account.

    Attributes:
      capacity: slices that there are, by zone and accelerator type; what is not here does not exist.
      clock: seconds.
      step: seconds from one state to the next; a slice passes through six until it is ready.
      strict: a request that is being made or suspended cannot be deleted; the documents do not say so.
      quota: requests in a zone, spot ones and guaranteed ones each.
      failing: how the next requests that leave the queue end, first one first.
      rejecting: errors of the next requests that are looked at, which then vanish.
    """

    capacity: dict[tuple[str, str], int]
    clock: Callable[[], float]
    step: float = 0.0
    strict: bool = True
    quota: int = 1000
    failing: list[Status] = field(default_factory=list)
    rejecting: list[Status] = field(default_factory=list)
    requests: dict[str, QueuedResource] = field(default_factory=dict)
    nodes: dict[str, Node] = field(default_factory=dict)
    operations: dict[str, Operation] = field(default_factory=dict)
    _since: dict[str, float] = field(default_factory=dict)
    _open: dict[str, list[str]] = field(default_factory=dict)
    """Operations that end when their resource has come to rest, by its name."""

    def advance(self) -> None:
        """Lets pass what time has come for, one state at a time."""
        for name in (*self.nodes, *self.requests):
            if self.clock() >= self._since.get(name, 0.0) + self.step:
                if name in self.nodes:
                    self._advance_node(self.nodes[name])
                elif name in self.requests:
                    self._advance_request(self.requests[name])

    def create_queued_resource(self, request: CreateQueuedResourceRequest) -> Operation:
        """Puts a request into the queue."""
        self._require_parent(request.parent)
        name = f"{request.parent}/queuedResources/{request.queued_resource_id}"
        self._require_id(request.queued_resource_id)
        if name in self.requests:
            raise Refused(grpc.StatusCode.ALREADY_EXISTS, f"Resource '{name}' already exists")
        specs = request.queued_resource.tpu.node_spec
        if len(specs) != 1 or not specs[0].node_id or not specs[0].node.runtime_version:
            raise Refused(grpc.StatusCode.INVALID_ARGUMENT, "one node_spec with node_id and runtime_version is needed")
        if (_zone(request.parent), _type(specs[0].node)) not in self.capacity:
            problem = f"Cloud TPU received a bad request. Accelerator type {_type(specs[0].node)!r} is not available"
            raise Refused(grpc.StatusCode.INVALID_ARGUMENT, problem)
        if self._node_name(request.queued_resource) in self.nodes:
            raise Refused(grpc.StatusCode.ALREADY_EXISTS, f"node {specs[0].node_id} already exists")
        self._require_quota(request.parent, "spot" in request.queued_resource)
        queued = QueuedResource(request.queued_resource)
        queued.name, queued.create_time = name, self._now()
        self.requests[name] = queued
        self._turn(queued, STATE.CREATING)
        return self._operation(request.parent, name, "create")

    def delete_queued_resource(self, name: str, force: bool) -> Operation:
        """Deletes a request, with force its node before."""
        queued = self.get_queued_resource(name)
        state = queued.state.state
        deletable = force or state in (STATE.ACCEPTED, STATE.WAITING_FOR_RESOURCES, STATE.FAILED, STATE.SUSPENDED)
        if not deletable or (self.strict and state in (STATE.CREATING, STATE.SUSPENDING)):
            problem = f"Queued resource {name} cannot be deleted in state {STATE(state).name}"
            raise Refused(grpc.StatusCode.FAILED_PRECONDITION, problem)
        if state != STATE.DELETING:
            self._turn(queued, STATE.DELETING)
            self._end_node(queued)
        return self._operation(_parent(name), name, "delete")

    def create_node(self, request: CreateNodeRequest) -> Operation:
        """Makes a node without a request."""
        self._require_parent(request.parent)
        self._require_id(request.node_id)
        name = f"{request.parent}/nodes/{request.node_id}"
        if name in self.nodes:
            raise Refused(grpc.StatusCode.ALREADY_EXISTS, f"Resource '{name}' already exists")
        self._make_node(name, request.node, "")
        return self._operation(request.parent, name, "create")

    def delete_node(self, name: str) -> Operation:
        """Deletes a node. A request that it belongs to is suspended."""
        self._turn_node(self.get_node(name), Node.State.DELETING)
        return self._operation(_parent(name), name, "delete")

    def get_queued_resource(self, name: str) -> QueuedResource:
        """The request."""
        if name not in self.requests:
            raise Refused(grpc.StatusCode.NOT_FOUND, f"Resource '{name}' was not found")
        return self.requests[name]

    def get_node(self, name: str) -> Node:
        """The node."""
        if name not in self.nodes:
            raise Refused(grpc.StatusCode.NOT_FOUND, f"Resource '{name}' was not found")
        return self.nodes[name]

    def get_operation(self, name: str) -> Operation:
        """The operation."""
        if name not in self.operations:
            raise Refused(grpc.StatusCode.NOT_FOUND, f"Operation '{name}' was not found")
        return self.operations[name]

    def within(self, parent: str, kind: Mapping[str, QueuedResource] | Mapping[str, Node]) -> list[str]:
        """Names of the requests or nodes of a zone, in order."""
        self._require_parent(parent)
        return sorted(name for name in kind if name.startswith(parent + "/"))

    def preempt(self, node: str) -> None:
        """Takes a node. Its request is suspended and never comes back."""
        self._turn_node(self.get_node(node), Node.State.PREEMPTED)

    def holding(self) -> Iterator[str]:
        """Ids of the nodes that are there or are being made: what costs money."""
        for name, node in self.nodes.items():
            if node.state in (Node.State.CREATING, Node.State.READY):
                yield name.rpartition("/")[2]

    def _advance_request(self, queued: QueuedResource) -> None:
        state, node = queued.state.state, self.nodes.get(self._node_name(queued))
        if state == STATE.CREATING and self.rejecting:
            del self.requests[queued.name], self._since[queued.name]
            self._finish(queued.name, self.rejecting.pop(0))
        elif state == STATE.CREATING:
            self._turn(queued, STATE.ACCEPTED)
            self._finish(queued.name, QueuedResource.pb(queued))
        elif state == STATE.ACCEPTED:
            self._turn(queued, STATE.WAITING_FOR_RESOURCES)
        elif state == STATE.WAITING_FOR_RESOURCES:
            self._leave_queue(queued)
        elif state == STATE.PROVISIONING and node is not None and node.state == Node.State.READY:
            self._turn(queued, STATE.ACTIVE)
        elif state == STATE.SUSPENDING and node is None:
            self._turn(queued, STATE.SUSPENDED, queued.state.state_initiator)
        elif state == STATE.DELETING and node is None:
            del self.requests[queued.name], self._since[queued.name]
            self._finish(queued.name, Empty())

    def _leave_queue(self, queued: QueuedResource) -> None:
        """What becomes of a request that waits: a slice, an error, or nothing yet."""
        zone, spec = _zone(queued.name), queued.tpu.node_spec[0]
        kind = (zone, _type(spec.node))
        waited = (self._now() - queued.create_time).total_seconds()
        longest = cast(timedelta, queued.queueing_policy.valid_until_duration).total_seconds()
        if self.failing:
            self._fail(queued, self.failing.pop(0))
        elif sum((_zone(name), _type(node)) == kind for name, node in self.nodes.items()) < self.capacity[kind]:
            self._turn(queued, STATE.PROVISIONING)
            self._make_node(self._node_name(queued), spec.node, queued.name)
        elif longest and waited > longest:
            problem = "The queued resource was not provisioned before its valid_until time"
            self._fail(queued, Status(code=grpc.StatusCode.DEADLINE_EXCEEDED.value[0], message=problem))

    def _advance_node(self, node: Node) -> None:
        if node.state == Node.State.CREATING:
            self._turn_node(node, Node.State.READY)
            node.health = Node.Health(Node.Health.HEALTHY)
            self._finish(node.name, Node.pb(node))
        elif node.state == Node.State.PREEMPTED:
            self._suspend(node, INITIATOR.SERVICE)
            self._turn_node(node, Node.State.DELETING)
        elif node.state == Node.State.DELETING:
            self._suspend(node, INITIATOR.USER)
            del self.nodes[node.name], self._since[node.name]
            self._finish(node.name, Empty())

    def _suspend(self, node: Node, by: int) -> None:
        queued = self.requests.get(node.queued_resource)
        if queued is not None and queued.state.state in (STATE.PROVISIONING, STATE.ACTIVE):
            self._turn(queued, STATE.SUSPENDING, by)

    def _end_node(self, queued: QueuedResource) -> None:
        if (node := self.nodes.get(self._node_name(queued))) is not None:
            self._turn_node(node, Node.State.DELETING)

    def _make_node(self, name: str, spec: Node, queued: str) -> None:
        node = Node(spec)
        node.name, node.queued_resource, node.create_time = name, queued, self._now()
        node.accelerator_type = _type(spec)
        node.api_version = Node.ApiVersion(Node.ApiVersion.V2)
        self.nodes[name] = node
        self._turn_node(node, Node.State.CREATING)

    def _turn(self, queued: QueuedResource, state: int, by: int = INITIATOR.STATE_INITIATOR_UNSPECIFIED) -> None:
        queued.state = QueuedResourceState(state=STATE(state), state_initiator=INITIATOR(by))
        self._since[queued.name] = self.clock()

    def _turn_node(self, node: Node, state: int) -> None:
        node.state = Node.State(state)
        self._since[node.name] = self.clock()

    def _fail(self, queued: QueuedResource, error: Status) -> None:
        self._turn(queued, STATE.FAILED)
        queued.state.failed_data = QueuedResourceState.FailedData(error=error)

    def _operation(self, parent: str, target: str, verb: str) -> Operation:
        name = f"{parent}/operations/operation-{len(self.operations) + 1}"
        operation = Operation(name=name)
        operation.metadata.Pack(OperationMetadata.pb(OperationMetadata(target=target, verb=verb, api_version="v2")))
        self.operations[name] = operation
        self._open.setdefault(target, []).append(name)
        return operation

    def _finish(self, target: str, result: Message) -> None:
        for name in self._open.pop(target, ()):
            operation = self.operations[name]
            operation.done = True
            if isinstance(result, Status):
                operation.error.CopyFrom(result)
            else:
                operation.response.Pack(result)

    def _require_parent(self, parent: str) -> None:
        if not PARENT.fullmatch(parent) or _zone(parent) not in {zone for zone, _ in self.capacity}:
            raise Refused(grpc.StatusCode.NOT_FOUND, f"Location '{parent}' was not found")

    def _require_id(self, given: str) -> None:
        if not ID.fullmatch(given):
            raise Refused(grpc.StatusCode.INVALID_ARGUMENT, f"Invalid resource id '{given}'")

    def _require_quota(self, parent: str, spot: bool) -> None:
        same = [r for n, r in self.requests.items() if n.startswith(parent + "/") and ("spot" in r) is spot]
        if len(same) >= self.quota:
            limit = f"TPU{'Preemptible' if spot else ''}PerProjectPerZoneForTPUAPI"
            problem = f"Quota limit '{limit}' has been exceeded. Limit: {self.quota} in zone {_zone(parent)}."
            raise Refused(grpc.StatusCode.RESOURCE_EXHAUSTED, problem)

    def _node_name(self, queued: QueuedResource) -> str:
        spec = queued.tpu.node_spec[0]
        return f"{spec.parent}/nodes/{spec.node_id}"

    def _now(self) -> Any:
        """The time as the library takes it for a Timestamp, whatever its types say."""
        return datetime.fromtimestamp(self.clock(), UTC)


def _zone(name: str) -> str:
    return name.split("/")[3]


def _parent(name: str) -> str:
    return "/".join(name.split("/")[:4])


def _type(node: Node) -> str:
    """The accelerator type, which chips and topology come to if they are given instead."""
    if node.accelerator_type:
        return node.accelerator_type
    config, count = node.accelerator_config, 1
    for side in config.topology.split("x"):
        count *= int(side or 0)
    return f"{CHIPS.get(AcceleratorConfig.Type(config.type_), '')}-{count}"
