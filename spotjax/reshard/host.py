"""The stages and parameters that one process has on its devices, and how they become those of the next placement.

The same for embedded mode, where every instance is in the process, and for a worker, which has one and reads from the
others. Owns all buffers: parameters as shards by device, KV as the pages of stages. Plans nothing, serves no step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import jax
import numpy as np

from spotjax.errors import SliceUnavailable
from spotjax.meshes.instance import DeviceRef
from spotjax.meshes.placement import Placement
from spotjax.meshes.sharding import assemble, own, stage_mesh
from spotjax.meshes.slices import Range
from spotjax.planner.needs import Needs
from spotjax.reshard.kv import KvMover
from spotjax.reshard.parameters import Checkpoint, ParameterMover
from spotjax.reshard.peers import Peers, ShardMemory
from spotjax.reshard.shards import ShardStore, delete_arrays
from spotjax.reshard.transfer import PageTransfer, Preparation, Traffic
from spotjax.runtime.buckets import Buckets
from spotjax.runtime.compiled import CompiledModel
from spotjax.runtime.executables import Devices
from spotjax.runtime.stage import Stage
from spotjax.runtime.warmup import Progress, Step, load, warm

Place = tuple[int, int]
"""Replica and stage number."""
STREAMS = 4
"""Page copies under way at once."""
PAGES_PER_READ = 256
"""Pages that are asked of a peer at once; bounds the host memory that copies take."""


@dataclass(frozen=True)
class Prepared:
    """A placement with all that can be there before decoding stops.

    Attributes:
      preparation: what was asked for.
      store: parameters of the new placement.
      stages: those on local devices; layers whose pages stay in place have none yet.
    """

    preparation: Preparation
    store: ShardStore
    stages: Mapping[Place, Stage]


class Host:
    """One process's part of the current placement and of the one being prepared. Calls block.

    Args:
      model: compiled functions.
      buckets: shapes that steps are padded to.
      checkpoint: source of parameters that no device has.
      devices: the jax devices of every instance of this process; of a TPU slice, those of its other hosts, too.
      peers: other processes' instances, None if there are none.
      memory: where parameter shards are put together.

    Attributes:
      placement: the current one, None before the first.
      stages: the current ones on local devices.
      store: parameters on local devices.
    """

    def __init__(
        self,
        model: CompiledModel,
        buckets: Buckets,
        checkpoint: Checkpoint,
        devices: Mapping[str, Devices],
        peers: Peers | None = None,
        memory: ShardMemory | None = None,
    ) -> None:
        self.model = model
        self.placement: Placement | None = None
        self.stages: Mapping[Place, Stage] = {}
        self.store = ShardStore({})
        self.prepared: Prepared | None = None
        self._dead: set[Place] = set()
        """Current stages whose buffers are deleted."""
        self.kv = KvMover(model)
        self._buckets, self._devices, self._peers = buckets, devices, peers
        self._compiled_for: set[int] = set()
        self._loading = ThreadPoolExecutor(1, thread_name_prefix="load")
        self._parameters = ParameterMover(model.spec, model.dtype, checkpoint, self._device, peers, memory)

    def compile_for(self, tensor: int, progress: Progress | None = None) -> None:
        """Compiles all that stages of that tensor degree run, unless that was done; every place can load it then."""
        if tensor in self._compiled_for:
            return
        groups = [d[start : start + tensor] for d in self._devices.values() for start in range(0, len(d), tensor)]
        groups = [group for group in groups if len(group) == tensor and own(group)]
        warm(self.model, self._buckets, groups[:1], progress=progress)
        self._compiled_for.add(tensor)
        for group in groups[1:]:
            self._loading.submit(warm, self.model, self._buckets, [group], 1)

    def held(self) -> dict[DeviceRef, Needs]:
        """Which parts of parameters each device has."""
        return {
            device: {name: shard.index for name, shard in self.store.at(device).items()}
            for device in self.store.devices()
        }

    def prepare(self, preparation: Preparation, steps: Iterable[Step]) -> Traffic:
        """Brings parameters into place and makes room for KV, while decoding may go on.

        Args:
          preparation: replaces an earlier one.
          steps: what will soon be run, and is made ready to run on the new stages.

        Raises: see ``ParameterMover.carry_out``.
        """
        self.prepared = None
        self.stages = {place: stage for place, stage in self.stages.items() if place not in self._dead}
        traffic, placement = Traffic(), preparation.placement
        self.compile_for(placement.shape.tensor)
        store = self._parameters.carry_out(
            preparation.plan.moves, preparation.needs, placement.shape.tensor, self.store, traffic
        )
        stages: dict[Place, Stage] = {}
        carried = {new: old for old, new in preparation.carried.items()}
        for data in range(placement.shape.data):
            for number in range(placement.shape.stage):
                if all(self._device(reference) is None for reference in placement.group(data, number)):
                    continue
                if data in carried:
                    stages[data, number] = self.stages[carried[data], number]
                else:
                    stages[data, number] = self._build_stage(placement, store, data, number)
        for (data, _), stage in stages.items():
            for layer in range(*stage.layers):
                if data not in carried and self._in_place(preparation, data, layer, stage) is None:
                    stage.pages[layer] = stage.empty_pages()
        load(self.model, [stage.devices for stage in stages.values()], steps)
        self.prepared = Prepared(preparation, store, stages)
        return traffic

    def copy_pages(self, transfers: Sequence[PageTransfer]) -> Traffic:
        """Copies KV pages into the prepared stages, while decoding may go on."""
        return self._move_pages(transfers, final=False)

    def switch(self, transfers: Sequence[PageTransfer]) -> Traffic:
        """Completes the KV of the prepared stages; no step may run on stages that are not carried over. Repeatable."""
        return self._move_pages(transfers, final=True)

    def adopt(self) -> None:
        """Makes the prepared placement the current one, after ``switch``. Devices without a part in it keep theirs."""
        assert self.prepared is not None, "prepare comes before adopt"
        self.placement, self.stages = self.prepared.preparation.placement, self.prepared.stages
        self.store, self.prepared = self.prepared.store.over(self.store), None
        self._dead = set()
        self._parameters.settle()

    def clear(self) -> None:
        """Gives up current and prepared stages with their KV; parameters stay as a source."""
        self.placement, self.stages, self.prepared = None, {}, None
        self._parameters.settle()

    def close(self) -> None:
        """Frees everything and ends all threads."""
        self.clear()
        self.store = ShardStore({})
        self._loading.shutdown(wait=True, cancel_futures=True)
        self.model.executables.close()

    def lose(self, instance: str) -> None:
        """Deletes the buffers of an instance here and now, whoever uses them, as if its machine were gone.

        Whoever reads them just now fails. The next preparation, planned without them, finds no such stages any more.
        """
        gone = set(self._devices[instance])
        stages = [*self.stages.values(), *(self.prepared.stages.values() if self.prepared is not None else ())]
        stages = [stage for stage in stages if not gone.isdisjoint(stage.devices)]
        self._dead |= {place for place, stage in self.stages.items() if stage in stages}
        with ExitStack() as no_calls:
            for devices in {stage.devices for stage in stages}:
                no_calls.enter_context(self.model.calls(devices))
            for stage in stages:
                delete_arrays(stage.arrays())
            self.store = self.store.without(instance)
            self._parameters.lose(instance)
            if self.prepared is not None:
                self.prepared = replace(self.prepared, store=self.prepared.store.without(instance))

    def read_pages(self, replica: int, layers: Range, pages: Sequence[int]) -> np.ndarray:
        """KV pages of some layers of a replica's current stage, as ``KvMover.host_pages`` lays them out.

        Of a stage on several hosts of a TPU slice, the kv heads that are on this one; the others stay zero.

        Raises:
          SliceUnavailable: the stage that has these layers is not here.
        """
        flat, views = self.kv.host_pages(layers[1] - layers[0], len(pages))
        for layer, view in zip(range(*layers), views, strict=True):
            stage = self._local_stage(replica, layer)
            if stage is None:
                raise SliceUnavailable(f"layer {layer} of replica {replica} is not on this instance")
            self.kv.read(stage, layer, pages, view)
        return flat

    def _device(self, reference: DeviceRef) -> jax.Device | None:
        """The jax device, if it belongs to this process."""
        group = self._devices.get(reference.instance, ())
        return next(iter(own(group[reference.index : reference.index + 1])), None)

    def _build_stage(self, placement: Placement, store: ShardStore, data: int, number: int) -> Stage:
        """A stage over buffers that are in place, without KV."""
        group = placement.group(data, number)
        devices = tuple(self._devices[reference.instance][reference.index] for reference in group)
        mesh = stage_mesh(devices)
        parameters = {}
        here = [reference for reference in group if self._device(reference) is not None]
        for array in self.model.spec.parameters:
            if store.get(here[0], array.name) is not None:
                shards = [store.at(reference)[array.name].buffer for reference in here]
                parameters[array.name] = assemble(array, self.model.spec, mesh, shards)
        last = number == placement.shape.stage - 1
        return Stage(self.model, devices, placement.layers[number], first=number == 0, last=last, parameters=parameters)

    def _in_place(self, preparation: Preparation, data: int, layer: int, stage: Stage) -> Stage | None:
        """The current stage whose pages of that layer the new replica ``data`` goes on with where they are, if any."""
        for old, new in preparation.heirs.items():
            if new == data:
                source = self._local_stage(old, layer)
                return source if source is not None and source.devices == stage.devices else None
        return None

    def _local_stage(self, replica: int, layer: int) -> Stage | None:
        """The current stage of a replica that has the layer, if it is on local devices."""
        return next(
            (s for (data, _), s in self.stages.items() if data == replica and s.layers[0] <= layer < s.layers[1]), None
        )

    def _move_pages(self, transfers: Sequence[PageTransfer], *, final: bool) -> Traffic:
        assert self.prepared is not None, "prepare comes before moving pages"
        prepared, jobs = self.prepared, list[Callable[[Traffic], None]]()
        kept: dict[tuple[Place, int], Stage] = {}
        for place, stage in prepared.stages.items():
            if place[0] in prepared.preparation.carried.values():
                continue
            for layer in range(*stage.layers):
                source = self._in_place(prepared.preparation, place[0], layer, stage)
                if source is not None:
                    kept[place, layer] = source
                    if final:
                        stage.pages[layer] = source.pages[layer]
        for place, stage in prepared.stages.items():
            for transfer in transfers:
                if transfer.new == place[0] and transfer.pages:
                    inherited = prepared.preparation.heirs.get(transfer.old) == place[0]
                    layers = [n for n in range(*stage.layers) if not (inherited and (place, n) in kept)]
                    jobs += self._copies(transfer, stage, layers)
        counted = [Traffic() for _ in jobs]  # one each, because they run at once
        try:
            with ThreadPoolExecutor(STREAMS, thread_name_prefix="pages") as streams:
                for copied in [streams.submit(job, count) for job, count in zip(jobs, counted, strict=True)]:
                    copied.result()
        finally:
            if final:
                for (place, layer), source in kept.items():
                    # writing donated the old ones; a switch can be repeated, and one that failed be followed by another
                    source.pages[layer] = prepared.stages[place].pages[layer]
        if final:
            stopped = [s for (data, _), s in prepared.stages.items() if data in prepared.preparation.changed]
            jax.block_until_ready([list(stage.arrays()) for stage in stopped])
        return Traffic(moved=sum(count.moved for count in counted))

    def _copies(
        self, transfer: PageTransfer, stage: Stage, layers: Sequence[int]
    ) -> Iterator[Callable[[Traffic], None]]:
        """What has to be done for one transfer into one stage, in parts that can be done at once."""
        remote: dict[int, list[int]] = {}
        for layer in layers:
            source = self._local_stage(transfer.old, layer)
            if source is not None and self.kv.covers(source, stage):
                yield partial(self.kv.move, transfer, layer, source, stage)
            else:
                remote.setdefault(self._stage_number(layer), []).append(layer)
        for number, theirs in remote.items():
            for start in range(0, len(transfer.pages), PAGES_PER_READ):
                part = slice(start, start + PAGES_PER_READ)
                some = replace(transfer, pages=transfer.pages[part], owners=transfer.owners[part])
                yield partial(self._fetch, number, (theirs[0], theirs[-1] + 1), some, stage)

    def _stage_number(self, layer: int) -> int:
        """The stage of the current placement that has a layer."""
        assert self.placement is not None, "KV comes from a current placement"
        return next(n for n, (start, stop) in enumerate(self.placement.layers) if start <= layer < stop)

    def _fetch(self, number: int, layers: Range, transfer: PageTransfer, stage: Stage, traffic: Traffic) -> None:
        """Copies pages of some layers into a stage here, from another process's stage or from a backup of it."""
        assert self._peers is not None, "all instances are in this process"
        assert self.placement is not None and self.prepared is not None, "KV comes from a current placement"
        flat, views = self.kv.host_pages(layers[1] - layers[0], len(transfer.pages))
        backup = self.prepared.preparation.survivors.backups.get((transfer.old, number))
        if backup is not None:
            self._peers.read_backup(backup, layers, transfer.owners, flat)
        else:
            holder = self.placement.group(transfer.old, number)[0].instance
            self._peers.read_pages(holder, transfer.old, layers, [old for old, _ in transfer.pages], flat)
        for layer, view in zip(range(*layers), views, strict=True):
            self.kv.write(stage, layer, [new for _, new in transfer.pages], view)
        traffic.moved += flat.nbytes
