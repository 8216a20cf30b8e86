"""What a worker says of itself is what it has done and has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from worker_cases import Case, two_replicas

from spotjax.protocol import control
from spotjax.protocol.backup import BackedUpPage, BackupHeader
from spotjax.worker.stage_times import StageTimes
from spotjax.worker.vitals import device_memory, vitals


def test_a_stage_is_busy_with_one_step_at_a_time() -> None:
    times = StageTimes()
    times.add(1.0, 3.0)  # alone
    times.add(2.0, 4.0)  # dispatched while the one before ran
    times.add(6.0, 7.0)  # after a rest
    assert (times.steps, times.seconds) == (3, 2.0 + 1.0 + 1.0)


async def test_a_worker_tells_what_was_brought_here_and_what_copies_it_keeps(case: Case) -> None:
    loaded = await case.adopt(two_replicas(), ("1.0", "1.1"))
    case.copies.store.service = "s"
    page = BackupHeader((0, 2), (BackedUpPage(5, 0, 8),), "b", 1, "s")
    case.copies.store.put(page, np.zeros(2 * 2 * 16, np.uint8))
    told = vitals(case.worker, (), (11, 12))
    assert (told.moved, told.loaded) == (loaded.moved, loaded.loaded)
    assert (told.sent, told.received, told.backup) == (11, 12, 64)
    assert told.compiled == case.worker.compiled
    assert told.resident > 10**7 and told.cpu_seconds > 0
    assert told.stages == (), "nothing ran yet"
    assert control.decode_from_worker(control.encode(told)) == told


async def test_steps_are_told_by_place_in_the_mesh(case: Case) -> None:
    await case.adopt(two_replicas(), ("1.0", "1.1"))
    for number, post in enumerate(case.worker.executor._posts.values(), 1):
        for step in range(number):
            post.times.add(step, step + 0.25)
    assert vitals(case.worker, (), (0, 0)).stages == (control.StageWork(0, 0, 1, 0.25), control.StageWork(1, 1, 2, 0.5))


@dataclass
class Device:
    """As jax has them."""

    stats: dict[str, int] | None
    process_index: int = 0

    def memory_stats(self) -> dict[str, int] | None:
        return self.stats


def test_memory_is_told_of_devices_of_this_process_whose_backend_tells() -> None:
    some = {"bytes_in_use": 3, "bytes_limit": 8}
    devices: Any = [Device(None), Device(some), Device(some, process_index=1), Device({"bytes_in_use": 4})]
    assert list(device_memory(devices)) == [control.DeviceMemory(1, 3, 8), control.DeviceMemory(3, 4, 0)]
