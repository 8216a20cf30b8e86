"""How a worker is, told to the controller every few seconds, for operators to see. Changes nothing."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterable
from pathlib import Path

import jax

from spotjax.protocol.control import DeviceMemory, Vitals
from spotjax.runtime.executables import Devices
from spotjax.worker.worker import Worker

SECONDS = 5.0
"""Between two reports: half of the usual interval between two scrapes."""


def vitals(worker: Worker, devices: Devices, traffic: tuple[int, int]) -> Vitals:
    """Of the worker as it is; ``traffic`` is its endpoint's. Looks at all copies of KV: not for the event loop."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return Vitals(
        stages=tuple(worker.executor.work()),
        devices=tuple(device_memory(devices)),
        sent=traffic[0],
        received=traffic[1],
        moved=worker.traffic.moved,
        loaded=worker.traffic.loaded,
        backup=worker.backup_bytes,
        resident=resident_bytes(usage),
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        compiled=worker.compiled,
    )


def device_memory(devices: Iterable[jax.Device]) -> Iterable[DeviceMemory]:
    """Of the devices of this process whose backend tells."""
    for number, device in enumerate(devices):
        stats = device.memory_stats() if device.process_index == jax.process_index() else None
        if stats and "bytes_in_use" in stats:
            yield DeviceMemory(number, stats["bytes_in_use"], stats.get("bytes_limit", 0))


def resident_bytes(usage: resource.struct_rusage) -> int:
    """Host memory of this process: what Linux says it is now, elsewhere what it was at most."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return usage.ru_maxrss * 1024
