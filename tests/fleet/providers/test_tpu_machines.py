"""Whatever lives there are of however many machines, what is listed can be acted on."""

from __future__ import annotations

from collections.abc import Sequence

from google.cloud.tpu_v2 import Node, QueuedResource, QueuedResourceState
from hypothesis import given, settings
from hypothesis import strategies as st

from spotjax.fleet.providers.provider import MachineState, Offer
from spotjax.fleet.providers.tpu_machines import LIKELY, Life, id_of, key_of, lives, machines, of_name

OFFER = Offer("v5litepod-8", "here", "spot", 4.5)
ZONES = ("here", "there")


@st.composite
def accounts(draw: st.DrawFn) -> list[Life]:
    """Lives in two zones, read as they are from the service."""
    found: list[Life] = []
    for zone in ZONES:
        requests, nodes = [], []
        for name, attempt in (("a", 1), ("a", 2), ("b", 10)):
            key = f"projects/p/locations/{zone}/x/{id_of('fleet', name, attempt)}"
            if request := draw(st.none() | st.sampled_from([s for s in QueuedResourceState.State if s])):
                requests.append(QueuedResource(name=key, spot={}, state=QueuedResourceState(state=request)))
            if node := draw(st.none() | st.sampled_from([s for s in Node.State if s])):
                nodes.append(Node(name=key, state=node))
        found += lives("fleet", zone, requests, nodes)
    return found


@settings(max_examples=40)
@given(accounts())
def test_every_life_that_is_no_end_can_be_released_by_a_name_that_is_listed(found: Sequence[Life]) -> None:
    listed = machines(found, (OFFER,))
    names = [machine.name for machine in listed]
    assert len(set(names)) == len(names)
    assert {life.name for life in found} == {name for name in names if "/" not in name}
    for life in found:
        if not life.is_ending:
            assert any(life in of_name(found, name) for name in names)
            assert of_name(found, key_of(life)) == (life,)


@settings(max_examples=40)
@given(accounts())
def test_the_best_life_is_the_machine_and_all_others_have_failed(found: Sequence[Life]) -> None:
    for machine in machines(found, (OFFER,)):
        if "/" in machine.name:
            assert machine.state is MachineState.FAILED and machine.failure is None
            continue
        same = [life for life in found if life.name == machine.name]
        going = [life.state for life in same if not life.is_ending]
        if going:
            best = min(going, key=lambda state: LIKELY.index(state) if state in LIKELY else len(LIKELY))
            assert machine.state is best or (best not in LIKELY and machine.state in going)
        else:
            assert machine.state is MachineState.STOPPING
