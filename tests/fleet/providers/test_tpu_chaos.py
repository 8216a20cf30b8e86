"""Controllers that die at any point lose no TPU slice and rent none twice. ``tools/chaos_tpu.py`` does more of it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from google.cloud.tpu_v2 import CreateQueuedResourceRequest, QueuedResource

from spotjax.testing.tpu_cloud import TpuCloud
from spotjax.tools.chaos_tpu import LIMITS, account, run, send_late
from spotjax.tools.controller_deaths import DAY, Bill, Doom, JumpingLoop


@pytest.mark.parametrize("seed", [1, 2])
def test_what_controllers_leave_that_die_at_any_point_their_successors_put_in_order(seed: int) -> None:
    chaos = run(8, seed)
    assert sum(chaos.crashes.values()) == 8 and len(chaos.crashes) > 2
    assert chaos.preempted and 0 < chaos.bill.dearest <= LIMITS.cost_per_hour


def test_a_slice_that_is_left_or_there_twice_would_be_seen(tmp_path: Path) -> None:
    async def script() -> None:
        async with account(0, tmp_path) as chaos:
            await chaos.settle(1)
            (there,) = chaos.cloud.requests.values()
            second(chaos.cloud, there, "europe-west4-b")
            while len(chaos.cloud.nodes) < 2:
                await asyncio.sleep(1.0)
            blind = chaos.controller(1, Doom("any", 1))
            assert await blind.until_dead(100.0)
            assert "one twice" in chaos.problem(blind, 1)
            await chaos.settle(1)
            chaos.cloud.requests.clear()
            assert "something is left" in chaos.problem(blind, 1)

    with asyncio.Runner(loop_factory=JumpingLoop) as runner:
        runner.run(script())


def test_caps_that_are_exceeded_would_be_seen() -> None:
    bill = Bill(10.0, 1.0)
    bill.pay({"a": 6.0}, 5 * DAY, 360.0)
    with pytest.raises(AssertionError, match="an hour"):
        bill.pay({"a": 6.0, "b": 6.0}, 5 * DAY, 1.0)
    with pytest.raises(AssertionError, match="a day"):
        bill.pay({"a": 6.0}, 5 * DAY, 360.0)


def second(cloud: TpuCloud, first: QueuedResource, zone: str) -> None:
    """The same request in another zone."""
    parent = f"projects/chaos/locations/{zone}"
    copied = QueuedResource(first)
    copied.tpu.node_spec[0].parent = parent
    key = first.name.rpartition("/")[2]
    send_late(cloud, CreateQueuedResourceRequest(parent=parent, queued_resource_id=key, queued_resource=copied))
