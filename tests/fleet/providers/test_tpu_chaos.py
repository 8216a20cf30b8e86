"""Controllers that die at any point lose no TPU slice and rent none twice. ``tools/chaos_tpu.py`` does more of it."""

from __future__ import annotations

import pytest
from google.cloud.tpu_v2 import CreateQueuedResourceRequest, QueuedResource

from spotjax.testing.tpu_cloud import TpuCloud
from spotjax.tools.chaos_tpu import account, controller, crash_points, killed_processes, send_late


@pytest.mark.parametrize("seed", [1, 2])
async def test_what_controllers_leave_that_die_at_a_call_their_successors_put_in_order(seed: int) -> None:
    chaos = await crash_points(20, seed)
    assert {"before", "after", "late"} <= set(chaos.crashes) and sum(chaos.crashes.values()) == 20
    assert chaos.preempted


async def test_the_same_with_processes_that_are_killed() -> None:
    chaos = await killed_processes(2, 1)
    assert chaos.crashes == {"killed": 2}


async def test_a_slice_that_is_left_or_there_twice_would_be_seen() -> None:
    async with account(0) as chaos:
        await chaos.settle(1)
        (there,) = chaos.cloud.requests.values()
        elsewhere = {"us-west4-a", "europe-west4-b"} - {there.name.split("/")[3]}
        second(chaos.cloud, there, elsewhere.pop())
        async with controller(chaos.address) as provider:
            known = {machine.name for machine in await provider.list()}
        with pytest.raises(AssertionError, match="one twice"):
            chaos.check(known, 1)
        await chaos.settle(1)


def second(cloud: TpuCloud, first: QueuedResource, zone: str) -> None:
    """The same request in another zone."""
    parent = f"projects/chaos/locations/{zone}"
    copied = QueuedResource(first)
    copied.tpu.node_spec[0].parent = parent
    key = first.name.rpartition("/")[2]
    send_late(cloud, CreateQueuedResourceRequest(parent=parent, queued_resource_id=key, queued_resource=copied))
    while len(cloud.nodes) < 2:
        cloud.advance()
