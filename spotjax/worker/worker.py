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
import numpy as np

from spotjax.checkpoint.kv_format import KvFormat
from spotjax.errors import ConfigError, ConnectionLost, PeerUnreachable, SliceUnavailable
from spotjax.meshes.instance import DeviceRef
from spotjax.meshes.sharding import own
from spotjax.meshes.slices import ArraySlice
from spotjax.models.catalog import open_model
from spotjax.models.fingerprint import fingerprint
from spotjax.models.spec import ModelSpec
from spotjax.planner.holdings import StackedNeeds
from spotjax.planner.plan import MigrationPlan
from spotjax.protocol import control, reads
from spotjax.reshard.host import Host
from spotjax.reshard.parameter_store import ParameterStore
from spotjax.reshard.shards import Shard, ShardStore
from spotjax.reshard.transfer import PageTransfer, Preparation, Survivors, Traffic
from spotjax.runtime.buckets import Buckets
from spotjax.runtime.compiled import CompiledModel
from spotjax.runtime.executables import Devices
from spotjax.worker.backup import Backup
from spotjax.worker.copies import Copies
from spotjax.worker.executor import CONTROLLER, Role, StageExecutor
from spotjax.worker.ledger import StageLedger
from spotjax.worker.links import Links
from spotjax.worker.memory import StoreMemory
from spotjax.worker.peers import RemotePeers

if TYPE_CHECKING:
    from collections.abc import Buffer

    from spotjax.worker.saving import KvSave

log = logging.getLogger(__name__)


class Worker:
    """One instance's model. ``load`` makes one.

    Attributes:
      setup: what it serves.
      executor: runs its stages.
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
        self.setup, self.executor = setup, executor
        self._name, self._host, self._peers, self._links = name, host, peers, links
        self._store, self._memory = store, memory
        self._copies = copies
        self._backup: Backup | None = None
        self._keeper = ""
        self._save: KvSave | None = None
        self._ledgers: dict[tuple[int, int], StageLedger] = {}
        """Of the current stages, by replica and stage number."""

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

        Raises:
          CheckpointError: the model cannot be loaded.
          ConfigError: its weights are not those that the controller has, or another process has the store.
        """
        dtype = np.dtype(setup.dtype)
        model = open_model(setup.model)
        own_weights = fingerprint(model.checkpoint, dtype)
        if own_weights != setup.fingerprint:
            raise ConfigError(
                f"the weights of {setup.model} on this machine are not those that the controller has; put the same "
                "files on both"
            )
        spec = ModelSpec(model.checkpoint.spec.config, dtype_bytes=dtype.itemsize)
        compiled = CompiledModel(spec, setup.pages, setup.page_size, setup.max_positions, dtype, programs)
        buckets = Buckets(setup.max_batch, setup.prefill_tokens, setup.page_size, setup.max_positions)
        store = ParameterStore.open(stores, cls.store_name(name), own_weights) if stores is not None else None
        memory = StoreMemory(store) if store is not None else None
        host = Host(compiled, buckets, model.checkpoint, {name: devices}, peers, memory)
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
        kept = control.PlacementMessage.of(placement) if placement is not None and self._ledgers else None
        return control.Ready(held, self._compiled, kept)

    async def carry_out(self, command: control.Command) -> control.Done:
        """One command.

        Raises:
          PeerUnreachable: another worker is needed and cannot be read from.
          SliceUnavailable: this worker does not have what the plan says.
        """
        traffic = Traffic()
        self._peers.begin()
        match command:
            case control.Prepare():
                traffic = await asyncio.to_thread(self._prepare, command)
            case control.CopyPages():
                traffic = await asyncio.to_thread(self._host.copy_pages, command.transfers)
            case control.Switch():
                self._make_way(command.transfers)
                traffic = await asyncio.to_thread(self._host.switch, command.transfers)
            case control.Adopt():
                await self._adopt(command)
            case control.Clear():
                await asyncio.to_thread(self.clear)
            case control.Reunite():
                remains = await asyncio.to_thread(self._reunite, command)
                return control.Done(command.id, remains=remains, compiled=self._compiled)
            case control.SaveKv():
                await asyncio.to_thread(self._save_kv, command)
            case control.SaveParameters():
                traffic = Traffic(moved=await asyncio.to_thread(self._save_parameters, command.path))
            case control.Coverage():
                positions = self._copies.positions(command.layers, command.sequences)
                return control.Done(command.id, positions=positions, compiled=self._compiled)
        return control.Done(command.id, traffic.moved, traffic.loaded, self._compiled)

    def provide(self, what: bytes) -> Sequence[Buffer]:
        """Answers a bulk read of another worker; called in threads.

        Raises:
          SliceUnavailable: it is not here.
        """
        wanted = reads.decode(what)
        if isinstance(wanted, reads.ReadBackup):
            return [self._copies.read(wanted.layers, wanted.owners).data]
        if isinstance(wanted, reads.ReadSlice):
            source = DeviceRef(self._name, wanted.device)
            content = self._host.store.read(source, ArraySlice(wanted.name, wanted.index))
            return [np.ascontiguousarray(content).reshape(-1).view(np.uint8).data]
        placement = self._host.placement
        if placement is None or placement.epoch != wanted.epoch:
            raise SliceUnavailable(f"KV of epoch {wanted.epoch} is not here any more")
        return [self._host.read_pages(wanted.replica, wanted.layers, wanted.pages).data]

    def forget(self, sequences: Sequence[int]) -> None:
        """These sequences have ended: their copies are of no use any more."""
        self._copies.store.forget(sequences)
        for ledger in self._ledgers.values():
            ledger.forget(sequences)

    def supersede(self) -> None:
        """Puts an early end to a command that reads from others, or saves."""
        self._peers.supersede()
        if self._save is not None:
            self._save.hurry()

    def pause(self) -> None:
        """The controller is gone: keeps everything for the next one, and copies and reports nothing meanwhile."""
        self._quieten()

    def serve(self, welcome: control.Welcome) -> None:
        """Works for a service from now on; KV stays if it was that service's before and may be of use to it."""
        if not welcome.reunion or welcome.service != self._copies.store.service:
            self.clear()
        self._copies.store.service = welcome.service
        self._copies.use_save(welcome.save, self._kv_format(), dict(welcome.saved))

    def _kv_format(self) -> KvFormat:
        c, setup, service = self._host.model.spec.config, self.setup, self._copies.store.service
        return KvFormat(service, setup.fingerprint, c.layers, c.kv_heads, c.head_size, setup.page_size, setup.dtype)

    def clear(self) -> None:
        """Gives up all stages, and what others backed up here; parameters stay."""
        self._quieten()
        self._copies.store.clear()
        self._clear_stages()

    def _quieten(self) -> None:
        self._links.onward = ()
        self._end_backup()
        if self._save is not None:
            self._save.hurry()

    def _clear_stages(self) -> None:
        self.executor.close()
        self._ledgers = {}
        self._host.clear()

    def _reunite(self, command: control.Reunite) -> tuple[control.StageRemains, ...]:
        """What is there for a controller that goes on where one before it ended."""
        self.executor.close()  # what was on its way then is not to change anything any more
        certain, placement = dict(command.sequences), self._host.placement
        self._copies.store.keep(certain)
        if placement is None or placement.epoch != command.epoch:
            self._clear_stages()
        for ledger in self._ledgers.values():
            ledger.keep(certain)
        return tuple(control.StageRemains(*place, ledger.remains()) for place, ledger in self._ledgers.items())

    def close(self, *, for_good: bool) -> None:
        """Frees everything; the store stays for a later process unless this end is ``for_good``."""
        self.clear()
        self._host.close()
        if self._memory is not None:
            self._memory.close()
        if self._store is not None:
            self._store.remove() if for_good else self._store.close()

    @property
    def _compiled(self) -> int:
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

    def _save_kv(self, command: control.SaveKv) -> None:
        from spotjax.worker.saving import KvSave  # Orbax, which most workers never need

        if self._save is not None and self._save.path != command.path:
            self._save.finish(0)  # nobody asked for its end
            self._save = None
        if self._save is None:
            self._save = KvSave(self._host.kv, command.path, self._name, self._kv_format())
            self._save.install(self._ledgers.values())
        if command.last:
            saving, self._save = self._save, None
            saving.finish(command.seconds)

    def _save_parameters(self, path: str) -> int:
        from spotjax.checkpoint.from_host import save_parameters

        return save_parameters(self._host, path)

    def _make_way(self, transfers: Sequence[PageTransfer]) -> None:
        """Tells ledgers which pages KV of other replicas comes into, where a replica goes on with the pages it has."""
        heirs = self._host.prepared.preparation.heirs if self._host.prepared is not None else {}
        for (data, _), ledger in self._ledgers.items():
            coming = [t for t in transfers if t.old != data and t.new == heirs.get(data)]
            ledger.overwrite(new for transfer in coming for _, new in transfer.pages)

    async def _adopt(self, command: control.Adopt) -> None:
        self._host.adopt()
        self._back_up_to(command.keeper, command.bandwidth)
        placement = self._host.placement
        assert placement is not None, "it was just adopted"
        roles, last, onwards = {}, placement.shape.stage - 1, set[str]()
        before, self._ledgers = self._ledgers, {}
        for (data, number), stage in self._host.stages.items():
            onward = CONTROLLER if number == last else placement.group(data, number + 1)[0].instance
            if stage.own == stage.devices:  # on a TPU slice, no host has all kv heads
                known = next((ledger for ledger in before.values() if ledger.stage is stage), None)
                self._ledgers[data, number] = known or StageLedger(stage, self._host.model.page_size)
                self._ledgers[data, number].epoch = placement.epoch
            ledger = self._ledgers.get((data, number))
            roles[command.pipelines[data], number] = Role(stage, number, number == last, onward, ledger)
            if onward != self._name:
                onwards.add(onward)
        self.executor.install(roles)
        for copier in (self._backup, self._save):
            if copier is not None:
                copier.install(self._ledgers.values())
        if self._memory is not None:
            self._memory.keep(self._host.held())
        shown = ", ".join(f"{data}.{number}" for data, number in sorted(self._host.stages)) or "none"
        log.info("epoch adopted", extra={"epoch": placement.epoch, "stages": shown, "keeper": self._keeper or "none"})
        self._links.onward = onwards
        for instance in sorted(onwards):  # last, because other replicas must run even if one of these is gone
            try:
                await self._links.connect(instance)
            except ConnectionLost as problem:
                raise PeerUnreachable(instance, problem) from problem

    def _back_up_to(self, keeper: str, bandwidth: int) -> None:
        """Has KV copied to that instance from now on; anew if it was another one before, or has been away.

        Waits for nobody: streams stand still meanwhile, and whoever kept copies before may be out of reach.
        """
        if keeper == self._keeper and self._backup is not None and self._links.connected(keeper):
            return
        self._end_backup()
        if keeper:
            push = partial(self._links.push, keeper)
            self._backup = Backup(self._host.kv, self._copies.store.service, push, bandwidth)
            self._keeper = keeper

    def _end_backup(self) -> None:
        if self._backup is not None:
            self._backup.stop()
        self._backup, self._keeper = None, ""


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
