"""What one worker has, and how it carries out the controller's commands. Speaks with nobody: see ``session``.

Model, parameters, stages and their executor for one instance. Survives sessions: a worker that lost its controller
keeps its parameters and offers them when it registers again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import msgspec
import numpy as np

from spotjax.checkpoint.kv_format import KvFormat
from spotjax.errors import ConfigError, ConnectionLost, PeerUnreachable, SliceUnavailable, TransportError
from spotjax.meshes.instance import DeviceRef
from spotjax.meshes.sharding import own
from spotjax.meshes.slices import ArraySlice
from spotjax.models.catalog import open_model
from spotjax.models.fingerprint import fingerprint
from spotjax.models.paced import PacedCheckpoint
from spotjax.models.quantized_checkpoint import quantized
from spotjax.models.spec import ModelSpec
from spotjax.planner.needs import StackedNeeds
from spotjax.planner.plan import MigrationPlan
from spotjax.protocol import control, reads
from spotjax.reshard.host import Host
from spotjax.reshard.parameter_store import ParameterStore
from spotjax.reshard.shards import Shard, ShardStore
from spotjax.reshard.transfer import Preparation, Survivors, Traffic
from spotjax.runtime.attention.choice import AttentionSetting, choose_attention
from spotjax.runtime.buckets import Buckets
from spotjax.runtime.compiled import CompiledModel
from spotjax.runtime.executables import Devices
from spotjax.runtime.native.choice import KernelSetting, attention_of, choose_kernels, products_of
from spotjax.worker.copies import Copies
from spotjax.worker.executor import CONTROLLER, Role, StageExecutor
from spotjax.worker.kv_keeping import KvKeeping
from spotjax.worker.links import Links
from spotjax.worker.memory import StoreMemory
from spotjax.worker.peers import RemotePeers

if TYPE_CHECKING:
    from collections.abc import Buffer

log = logging.getLogger(__name__)


class Worker:
    """One instance's model. ``load`` makes one.

    Attributes:
      setup: what it serves.
      executor: runs its stages.
      traffic: bytes that commands have brought here.
    """

    def __init__(
        self,
        name: str,
        setup: control.ModelSetup,
        host: Host,
        executor: StageExecutor,
        peers: RemotePeers,
        links: Links,
        copies: Copies,
        store: ParameterStore | None,
        memory: StoreMemory | None,
    ) -> None:
        self.setup, self.executor, self.traffic = setup, executor, Traffic()
        self._name, self._host, self._peers, self._links = name, host, peers, links
        self._store, self._memory = store, memory
        c = host.model.spec.config
        form = KvFormat("", setup.fingerprint, c.layers, c.kv_heads, c.head_size, setup.page_size, setup.dtype)
        self._kv = KvKeeping(name, host.kv, form, copies, links)

    @classmethod
    def load(
        cls,
        name: str,
        devices: Devices,
        setup: control.ModelSetup,
        peers: RemotePeers,
        links: Links,
        copies: Copies,
        make_executor: Callable[[CompiledModel, int], StageExecutor],
        programs: Path | None,
        stores: Path | None,
        read_bandwidth: int = 0,
        attention: AttentionSetting = "auto",
        kernels: KernelSetting = "auto",
    ) -> Worker:
        """Opens the model, compiles and attaches to what an earlier process of this name left. Takes long, blocks.

        Args:
          name: of the instance.
          devices: its devices.
          setup: what to serve.
          peers: the other workers, to read from.
          links: the same, to send steps to.
          copies: what there is of their KV here.
          make_executor: for the compiled functions and the longest sequence.
          programs: directory of compiled programs, None for none.
          stores: directory of parameter stores, None for none.
          read_bandwidth: bytes per second at which parameters are read from the model at most; 0 for no limit.
          attention: what computes it.
          kernels: what computes products, and attention in the place of XLA, on CPUs.

        Raises:
          CheckpointError: the model cannot be loaded.
          ConfigError: its weights are not those that the controller has, another process has the store, or attention
            or products cannot be computed as told.
        """
        dtype = np.dtype(setup.dtype)
        model = open_model(setup.model)
        own_weights = fingerprint(quantized(model.checkpoint, setup.quantization), dtype)
        if own_weights != setup.fingerprint:
            raise ConfigError(
                f"the weights of {setup.model} on this machine are not those that the controller has; put the same "
                "files on both"
            )
        spec = ModelSpec(model.checkpoint.spec.config, dtype.itemsize, setup.quantization)
        native = choose_kernels(kernels, devices[0])
        backend = choose_attention(attention, spec, setup.page_size, dtype, devices[0])
        backend, products = attention_of(native, backend, attention), products_of(native)
        compiled = CompiledModel(
            spec, setup.pages, setup.page_size, setup.max_positions, dtype, programs, backend, products
        )
        buckets = Buckets(setup.max_batch, setup.prefill_tokens, setup.page_size, setup.max_positions)
        store = ParameterStore.open(stores, cls.store_name(name), own_weights) if stores is not None else None
        memory = StoreMemory(store) if store is not None else None
        stored = PacedCheckpoint(model.checkpoint, read_bandwidth) if read_bandwidth else model.checkpoint
        checkpoint = quantized(stored, setup.quantization)
        host = Host(compiled, buckets, checkpoint, {name: devices}, peers, memory)
        for tensor in setup.degrees:
            host.compile_for(tensor, partial(_log_progress, tensor))
        if store is not None:
            host.store = attach(store, name, devices)
        executor = make_executor(compiled, setup.max_positions)
        return cls(name, setup, host, executor, peers, links, copies, store, memory)

    @classmethod
    def store_name(cls, name: str) -> str:
        """Under which an instance of that name keeps its parameters on this machine."""
        return name

    def ready(self) -> control.Ready:
        """What there is to offer."""
        held = tuple(
            control.Parts(device.index, dict(arrays)) for device, arrays in self._host.held().items() if arrays
        )
        placement = self._host.placement
        kept = control.PlacementMessage.of(placement) if placement is not None and self._kv.ledgers else None
        return control.Ready(held, self.compiled, kept, not self._kv.copies.store.empty)

    async def carry_out(self, command: control.Command) -> control.Done:
        """One command.

        Raises:
          PeerUnreachable: another worker is needed and cannot be read from.
          SliceUnavailable: this worker does not have what the plan says.
        """
        traffic = Traffic()
        if not isinstance(command, control.SaveParameters):  # which goes on beside all others
            self._peers.begin()
        match command:
            case control.Prepare():
                traffic = await asyncio.to_thread(self._prepare, command)
            case control.CopyPages():
                traffic = await asyncio.to_thread(self._host.copy_pages, command.transfers)
            case control.Switch():
                prepared = self._host.prepared
                self._kv.make_way(command.transfers, prepared.preparation.heirs if prepared is not None else {})
                traffic = await asyncio.to_thread(self._host.switch, command.transfers)
            case control.Adopt():
                await self._adopt(command)
            case control.Clear():
                await asyncio.to_thread(self.clear)
            case control.Reunite():
                remains = await asyncio.to_thread(self._reunite, command)
                return control.Done(command.id, remains=remains, compiled=self.compiled)
            case control.SaveKv():
                saved, left_out = await asyncio.to_thread(self._kv.save, command)
                return control.Done(command.id, saved, compiled=self.compiled, left_out=left_out)
            case control.SaveParameters():
                traffic = Traffic(moved=await asyncio.to_thread(self._save_parameters, command.path))
            case control.Coverage():
                positions = await asyncio.to_thread(self._kv.coverage, command)
                return control.Done(command.id, positions=positions, compiled=self.compiled)
        if not isinstance(command, control.SaveParameters):
            self.traffic.moved += traffic.moved
            self.traffic.loaded += traffic.loaded
        return control.Done(command.id, traffic.moved, traffic.loaded, self.compiled)

    def provide(self, what: bytes) -> Sequence[Buffer]:
        """Answers a bulk read of another worker; called in threads.

        Raises:
          SliceUnavailable: it is not here.
          TransportError: this is no question.
        """
        try:
            wanted = reads.decode(what)
        except msgspec.DecodeError as problem:
            raise TransportError(f"a read cannot be understood: {problem}") from problem
        if isinstance(wanted, reads.ReadBackup):
            return [self._kv.copies.read(wanted.layers, wanted.owners).data]
        if isinstance(wanted, reads.ReadSlice):
            source = DeviceRef(self._name, wanted.device)
            content = self._host.store.read(source, ArraySlice(wanted.name, wanted.index))
            return [np.ascontiguousarray(content).reshape(-1).view(np.uint8).data]
        placement = self._host.placement
        if placement is None or placement.epoch != wanted.epoch:
            raise SliceUnavailable(f"KV of epoch {wanted.epoch} is not here any more")
        return [self._host.read_pages(wanted.replica, wanted.layers, wanted.pages).data]

    @property
    def backup_bytes(self) -> int:
        """Memory that copies of other workers' KV take."""
        return self._kv.copies.store.nbytes

    def forget(self, sequences: Sequence[int]) -> None:
        """These sequences have ended: their copies are of no use any more."""
        self._kv.forget(sequences)

    def supersede(self) -> None:
        """Puts an early end to a command that reads from others, or saves KV."""
        self._peers.supersede()
        self._kv.hurry()

    def expect_save(self, path: str) -> None:
        """Puts an early end to a save into any other directory."""
        self._kv.expect_save(path)

    def pause(self) -> None:
        """The controller is gone: keeps everything for the next one, and copies and reports nothing meanwhile."""
        self._links.onward = ()
        self.executor.release()
        self._kv.rest()

    def serve(self, welcome: control.Welcome) -> None:
        """Works for a service from now on; KV stays if it was that service's before and may be of use to it."""
        before = self._kv.service
        if before and not (welcome.reunion and welcome.service == before):
            self.clear()
        self._kv.serve(welcome.service, welcome.epoch)

    def clear(self) -> None:
        """Gives up all stages, and what others backed up here; parameters stay."""
        self._links.onward = ()
        self._kv.clear()
        self.executor.close()
        self._host.clear()

    def _reunite(self, command: control.Reunite) -> tuple[control.StageRemains, ...]:
        """What is there for a controller that goes on where one before it ended."""
        self.executor.close()  # what was on its way then is not to change anything any more
        placement = self._host.placement
        if placement is None or placement.epoch != command.epoch:
            self._kv.ledgers = {}
            self._host.clear()
        self._kv.keep(dict(command.sequences), command.epoch)
        return self._kv.remains()

    def close(self, *, for_good: bool) -> None:
        """Frees everything; the store stays for a later process unless this end is ``for_good``."""
        self.clear()
        self._kv.copies.store.service = ""  # whoever comes next has no KV to give up
        self._host.close()
        if self._memory is not None:
            self._memory.close()
        if self._store is not None:
            self._store.remove() if for_good else self._store.close()

    @property
    def compiled(self) -> int:
        """Functions compiled so far while somebody could have waited."""
        return self._host.model.executables.compiled

    def _prepare(self, command: control.Prepare) -> Traffic:
        placement = command.placement.placement()
        self._host.placement = command.current.placement() if command.current is not None else None
        self._peers.addresses = command.addresses
        self._links.addresses = {**command.addresses, CONTROLLER: self._links.controller}
        self._peers.epoch = self._host.placement.epoch if self._host.placement is not None else 0
        needs = {DeviceRef(self._name, parts.device): StackedNeeds(parts.arrays, {}) for parts in command.needs}
        plan = MigrationPlan(command.transfers, (), 0, 0, 0)
        survivors = Survivors(backups=dict(command.backups))
        preparation = Preparation(placement, needs, plan, command.heirs, command.carried, survivors)
        return self._host.prepare(preparation, command.steps)

    def _save_parameters(self, path: str) -> int:
        from spotjax.checkpoint.from_host import save_parameters

        return save_parameters(self._host, path)

    async def _adopt(self, command: control.Adopt) -> None:
        self._host.adopt()
        placement, stages = self._host.placement, self._host.stages
        assert placement is not None, "it was just adopted"
        self._kv.adopt(stages, placement.epoch, command.keeper, command.bandwidth)
        roles, last, onwards = {}, placement.shape.stage - 1, set[str]()
        for (data, number), stage in stages.items():
            onward = CONTROLLER if number == last else placement.group(data, number + 1)[0].instance
            ledger = self._kv.ledgers.get((data, number))
            roles[command.pipelines[data], number] = Role(stage, number, number == last, onward, ledger, data)
            if onward != self._name:
                onwards.add(onward)
        self.executor.install(roles)
        if self._memory is not None:
            self._memory.keep(self._host.held())
        shown, keeper = ", ".join(f"{data}.{number}" for data, number in sorted(stages)) or "none", self._kv.keeper
        log.info("epoch adopted", extra={"epoch": placement.epoch, "stages": shown, "keeper": keeper or "none"})
        self._links.onward = onwards
        for instance in sorted(onwards):  # last, because other replicas must run even if one of these is gone
            try:
                await self._links.connect(instance)
            except ConnectionLost as problem:
                raise PeerUnreachable(instance, problem) from problem


def attach(store: ParameterStore, name: str, devices: Devices) -> ShardStore:
    """The shards that a store has, on the devices that they were on."""

    held: dict[DeviceRef, dict[str, Shard]] = {}
    for stored in store.attached():
        device, array, index = stored.key
        if own(devices[device : device + 1]):
            buffer = jax.device_put(stored.content, devices[device])
            held.setdefault(DeviceRef(name, device), {})[array] = Shard(index, buffer)
    if held:
        log.info("attached to parameters that an earlier process left", extra={"devices": len(held)})
    return ShardStore(held)


def _log_progress(tensor: int, done: int, total: int) -> None:
    if done == total or done % 50 == 0:
        log.info("tensor degree %d: %d of %d functions compiled", tensor, done, total)
