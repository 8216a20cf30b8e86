"""The cluster of embedded mode: every instance is a group of this process's devices. A ``fleet.cluster.Cluster``.

What is on the devices is ``Host``'s; here are the pipelines over it and what becomes of them when an instance is lost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from spotjax.errors import CheckpointError, InstanceLost, SliceUnavailable
from spotjax.meshes.instance import DeviceRef
from spotjax.meshes.placement import Placement
from spotjax.planner.needs import Needs
from spotjax.reshard.host import Host
from spotjax.reshard.parameters import Checkpoint
from spotjax.reshard.transfer import PageTransfer, Preparation, Remains, Survivors, Traffic
from spotjax.runtime.buckets import Buckets
from spotjax.runtime.compiled import CompiledModel
from spotjax.runtime.executables import Devices
from spotjax.runtime.pipeline import LocalPipeline
from spotjax.runtime.warmup import Progress, Step

if TYPE_CHECKING:
    from spotjax.checkpoint.saves import Save

R = TypeVar("R")


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
        self._host = Host(model, buckets, checkpoint, devices)
        self._lost: set[str] = set()

    async def survivors(self, hurt: Mapping[int, Mapping[int, int]]) -> Survivors:
        """See ``Cluster.survivors``: in one process there is nobody to keep copies."""
        return Survivors()

    async def save_kv(self, path: str, seconds: float, *, last: bool) -> None:
        """See ``Cluster.save_kv``: one process keeps no account of whose pages are whose, so none is saved."""
        return None

    def use_save(self, save: Save) -> None:
        """See ``Cluster.use_save``: whoever read it would be this process."""

    async def save_parameters(self, path: str) -> int:
        """See ``Cluster.save_parameters``."""
        from spotjax.checkpoint.from_host import save_parameters  # Orbax, which most servers never need

        try:
            return await asyncio.to_thread(save_parameters, self._host, path)
        except (RuntimeError, SliceUnavailable) as problem:
            raise CheckpointError(f"an instance was lost meanwhile: {problem}") from problem

    def forget(self, sequences: Sequence[int]) -> None:
        """See ``Cluster.forget``: nothing is kept of them."""

    def joinable(self, instance: str) -> bool:
        """See ``Cluster.joinable``: devices of this process are always ready."""
        return True

    def held(self) -> Mapping[DeviceRef, Needs]:
        """See ``Cluster.held``."""
        return self._host.held()

    def evict(self, instance: str, *, at_once: bool) -> None:
        """See ``Cluster.evict``: ``lose`` is all there is to it."""

    def join(self, instance: str) -> None:
        """An instance of that name is there (again), with empty memory."""
        self._lost.discard(instance)

    def compile_for(self, tensor: int, progress: Progress | None = None) -> None:
        """See ``Host.compile_for``."""
        self._host.compile_for(tensor, progress)

    async def prepare(self, preparation: Preparation) -> Traffic:
        """See ``Cluster.prepare``."""
        work = partial(self._host.prepare, preparation, self._recent_steps())
        return await self._run(work, preparation.placement)

    async def copy_pages(self, transfers: Sequence[PageTransfer]) -> Traffic:
        """See ``Cluster.copy_pages``."""
        return await self._run(partial(self._host.copy_pages, transfers), self._next.placement)

    async def switch(self, transfers: Sequence[PageTransfer]) -> tuple[Sequence[LocalPipeline], Traffic]:
        """See ``Cluster.switch``."""
        preparation = self._next
        traffic = await self._run(partial(self._host.switch, transfers), preparation.placement)
        self._host.adopt()
        carried = {new: self.pipelines[old] for old, new in preparation.carried.items()}
        retired = [pipeline for pipeline in self.pipelines if pipeline not in carried.values()]
        self.pipelines = tuple(
            carried.get(data) or self._connect(data) for data in range(preparation.placement.shape.data)
        )
        for pipeline in retired:
            pipeline.close()
        return self.pipelines, traffic

    async def reunite(self, sequences: Mapping[int, int]) -> Remains | None:
        """See ``Cluster.reunite``: what was on the devices of a process went with it."""
        return None

    def lose(self, instance: str) -> None:
        """See ``Cluster.lose``: the instance's buffers are deleted here and now, whoever uses them."""
        self._lost.add(instance)
        gone = set(self._devices[instance])
        for pipeline in self.pipelines:
            if any(not gone.isdisjoint(stage.devices) for stage in pipeline.stages):
                pipeline.lose(instance)
        self._host.lose(instance)

    async def close(self) -> None:
        """See ``Cluster.close``."""
        for pipeline in self.pipelines:
            pipeline.close()
        self.pipelines = ()
        self._host.close()

    @property
    def _next(self) -> Preparation:
        assert self._host.prepared is not None, "prepare comes first"
        return self._host.prepared.preparation

    async def _run(self, work: Callable[[], R], placement: Placement) -> R:
        """Does blocking work in a thread; a loss that breaks it, or its result, becomes InstanceLost."""
        lost_before = frozenset(self._lost)
        try:
            result = await asyncio.to_thread(work)
        except Exception as problem:
            # jax raises one of several errors when a buffer is deleted under its reader, and its stage may be gone
            if lost := self._lost - lost_before:
                self._host.prepared = None
                raise InstanceLost(f"instance {min(lost)} was lost during a migration") from problem
            raise
        targets = {device.instance for device in placement.devices.values()}
        if lost := self._lost & targets:
            self._host.prepared = None
            raise InstanceLost(f"instance {min(lost)} was lost during a migration")
        return result

    def _recent_steps(self) -> list[Step]:
        # copied first: pipelines add to it meanwhile
        return [step for pipeline in self.pipelines for step in tuple(pipeline.recent)]

    def _connect(self, data: int) -> LocalPipeline:
        stages = [stage for (replica, _), stage in sorted(self._host.stages.items()) if replica == data]
        return LocalPipeline(self.model, self._buckets, stages, fuse=self._fuse)
