"""Every state of the API has a meaning here."""

from __future__ import annotations

import itertools

import pytest
from google.cloud.tpu_v2 import Node, QueuedResource, QueuedResourceState, Symptom
from google.rpc.status_pb2 import Status

from spotjax.fleet.providers.provider import MachineState
from spotjax.fleet.providers.tpu_machines import id_of, lives
from spotjax.fleet.providers.tpu_states import HEALTH, NODE, QUEUED, RULES_OVER_NODE, failure_of, machine_state

STATE = QueuedResourceState.State
REQUESTS = tuple(QueuedResourceState.State)
NODES = tuple(Node.State)
HEALTHS = tuple(Node.Health)


def queued(state: int) -> QueuedResource:
    return QueuedResource(name="q", state=QueuedResourceState(state=state))


def test_the_tables_have_what_the_library_has_and_no_more() -> None:
    assert set(QUEUED) == set(REQUESTS)
    assert set(NODE) == set(NODES)
    assert set(HEALTH) == set(HEALTHS)


@pytest.mark.filterwarnings("ignore:Unrecognized State enum value")
@pytest.mark.parametrize(
    ("state", "meaning"),
    [
        (0, "starting"), (1, "waiting"), (2, "waiting"), (3, "starting"), (4, "failed"), (5, "stopping"),
        (6, "failed"), (7, "stopping"), (8, "preempted"), (9, "waiting"), (42, "starting"),
    ],
)  # fmt: skip
def test_a_request_without_node(state: int, meaning: str) -> None:
    found, detail = machine_state(queued(state), None)
    assert found == meaning
    if state < 42:
        assert STATE(state).name in detail


@pytest.mark.filterwarnings("ignore:Unrecognized State enum value")
@pytest.mark.parametrize(
    ("state", "meaning"),
    [
        (0, "starting"), (1, "starting"), (2, "running"), (3, "starting"), (4, "starting"), (5, "stopping"),
        (6, "starting"), (8, "failed"), (9, "stopping"), (10, "starting"), (11, "preempted"), (12, "preempted"),
        (13, "stopping"), (14, "failed"), (15, "starting"), (16, "failed"), (42, "starting"),
    ],
)  # fmt: skip
def test_a_node_with_and_without_a_request_that_stands(state: int, meaning: str) -> None:
    assert machine_state(None, Node(state=state))[0] == meaning
    for request in set(REQUESTS) - RULES_OVER_NODE:
        assert machine_state(queued(request), Node(state=state))[0] == meaning


def test_a_request_that_has_ended_rules_over_its_node_and_no_end_runs() -> None:
    for request, node in itertools.product(RULES_OVER_NODE, NODES):
        state = machine_state(queued(request), Node(state=node))[0]
        assert state is QUEUED[request]
        assert state in (MachineState.STOPPING, MachineState.PREEMPTED, MachineState.FAILED)


@pytest.mark.parametrize("health", HEALTHS)
def test_health_is_told_and_changes_no_state(health: Node.Health) -> None:
    state, detail = machine_state(None, Node(state=Node.State.READY, health=health, health_description="why"))
    assert state is MachineState.RUNNING
    assert (health.name in detail) is (health not in (Node.Health.HEALTHY, Node.Health.HEALTH_UNSPECIFIED))
    assert "why" in detail


def test_symptoms_are_told() -> None:
    node = Node(state=Node.State.READY, symptoms=[Symptom(symptom_type=5, details="worker 3")])
    assert "HBM_OUT_OF_MEMORY: worker 3" in machine_state(None, node)[1]


def test_only_what_failed_has_a_failure() -> None:
    for state in REQUESTS:
        assert (failure_of(queued(state)) is not None) is (state == STATE.FAILED)
    assert failure_of(None) is None
    assert "no reason given" in machine_state(queued(STATE.FAILED), None)[1]


def test_who_suspended_it_is_told() -> None:
    for initiator, by in ((0, "queued resource SUSPENDED"), (1, "by USER"), (2, "by SERVICE")):
        suspended = queued(STATE.SUSPENDED)
        suspended.state.state_initiator = initiator
        assert machine_state(suspended, None)[1].endswith(by)


@pytest.mark.parametrize(("name", "attempt"), [("a", 1), ("worker-10", 12), ("0", 9999), ("a-0-b", 3)])
def test_an_id_says_whose_life_it_is(name: str, attempt: int) -> None:
    for fleet in ("f", "f--a", "f-a"):
        node = Node(name=f"projects/p/locations/z/nodes/{id_of(fleet, name, attempt)}")
        for reader in ("f", "f--a", "f-a"):
            found = lives(reader, "z", (), (node,))
            assert [(life.name, life.attempt) for life in found] == [(name, attempt)] * (reader == fleet)


@pytest.mark.parametrize("name", ["f--a", "f--a--", "f--a--0", "f--a--01", "f--a--x", "x-f--a--1", "f--a_b--1"])
def test_what_only_looks_like_an_id_is_nobodys(name: str) -> None:
    assert not lives("f", "z", (), (Node(name=f"projects/p/locations/z/nodes/{name}"),))


def test_an_error_of_the_future_is_one_to_try_again_after() -> None:
    failed = queued(STATE.FAILED)
    failed.state.failed_data = QueuedResourceState.FailedData(error=Status(code=99, message="new"))
    assert failure_of(failed) is not None
