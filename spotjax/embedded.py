"""Embedded mode: controller and workers in one process, instances being groups of its devices.

Puts the rooms together for one machine: virtual CPU devices on a laptop, real ones on a multi-device VM. Besides
``runtime`` and ``reshard`` the only module that touches jax, because it chooses the devices.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from spotjax.config import ServeConfig
from spotjax.engine.commit_log import MemoryCommitLog
from spotjax.engine.scheduler import Limits
from spotjax.errors import ConfigError, NoFeasibleShape, SpotjaxError
from spotjax.fleet.change import Planning
from spotjax.fleet.controller import Controller, ServiceLimits
from spotjax.fleet.membership import Membership
from spotjax.meshes.instance import Instance, InstanceState, InstanceType
from spotjax.meshes.layout import tensor_degrees
from spotjax.meshes.placement import Placement
from spotjax.meshes.shape import MeshShape
from spotjax.models.catalog import Model, open_model
from spotjax.models.spec import ModelSpec
from spotjax.models.tokenizer import Tokenizer
from spotjax.planner.demand import Demand
from spotjax.planner.optimizer import choose_shape
from spotjax.reshard.local import LocalCluster
from spotjax.runtime.buckets import Buckets
from spotjax.runtime.compiled import CompiledModel
from spotjax.runtime.executables import Devices

log = logging.getLogger(__name__)

LONGEST_DEFAULT = 4096
"""Positions that a server offers unless told otherwise, however many the model could take."""
TYPICAL_POSITIONS = 512
"""Positions of a typical sequence, for which each of ``max_batch`` sequences finds KV pages by default."""
VIRTUAL_SPREAD = 3
"""By default about so many virtual devices hold the model, so that a mesh is needed; fewer where there are not six."""


@dataclass(frozen=True)
class EmbeddedServer:
    """A running service.

    Attributes:
      service: the controller.
      cluster: its devices.
      tokenizer: of the model.
      model_name: as clients name it.
      max_model_len: longest prompt and output together.
    """

    service: Controller
    cluster: LocalCluster
    tokenizer: Tokenizer
    model_name: str
    max_model_len: int

    @property
    def failure(self) -> asyncio.Future[None]:
        """Fails with the error that the engine cannot go on from, if there ever is one."""
        return self.service.failure

    async def close(self) -> None:
        """Stops at the next token boundary and frees all devices."""
        await self.service.close()


async def start(config: ServeConfig) -> EmbeddedServer:
    """Loads the model and forms the first mesh.

    Raises:
      ConfigError: settings do not go together.
      CheckpointError: the model cannot be loaded.
      NoFeasibleShape: the model does not fit the instances.
    """
    devices = local_instances(config.embedded_instances, config.devices_per_instance)
    model = await asyncio.to_thread(open_model, config.model)
    return await serve_model(config, model, devices)


async def serve_model(config: ServeConfig, model: Model, devices: Mapping[str, Devices]) -> EmbeddedServer:
    """The same with a model and devices at hand."""
    dtype = resolve_dtype(config.dtype, next(iter(devices.values()))[0])
    spec = ModelSpec(model.checkpoint.spec.config, dtype_bytes=jnp.dtype(dtype).itemsize)
    limits, buckets = resolve_limits(config, spec)
    demand = Demand(
        batch=config.max_batch,
        prompt=min(TYPICAL_POSITIONS // 2, limits.max_positions // 2),
        output=min(TYPICAL_POSITIONS // 2, limits.max_positions // 2),
        page_size=config.page_size,
        kv_pages=limits.pages - 1,
        step_tokens=config.prefill_tokens,
    )
    wanted = pinned_mesh(config.mesh, spec)
    planning = Planning(spec, demand, wanted)
    kind = instance_type(config, spec, limits, devices)
    members = Membership(Instance(name, kind) for name in devices)
    programs = cache_directory(config.compilation_cache)
    compiled = CompiledModel(spec, limits.pages, config.page_size, limits.max_positions, dtype, programs)
    cluster = LocalCluster(compiled, buckets, model.checkpoint, devices, fuse=config.fuse)
    service = Controller(
        model.name, planning, members, cluster, MemoryCommitLog(), model.tokenizer, model.tokenizer.end_tokens,
        limits, time.monotonic, time.time,
    )  # fmt: skip
    started = time.monotonic()
    for tensor in foreseeable_degrees(planning, members.all()):
        await asyncio.to_thread(cluster.compile_for, tensor, partial(_log_progress, tensor))
    log.info("compiled in %.1f s", time.monotonic() - started)
    report = await service.start()
    try:
        _check_first_mesh(planning, members, report.after)
    except SpotjaxError:
        await service.close()
        raise
    return EmbeddedServer(service, cluster, model.tokenizer, model.name, limits.max_positions)


def cache_directory(setting: str) -> Path | None:
    """Where compiled programs are kept between runs: as told, else in the user's cache directory; None for nowhere."""
    if setting == "off":
        return None
    home = os.environ.get("SPOTJAX_CACHE") or Path(
        os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "spotjax"
    )
    return Path(setting) if setting else Path(home, "programs")


def local_instances(instances: int, devices_per_instance: int) -> dict[str, Devices]:
    """This machine's devices as instances ``instance-0``, ``instance-1`` ...; virtual ones where there is only a CPU.

    Raises:
      ConfigError: there are not enough devices.
    """
    wanted = instances * devices_per_instance
    with contextlib.suppress(RuntimeError):  # jax runs already, with the devices it has
        jax.config.update("jax_num_cpu_devices", wanted)
    devices = jax.devices()
    if len(devices) < wanted:
        raise ConfigError(
            f"instances ({instances}) times devices_per_instance ({devices_per_instance}) is {wanted}, "
            f"but there are {len(devices)} {devices[0].platform} devices"
        )
    return {
        f"instance-{number}": tuple(devices[number * devices_per_instance : (number + 1) * devices_per_instance])
        for number in range(instances)
    }


def resolve_dtype(setting: str, device: jax.Device) -> np.dtype:
    """The dtype of parameters and KV: float32 on CPU, where bfloat16 is 5-10 times slower, else bfloat16."""
    if setting == "auto":
        setting = "float32" if device.platform == "cpu" else "bfloat16"
    return np.dtype(jnp.dtype(setting))


def resolve_limits(config: ServeConfig, spec: ModelSpec) -> tuple[ServiceLimits, Buckets]:
    """What the service accepts, and the shapes its steps run at.

    Raises:
      ConfigError: ``max_model_len`` is more than the model was made for.
    """
    own = spec.config.max_positions
    if config.max_model_len > own:
        raise ConfigError(f"max_model_len must be at most {own}, the model's own limit, got {config.max_model_len}")
    positions = config.max_model_len or min(own, LONGEST_DEFAULT)
    typical = config.max_batch * min(positions, TYPICAL_POSITIONS)
    pages = (config.kv_pages or -(-max(positions, typical) // config.page_size)) + 1
    buckets = Buckets(config.max_batch, config.prefill_tokens, config.page_size, positions)
    limits = ServiceLimits(
        max_positions=positions,
        pages=pages,
        page_size=config.page_size,
        queue=config.queue_limit,
        retain_seconds=config.retain_seconds,
        replica=lambda depth: Limits(config.max_batch, config.prefill_tokens, depth, buckets.prefill_fits),
    )
    return limits, buckets


def pinned_mesh(setting: str, spec: ModelSpec) -> MeshShape | None:
    """The mesh that ``mesh`` names, None for ``auto``.

    Raises:
      ConfigError: the model cannot be divided like that.
    """
    if setting == "auto":
        return None
    mesh, c = MeshShape.parse(setting), spec.config
    if c.heads % mesh.tensor:
        raise ConfigError(f"mesh {mesh}: the tensor degree must divide the model's {c.heads} query heads")
    if mesh.stage > c.layers:
        raise ConfigError(f"mesh {mesh}: the model's {c.layers} layers cannot fill {mesh.stage} stages")
    return mesh


def instance_type(
    config: ServeConfig, spec: ModelSpec, limits: ServiceLimits, devices: Mapping[str, Devices]
) -> InstanceType:
    """What the planner is told of these devices; figures that jax does not report are guesses of the right order."""
    device = next(iter(devices.values()))[0]
    virtual = device.platform == "cpu"
    memory = config.instance_memory_bytes // config.devices_per_instance
    if not memory:
        reported = None if virtual else device.memory_stats()
        need = spec.parameter_bytes + limits.pages * limits.page_size * spec.kv_bytes_per_position
        spread = max(1, min(VIRTUAL_SPREAD, len(devices) * config.devices_per_instance // 2))
        memory = need * 5 // 4 // spread if reported is None else int(reported["bytes_limit"])
    if virtual:
        return InstanceType("virtual-cpu", config.devices_per_instance, memory, 5e10, 1e10, 5e9, 5e9)
    return InstanceType(device.device_kind, config.devices_per_instance, memory, 1e14, 1e12, 1e11, 5e9)


def foreseeable_degrees(planning: Planning, instances: tuple[Instance, ...]) -> list[int]:
    """Tensor degrees of the meshes that would be chosen with all instances, one fewer, two fewer ..."""
    degrees: dict[int, None] = {}
    for left in range(len(instances), 0, -1):
        ready = [replace(instance, state=InstanceState.READY) for instance in instances[:left]]
        try:
            degrees[choose_shape(planning.spec, ready, planning.demand, planning.wanted).shape.tensor] = None
        except NoFeasibleShape:
            break
    allowed = tensor_degrees(planning.spec, instances[0].type.devices)
    return [degree for degree in degrees if degree in allowed]


def _check_first_mesh(planning: Planning, members: Membership, placement: Placement | None) -> None:
    """A mesh that does not fit at start is a mistake in the settings; later on, requests wait for instances."""
    if placement is None:
        choose_shape(planning.spec, members.all(), planning.demand, planning.wanted)  # raises, saying what would fit
    elif planning.wanted is not None and placement.shape != planning.wanted:
        raise ConfigError(f"mesh {planning.wanted} does not fit these instances; {placement.shape} would")


def _log_progress(tensor: int, done: int, total: int) -> None:
    if done == total or done % 50 == 0:
        log.info("tensor degree %d: %d of %d functions compiled", tensor, done, total)
