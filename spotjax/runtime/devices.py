"""What jax says of this machine's devices: how many, of which kind, with how much memory."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace

import jax

from spotjax.meshes.instance import InstanceType
from spotjax.meshes.instance_types import VIRTUAL_CPU
from spotjax.meshes.sharding import own


def local_devices(wanted: int) -> list[jax.Device]:
    """This process's devices; ``wanted`` virtual ones where there is only a CPU and jax does not run yet."""
    with contextlib.suppress(RuntimeError):  # jax runs already, with the devices it has
        jax.config.update("jax_num_cpu_devices", wanted)
    return list(jax.local_devices())


def device_type(devices: Sequence[jax.Device], memory_bytes: int) -> InstanceType:
    """What the planner is told of an instance with these devices.

    Figures that jax does not report are guesses of the right order.

    Args:
      devices: of one instance.
      memory_bytes: of all its devices together; 0 asks the devices. Stays 0 where they do not know.
    """
    device, count = own(devices)[0], len(devices)
    memory = memory_bytes // count
    if device.platform == "cpu":
        return replace(VIRTUAL_CPU, devices=count, memory_bytes=memory)
    if not memory:
        memory = int((device.memory_stats() or {}).get("bytes_limit", 0))
    return InstanceType(device.device_kind, count, memory, 1e14, 1e12, 1e11, 5e9)
