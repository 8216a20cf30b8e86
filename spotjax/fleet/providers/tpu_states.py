"""What a queued resource and its node say of a machine, as one state. Pure; asks nobody.

A queued resource is the request, its node the TPU slice that comes of it. The request rules while there is no node and
once it ends; in between the node does.
"""

from __future__ import annotations

from collections.abc import Mapping

from google.cloud.tpu_v2 import Node, QueuedResource, QueuedResourceState
from google.rpc.code_pb2 import Code

from spotjax.errors import OutOfCapacity, ProviderError
from spotjax.fleet.providers.provider import MachineState
from spotjax.fleet.providers.tpu_errors import from_status

QUEUED: Mapping[int, MachineState] = {
    QueuedResourceState.State.CREATING: MachineState.WAITING,
    QueuedResourceState.State.ACCEPTED: MachineState.WAITING,
    QueuedResourceState.State.WAITING_FOR_RESOURCES: MachineState.WAITING,
    QueuedResourceState.State.PROVISIONING: MachineState.STARTING,
    QueuedResourceState.State.ACTIVE: MachineState.RUNNING,
    QueuedResourceState.State.SUSPENDING: MachineState.STOPPING,
    QueuedResourceState.State.SUSPENDED: MachineState.PREEMPTED,
    QueuedResourceState.State.FAILED: MachineState.FAILED,
    QueuedResourceState.State.DELETING: MachineState.STOPPING,
    QueuedResourceState.State.STATE_UNSPECIFIED: MachineState.STARTING,
}
"""A state that is not known, now or in a later version of the API, is taken for one that may cost."""

NODE: Mapping[int, MachineState] = {
    Node.State.CREATING: MachineState.STARTING,
    Node.State.STARTING: MachineState.STARTING,
    Node.State.RESTARTING: MachineState.STARTING,
    Node.State.REIMAGING: MachineState.STARTING,
    Node.State.REPAIRING: MachineState.STARTING,
    Node.State.UNHIDING: MachineState.STARTING,
    Node.State.READY: MachineState.RUNNING,
    Node.State.STOPPING: MachineState.STOPPING,
    Node.State.HIDING: MachineState.STOPPING,
    Node.State.DELETING: MachineState.STOPPING,
    Node.State.PREEMPTED: MachineState.PREEMPTED,
    Node.State.TERMINATED: MachineState.PREEMPTED,
    Node.State.STOPPED: MachineState.FAILED,
    Node.State.HIDDEN: MachineState.FAILED,
    Node.State.UNKNOWN: MachineState.FAILED,
    Node.State.STATE_UNSPECIFIED: MachineState.STARTING,
}
"""A node that was stopped or hidden does not come back by itself, and one on spot not at all: it must be released."""

HEALTH: Mapping[int, bool] = {
    Node.Health.HEALTH_UNSPECIFIED: True,
    Node.Health.HEALTHY: True,
    Node.Health.TIMEOUT: False,
    Node.Health.UNHEALTHY_TENSORFLOW: False,
    Node.Health.UNHEALTHY_MAINTENANCE: False,
}
"""Whether a health is fine. One that is not changes no state, as the worker's lease knows better; it is the detail."""

RULES_OVER_NODE = frozenset(
    {
        QueuedResourceState.State.FAILED,
        QueuedResourceState.State.SUSPENDING,
        QueuedResourceState.State.SUSPENDED,
        QueuedResourceState.State.DELETING,
    }
)
"""Requests that have ended or are about to: what a node of theirs says is no longer of interest."""


def machine_state(queued: QueuedResource | None, node: Node | None) -> tuple[MachineState, str]:
    """The machine's state and why, from its request and its node, one of which may be missing but not both."""
    if queued is None:
        assert node is not None, "a machine without request and without node is none"
        return NODE.get(node.state, MachineState.STARTING), f"{_of_node(node)}; it has no queued resource"
    request = queued.state.state
    state = QUEUED.get(request, MachineState.STARTING)
    if request in RULES_OVER_NODE:
        return state, _of_request(queued)
    if node is not None:
        return NODE.get(node.state, MachineState.STARTING), _of_node(node)
    if request == QueuedResourceState.State.ACTIVE:
        return MachineState.FAILED, "queued resource ACTIVE, but its node does not exist"
    return state, _of_request(queued)


def failure_of(queued: QueuedResource | None) -> type[ProviderError] | None:
    """Which error a request failed with; None if it did not fail. One that waited too long had no capacity."""
    if queued is None or queued.state.state != QueuedResourceState.State.FAILED:
        return None
    error = queued.state.failed_data.error
    return OutOfCapacity if error.code == Code.DEADLINE_EXCEEDED else type(from_status(error))


def _of_request(queued: QueuedResource) -> str:
    state = queued.state
    name = _name(state.state)
    if state.state == QueuedResourceState.State.FAILED:
        error = state.failed_data.error
        return f"queued resource {name}: {error.message or 'no reason given'} (code {error.code})"
    initiator = state.state_initiator
    by = f" by {_name(initiator)}" if initiator else ""
    return f"queued resource {name}{by}"


def _of_node(node: Node) -> str:
    health = "" if HEALTH.get(node.health, False) else f", {_name(node.health)}"
    why = f": {node.health_description}" if node.health_description else ""
    symptoms = "".join(f"; {_name(symptom.symptom_type)}: {symptom.details}" for symptom in node.symptoms)
    return f"node {_name(node.state)}{health}{why}{symptoms}"


def _name(value: int) -> str:
    """An enum's name, or the number if this version of the library does not know it."""
    return str(getattr(value, "name", value))
