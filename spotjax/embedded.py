"""Embedded mode: controller and workers in one process, instances being groups of its devices.

Puts the rooms together for one machine: virtual CPU devices on a laptop, real ones on a multi-device VM.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from spotjax.config import ServeConfig
from spotjax.durability import directory_of, open_commit_log
from spotjax.errors import ConfigError
from spotjax.fleet.checkpoint_files import CheckpointFiles
from spotjax.fleet.controller import Controller
from spotjax.fleet.membership import Membership
from spotjax.fleet.observer import Observer
from spotjax.fleet.saving import Saves
from spotjax.meshes.instance import Instance
from spotjax.models.catalog import Model, open_model
from spotjax.models.fingerprint import fingerprint
from spotjax.models.tokenizer import Tokenizer
from spotjax.reshard.local import LocalCluster
from spotjax.runtime.attention.choice import choose_attention
from spotjax.runtime.compiled import CompiledModel
from spotjax.runtime.devices import device_type, local_devices
from spotjax.runtime.executables import Devices
from spotjax.runtime.native.choice import attention_of, choose_kernels, products_of
from spotjax.runtime.program_cache import cache_directory
from spotjax.sizing import (
    check_first_mesh,
    foreseeable_degrees,
    planning_for,
    resolve_dtype,
    resolve_limits,
    virtual_memory,
)  # fmt: skip
from spotjax.structured.grammars import Grammars
from spotjax.structured.guide import StructureGuide
from spotjax.structured.vocabulary import Vocabulary

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EmbeddedServer:
    """A running service.

    Attributes:
      service: the controller.
      cluster: its devices.
      tokenizer: of the model.
      model_name: as clients name it.
      max_model_len: longest prompt and output together.
      grammars: that output can be kept to.
      guide: keeps it to them.
    """

    service: Controller
    cluster: LocalCluster
    tokenizer: Tokenizer
    model_name: str
    max_model_len: int
    grammars: Grammars
    guide: StructureGuide

    @property
    def failure(self) -> asyncio.Future[None]:
        """Fails with the error that the engine cannot go on from, if there ever is one."""
        return self.service.failure

    async def close(self) -> None:
        """Stops at the next token boundary and frees all devices."""
        await self.service.close()
        self.guide.close()


async def start(config: ServeConfig, observer: Observer | None = None) -> EmbeddedServer:
    """Loads the model and forms the first mesh; ``observer`` is told what happens.

    Raises:
      ConfigError: settings do not go together.
      CheckpointError: the model cannot be loaded.
      CommitLogError: the commit log cannot be used.
      NoFeasibleShape: the model does not fit the instances.
    """
    devices = local_instances(config.embedded_instances, config.devices_per_instance)
    model = await asyncio.to_thread(open_model, config.model, config.quantization)
    return await serve_model(config, model, devices, observer)


async def serve_model(
    config: ServeConfig, model: Model, devices: Mapping[str, Devices], observer: Observer | None = None
) -> EmbeddedServer:
    """The same with a model and devices at hand."""
    dtype = resolve_dtype(config.dtype, next(iter(devices.values()))[0].platform)
    spec = replace(model.checkpoint.spec, dtype_bytes=dtype.itemsize)
    limits, buckets = resolve_limits(config, spec)
    planning = planning_for(config, spec, limits)
    kind = device_type(next(iter(devices.values())), config.instance_memory_bytes)
    if not kind.memory_bytes:
        memory = virtual_memory(spec, limits, len(devices) * config.devices_per_instance)
        kind = replace(kind, memory_bytes=memory)
    members = Membership(Instance(name, kind) for name in devices)
    programs = cache_directory(config.compilation_cache)
    device = next(iter(devices.values()))[0]
    kernels = await asyncio.to_thread(choose_kernels, config.cpu_kernels, device)
    attention = choose_attention(config.attention, spec, config.page_size, dtype, device)
    attention = attention_of(kernels, attention, config.attention)
    compiled = CompiledModel(
        spec, limits.pages, config.page_size, limits.max_positions, dtype, programs, attention, products_of(kernels)
    )
    cluster = LocalCluster(compiled, buckets, model.checkpoint, devices, fuse=config.fuse)
    weights = await asyncio.to_thread(fingerprint, model.checkpoint, np.dtype(np.float32))
    served = await asyncio.to_thread(fingerprint, model.checkpoint, dtype)
    commits = await asyncio.to_thread(open_commit_log, config, weights)
    grammars = Grammars(lambda: Vocabulary(model.tokenizer, spec.config.vocab))
    guide = StructureGuide(grammars)
    service = Controller(
        model.name, planning, members, cluster, commits, model.tokenizer, model.tokenizer.end_tokens,
        limits, time.monotonic, time.time, leave=config.leave, saves=Saves("", commits.identity),
        files=CheckpointFiles(
            spec.config, dtype.name, served, model.tokenizer, directory_of(commits), spec.quantization
        ),
        observer=observer,
        guide=guide,
    )  # fmt: skip
    started = time.monotonic()
    try:
        for tensor in foreseeable_degrees(planning, members.all()):
            await asyncio.to_thread(cluster.compile_for, tensor, partial(_log_progress, tensor))
        log.info("compiled in %.1f s", time.monotonic() - started)
        report = await service.start()
        check_first_mesh(planning, members, report.after)
    except BaseException:
        await service.close()  # and with it the log, whose lock would outlive it
        guide.close()
        raise
    return EmbeddedServer(service, cluster, model.tokenizer, model.name, limits.longest, grammars, guide)


def local_instances(instances: int, devices_per_instance: int) -> dict[str, Devices]:
    """This machine's devices as instances ``instance-0``, ``instance-1`` ...; virtual ones where there is only a CPU.

    Raises:
      ConfigError: there are not enough devices.
    """
    wanted = instances * devices_per_instance
    devices = local_devices(wanted)
    if len(devices) < wanted:
        raise ConfigError(
            f"instances ({instances}) times devices_per_instance ({devices_per_instance}) is {wanted}, "
            f"but there are {len(devices)} {devices[0].platform} devices"
        )
    return {
        f"instance-{number}": tuple(devices[number * devices_per_instance : (number + 1) * devices_per_instance])
        for number in range(instances)
    }


def _log_progress(tensor: int, done: int, total: int) -> None:
    if done == total or done % 50 == 0:
        log.info("tensor degree %d: %d of %d functions compiled", tensor, done, total)
