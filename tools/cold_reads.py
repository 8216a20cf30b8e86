"""What a disk gives and what of it parameters are read at, with nothing in the system's cache of files."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spotjax.meshes.instance import Instance, InstanceType
from spotjax.meshes.layout import split_layers
from spotjax.meshes.placement import Placement
from spotjax.meshes.shape import MeshShape, Position
from spotjax.models.catalog import open_model
from spotjax.models.spec import ModelSpec
from spotjax.planner.holdings import Holdings
from spotjax.planner.links import Links
from spotjax.planner.migration import plan_migration
from spotjax.planner.needs import needs_of

CACHES = Path("/proc/sys/vm/drop_caches")
BLOCK = 1 << 20


def forget_files() -> bool:
    """Empties the system's cache of files; False where that is not allowed, so that reads are from memory."""
    os.sync()
    try:
        CACHES.write_text("3")
    except OSError:
        return False
    return True


def sequential(directory: Path) -> float:
    """Bytes per second of reading every file of a directory from its beginning to its end, one after another."""
    forget_files()
    block, size, begin = memoryview(bytearray(BLOCK)), 0, time.perf_counter()
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(block):
                size += count
    return size / (time.perf_counter() - begin)


def parameters(model: str) -> tuple[int, float, float]:
    """Reads all parameters of a model onto a device of this process, as a worker does.

    Returns: their bytes, seconds, and seconds of processor time.
    """
    import jax  # the rest of this module is for processes without it, too

    from spotjax.reshard.parameters import ParameterMover
    from spotjax.reshard.shards import ShardStore
    from spotjax.reshard.transfer import Traffic

    device, traffic = jax.devices()[0], Traffic()
    forget_files()
    checkpoint, dtype = open_model(model).checkpoint, np.dtype(np.float32)
    spec = ModelSpec(checkpoint.spec.config, dtype_bytes=dtype.itemsize)
    shape, layers = MeshShape(1, 1, 1), split_layers(spec.config.layers, 1)
    instance = Instance("here", InstanceType("here", 1, 1 << 40, 1e10, 1e10, 1e10, 1e9))
    placement = Placement(1, shape, layers, {Position(0, 0, 0): instance.devices[0]})
    (arrays,) = needs_of(spec, shape, layers, []).values()
    needs = {instance.devices[0]: arrays.of_parameters()}
    plan = plan_migration(needs, Holdings.of(spec, None, [], [instance]), Links.of([instance]))
    mover = ParameterMover(spec, dtype, checkpoint, {instance.devices[0]: device}.get)
    begin, busy = time.perf_counter(), time.process_time()
    store = mover.carry_out(plan.moves, needs, placement.shape.tensor, ShardStore({}), traffic)
    jax.block_until_ready([shard.buffer for shard in store.at(instance.devices[0]).values()])
    took, busy = time.perf_counter() - begin, time.process_time() - busy
    checkpoint.close()
    return traffic.loaded, took, busy


def against_disk(models: Sequence[Path], turns: int) -> list[dict[str, Any]]:
    """Reading the parameters of every model, in turns with reading its files."""
    seen: dict[Path, list[tuple[float, ...]]] = {model: [] for model in models}
    for _ in range(turns):
        for model, results in seen.items():
            disk = sequential(model)
            size, seconds, busy = parameters(str(model))
            files = sum(path.stat().st_size for path in model.rglob("*") if path.is_file())
            results.append((disk, size, files / seconds, files / seconds / disk, busy))
    return [
        {
            "model": model.name,
            "parameter_bytes": int(results[0][1]),
            "file_bytes_per_second": statistics.median(rate for _, _, rate, _, _ in results),
            "disk_bytes_per_second": statistics.median(disk for disk, *_ in results),
            "ratio": statistics.median(ratio for *_, ratio, _ in results),
            "processor_seconds": statistics.median(busy for *_, busy in results),
        }
        for model, results in seen.items()
    ]
