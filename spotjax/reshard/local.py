"""The cluster of embedded mode: every instance is a group of this process's devices. A ``fleet.cluster.Cluster``.

Owns all buffers: parameters as shards by device, KV as the pages of the current stages. Plans nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import jax

from spotjax.errors import InstanceLost, SliceUnavailable
from spotjax.meshes.instance import DeviceRef
from spotjax.meshes.placement import Placement
from spotjax.meshes.sharding import assemble, stage_mesh
from spotjax.reshard.kv import KvMover
from spotjax.reshard.parameters import Checkpoint, ParameterMover
from spotjax.reshard.shards import ShardStore, delete_arrays
from spotjax.reshard.transfer import PageTransfer, Preparation, Traffic
from spotjax.runtime.buckets import Buckets
from spotjax.runtime.compiled import CompiledModel
from spotjax.runtime.executables import Devices
from spotjax.runtime.pipeline import LocalPipeline
from spotjax.runtime.stage import Stage
from spotjax.runtime.warmup import Progress, Step, load, warm

A = TypeVar("A")
R = TypeVar("R")


@dataclass(frozen=True)
class _Prepared:
    """A placement with all that can be there before decoding stops.

    Attributes:
      preparation: what was asked for.
      store: parameters of the new placement.
      stages: by (replica, stage); layers whose pages stay in place have none yet.
    """

    preparation: Preparation
    store: ShardStore
    stages: Mapping[tuple[int, int], Stage]


class LocalCluster:
    """Devices of this process as instances.

    Args:
      model: compiled functions.
      buckets: shapes that steps are padded to.
      checkpoint: source of parameters that no device has.
      devices: the jax devices of every instance.
      fuse: see ``LocalPipeline``.

    Attributes:
      pipelines: one for every replica of the current placement.
    """

    def __init__(
        self,
        model: CompiledModel,
        buckets: Buckets,
        checkpoint: Checkpoint,
        devices: Mapping[str, Devices],
        *,
        fuse: bool,
    ) -> None:
        self.model = model
        self.pipelines: tuple[LocalPipeline, ...] = ()
        self._buckets, self._devices, self._fuse = buckets, devices, fuse
        self._parameters = ParameterMover(model.spec, model.dtype, checkpoint, self._device)
        self._kv = KvMover(model)
        self._store = ShardStore({})
        self._prepared: _Prepared | None = None
        self._lost: set[str] = set()
        self._compiled_for: set[int] = set()
        self._loading = ThreadPoolExecutor(1, thread_name_prefix="load")

    def join(self, instance: str) -> None:
        """An instance of that name is there (again), with empty memory."""
        self._lost.discard(instance)

    def compile_for(self, tensor: int, progress: Progress | None = None) -> None:
        """Compiles all that stages of that tensor degree run, unless that was done; every place can load it then."""
        if tensor in self._compiled_for:
            return
        groups = [d[start : start + tensor] for d in self._devices.values() for start in range(0, len(d), tensor)]
        groups = [group for group in groups if len(group) == tensor]
        warm(self.model, self._buckets, groups[:1], progress=progress)
        self._compiled_for.add(tensor)
        for group in groups[1:]:
            self._loading.submit(warm, self.model, self._buckets, [group], 1)

    async def prepare(self, preparation: Preparation) -> Traffic:
        """See ``Cluster.prepare``."""
        self._prepared = None
        self._prepared, traffic = await self._run(self._prepare, preparation, preparation.placement)
        return traffic

    async def switch(self, transfers: Sequence[PageTransfer]) -> tuple[Sequence[LocalPipeline], Traffic]:
        """See ``Cluster.switch``."""
        assert self._prepared is not None, "prepare comes before switch"
        prepared = self._prepared
        traffic = await self._run(partial(self._move_kv, prepared), transfers, prepared.preparation.placement)
        retired, self.pipelines = self.pipelines, self._connect(prepared)
        self._store, self._prepared = prepared.store, None
        for pipeline in retired:
            pipeline.close()
        return self.pipelines, traffic

    async def clear(self) -> None:
        """See ``Cluster.clear``."""
        for pipeline in self.pipelines:
            pipeline.close()
        self.pipelines, self._prepared = (), None

    def lose(self, instance: str) -> None:
        """See ``Cluster.lose``: the instance's buffers are deleted here and now, whoever uses them."""
        self._lost.add(instance)
        gone = set(self._devices[instance])
        for pipeline in self.pipelines:
            if any(not gone.isdisjoint(stage.devices) for stage in pipeline.stages):
                pipeline.lose(instance)
        stages = [stage for pipeline in self.pipelines for stage in pipeline.stages]
        if self._prepared is not None:
            stages += self._prepared.stages.values()
        stages = [stage for stage in stages if not gone.isdisjoint(stage.devices)]
        with ExitStack() as no_calls:
            for devices in {stage.devices for stage in stages}:
                no_calls.enter_context(self.model.calls(devices))
            for stage in stages:
                delete_arrays(stage.arrays())
            self._store = self._store.without(instance)
            if self._prepared is not None:
                self._prepared = replace(self._prepared, store=self._prepared.store.without(instance))

    async def close(self) -> None:
        """See ``Cluster.close``."""
        await self.clear()
        self._loading.shutdown(wait=True, cancel_futures=True)
        self.model.executables.close()
        self._store = ShardStore({})

    def _device(self, reference: DeviceRef) -> jax.Device:
        return self._devices[reference.instance][reference.index]

    async def _run(self, work: Callable[[A], R], argument: A, placement: Placement) -> R:
        """Does blocking work in a thread; a loss that breaks it, or its result, becomes InstanceLost."""
        lost_before = frozenset(self._lost)
        try:
            result = await asyncio.to_thread(work, argument)
        except (RuntimeError, SliceUnavailable) as problem:
            # jax raises one of several RuntimeErrors when a buffer is deleted under its reader
            if lost := self._lost - lost_before:
                raise InstanceLost(f"instance {min(lost)} was lost during a migration") from problem
            raise
        targets = {device.instance for device in placement.devices.values()}
        if lost := self._lost & targets:
            raise InstanceLost(f"instance {min(lost)} was lost during a migration")
        return result

    def _prepare(self, preparation: Preparation) -> tuple[_Prepared, Traffic]:
        traffic = Traffic()
        tensor = preparation.placement.shape.tensor
        self.compile_for(tensor)
        store = self._parameters.carry_out(preparation.plan, preparation.needs, tensor, self._store, traffic)
        shape = preparation.placement.shape
        stages = {
            (d, p): self._build_stage(preparation.placement, store, d, p)
            for d in range(shape.data)
            for p in range(shape.stage)
        }
        for (d, _), stage in stages.items():
            for layer in range(*stage.layers):
                if self._stage_in_place(preparation, d, layer, stage) is None:
                    stage.pages[layer] = stage.empty_pages()
        load(self.model, [stage.devices for stage in stages.values()], self._recent_steps())
        return _Prepared(preparation, store, stages), traffic

    def _recent_steps(self) -> list[Step]:
        # copied first: pipelines add to it meanwhile
        return [step for pipeline in self.pipelines for step in tuple(pipeline.recent)]

    def _build_stage(self, placement: Placement, store: ShardStore, data: int, number: int) -> Stage:
        """A stage over buffers that are in place, without KV."""
        group = placement.group(data, number)
        devices = tuple(self._device(reference) for reference in group)
        mesh = stage_mesh(devices)
        parameters = {}
        for array in self.model.spec.parameters:
            if store.get(group[0], array.name) is not None:
                shards = [store.at(reference)[array.name].buffer for reference in group]
                parameters[array.name] = assemble(array, self.model.spec, mesh, shards)
        last = number == placement.shape.stage - 1
        return Stage(self.model, devices, placement.layers[number], first=number == 0, last=last, parameters=parameters)

    def _stage_in_place(self, preparation: Preparation, data: int, layer: int, stage: Stage) -> Stage | None:
        """The current stage whose pages of that layer the new replica ``data`` goes on with where they are, if any."""
        for old, new in preparation.heirs.items():
            if new == data and old < len(self.pipelines):
                source = self._stage_of(old, layer)
                return source if source.devices == stage.devices else None
        return None

    def _stage_of(self, data: int, layer: int) -> Stage:
        """The current stage of a replica that has the layer."""
        return next(s for s in self.pipelines[data].stages if s.layers[0] <= layer < s.layers[1])

    def _move_kv(self, prepared: _Prepared, transfers: Sequence[PageTransfer]) -> Traffic:
        traffic = Traffic()
        for (data, _), stage in prepared.stages.items():
            incoming = [transfer for transfer in transfers if transfer.new == data]
            for layer in range(*stage.layers):
                kept = self._stage_in_place(prepared.preparation, data, layer, stage)
                if kept is not None:
                    stage.pages[layer] = kept.pages[layer]
                for transfer in incoming:
                    source = self._stage_of(transfer.old, layer)
                    if source is kept and prepared.preparation.heirs.get(transfer.old) == data:
                        continue
                    self._kv.move(transfer, layer, source, stage, traffic)
                if kept is not None:
                    kept.pages[layer] = stage.pages[layer]  # writing donated the old ones, and a switch can be repeated
        jax.block_until_ready([list(stage.arrays()) for stage in prepared.stages.values()])
        return traffic

    def _connect(self, prepared: _Prepared) -> tuple[LocalPipeline, ...]:
        shape = prepared.preparation.placement.shape
        return tuple(
            LocalPipeline(
                self.model, self._buckets, [prepared.stages[d, p] for p in range(shape.stage)], fuse=self._fuse
            )
            for d in range(shape.data)
        )
