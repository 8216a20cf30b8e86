"""The cluster of fleet mode: instances are workers in processes of their own. A ``fleet.cluster.Cluster``.

Turns what the controller wants into commands to all workers, and waits for all. What cannot be done because a worker is
gone, or cannot be reached by another, becomes the loss of an instance; then the controller plans again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from spotjax.checkpoint.saves import Save
from spotjax.errors import ConnectionLost, InstanceLost
from spotjax.fleet.cluster import SavedKv
from spotjax.fleet.keepers import choose_keepers
from spotjax.fleet.remote_kv import RemoteKv
from spotjax.fleet.remote_pipeline import RemotePipeline
from spotjax.fleet.sessions import CommandFailed, Sessions, WorkerSession
from spotjax.meshes.instance import DeviceRef
from spotjax.meshes.placement import Placement
from spotjax.planner.needs import Needs, StackedNeeds
from spotjax.protocol import control
from spotjax.protocol.steps import MaskHeader, ResultHeader, StepHeader
from spotjax.reshard.transfer import PageTransfer, Preparation, Remains, Survivors, Traffic
from spotjax.runtime.buckets import Buckets
from spotjax.transport.connection import Connection
from spotjax.transport.endpoint import Endpoint

log = logging.getLogger(__name__)

CONNECT_SECONDS = 2.0
NOBODY_WAITS = -1
"""As the id of a command whose answer is not waited for."""


@dataclass(frozen=True)
class _Change:
    """A preparation and the workers that carry it out. Who registers anew meanwhile knows nothing of it."""

    preparation: Preparation
    members: Mapping[str, WorkerSession]


class RemoteCluster:
    """All workers' devices.

    Args:
      sessions: the workers.
      endpoint: of this process.
      buckets: shapes that steps are padded to.
      patience: seconds after which a worker that another cannot reach counts as lost, if it did not turn out to be.
      fuse: see ``RemotePipeline``.
      backup: whether workers copy KV to each other.
      bandwidth: bytes per second that each may spend on it; 0 for no limit.
      layers: of the model.
      save: KV that was saved before this controller started, which all workers can read.

    Attributes:
      pipelines: one for every replica of the current placement.
    """

    def __init__(
        self,
        sessions: Sessions,
        endpoint: Endpoint,
        buckets: Buckets,
        patience: float,
        *,
        fuse: bool,
        backup: bool,
        bandwidth: int,
        layers: int,
        save: Save | None = None,
    ) -> None:
        self.pipelines: tuple[RemotePipeline, ...] = ()
        self._sessions, self._endpoint, self._buckets = sessions, endpoint, buckets
        self._patience, self._fuse, self._backup, self._bandwidth = patience, fuse, backup, bandwidth
        self._kv = RemoteKv(sessions, layers, save)
        self._compiled: dict[str, int] = {}
        self._prepared: _Change | None = None
        self._held: dict[DeviceRef, Needs] = {}
        self._connections: dict[str, Connection] = {}

    async def survivors(self, hurt: Mapping[int, Mapping[int, int]]) -> Survivors:
        """See ``Cluster.survivors``."""
        return await self._kv.survivors(hurt)

    async def reunite(self, sequences: Mapping[int, int]) -> Remains | None:
        """See ``Cluster.reunite``."""
        return await self._kv.reunite(sequences)

    def forget(self, sequences: Sequence[int]) -> None:
        """See ``Cluster.forget``."""
        self._kv.forget(sequences)

    async def save_kv(self, path: str, seconds: float, *, last: bool) -> SavedKv:
        """See ``Cluster.save_kv``."""
        return await self._kv.save_kv(path, seconds, last=last)

    def use_save(self, save: Save) -> None:
        """See ``Cluster.use_save``."""
        self._kv.use_save(save)

    async def save_parameters(self, path: str) -> int:
        """See ``Cluster.save_parameters``."""
        return await self._kv.save_parameters(path)

    def held(self) -> Mapping[DeviceRef, Needs]:
        """See ``Cluster.held``."""
        return self._held

    def joinable(self, instance: str) -> bool:
        """See ``Cluster.joinable``."""
        session = self._sessions.get(instance)
        return session is not None and session.offer is not None

    def join(self, instance: str) -> None:
        """See ``Cluster.join``; what the worker still has of parameters counts from now on, of KV if it reunited.

        Else it gives all KV up: there may be some, also of others, that nobody has told it is of no use any more.
        """
        session = self._sessions[instance]
        offer = session.offer
        assert offer is not None, "only who is ready joins"
        if session not in self._kv.trusted:
            session.tell(control.Clear(NOBODY_WAITS))
            self._kv.trusted = {other for other in self._kv.trusted if not other.over.done()} | {session}
        for parts in offer.held:
            self._held[DeviceRef(instance, parts.device)] = parts.arrays

    async def prepare(self, preparation: Preparation) -> Traffic:
        """See ``Cluster.prepare``."""
        self._prepared = None
        members = self._members(preparation)
        self._compiled = {name: session.compiled for name, session in members.items()}
        addresses = {session.instance: session.registration.address for session in self._sessions.all()}
        done = await self._all(
            {session: partial(self._prepare_command, preparation, name, addresses) for name, session in members.items()}
        )
        self._prepared = _Change(preparation, members)
        return _sum(done)

    async def copy_pages(self, transfers: Sequence[PageTransfer]) -> Traffic:
        """See ``Cluster.copy_pages``."""
        return _sum(await self._everyone(lambda number: control.CopyPages(number, tuple(transfers))))

    async def switch(self, transfers: Sequence[PageTransfer]) -> tuple[Sequence[RemotePipeline], Traffic]:
        """See ``Cluster.switch``."""
        preparation, members = self._next.preparation, self._next.members
        traffic = _sum(await self._everyone(lambda number: control.Switch(number, tuple(transfers))))
        placement = preparation.placement
        for data in preparation.changed:
            first, last = (placement.group(data, number)[0].instance for number in (0, placement.shape.stage - 1))
            await self._connect(first)
            if last != first and not members[last].over.done():  # masks go there; who is lost is lost on the new mesh
                await self._connect(last)
        carried = {new: self.pipelines[old] for old, new in preparation.carried.items()}
        pipelines = tuple(carried.get(data) or self._pipeline(placement, data) for data in range(placement.shape.data))
        self.pipelines, self._prepared = pipelines, None
        there = {device.instance for device in placement.devices.values()}
        self._kv.placement = placement
        self._kv.serving = {name: session for name, session in members.items() if name in there}
        self._held |= preparation.needs
        names = tuple(pipeline.name for pipeline in pipelines)
        keepers = self._keepers(placement)
        await asyncio.gather(*(self._adopt(session, names, keepers.get(name, "")) for name, session in members.items()))
        if compiled := sum(s.compiled - self._compiled[name] for name, s in members.items()):
            log.warning("%d functions were compiled while the mesh changed", compiled)
        return pipelines, traffic

    def evict(self, instance: str, *, at_once: bool) -> None:
        """See ``Cluster.evict``."""
        session = self._sessions.get(instance)
        if session is not None:
            session.tell(control.Release(at_once))

    def lose(self, instance: str) -> None:
        """See ``Cluster.lose``."""
        self._forget_instance(instance)
        self._sessions.end(instance, "it is no longer part of the fleet")

    async def close(self) -> None:
        """See ``Cluster.close``: workers stay as they are, and register again when there is a controller."""
        self.pipelines, self._connections = (), {}

    def receive(self, header: ResultHeader, payload: memoryview) -> None:
        """A result from a last stage; one of an old epoch is dropped."""
        for pipeline in self.pipelines:
            if pipeline.name == header.pipeline:
                pipeline.receive(header, payload)
                return
        log.debug("dropped a result of pipeline %s: not of this epoch", header.pipeline)

    def _forget_instance(self, instance: str) -> None:
        """It is gone: nothing is there to be read, and steps that need it fail."""
        self._held = {device: held for device, held in self._held.items() if device.instance != instance}
        self._connections.pop(instance, None)
        for pipeline in self.pipelines:
            if instance in pipeline.instances:
                pipeline.lose(f"instance {instance} was lost during the step")

    @property
    def _next(self) -> _Change:
        assert self._prepared is not None, "prepare comes first"
        return self._prepared

    def _members(self, preparation: Preparation) -> dict[str, WorkerSession]:
        """Workers that the change is a matter of: those of the new mesh, and those of the old one that are alive.

        Raises:
          InstanceLost: one of the new mesh is not alive.
        """
        new = {device.instance for device in preparation.placement.devices.values()}
        before = self._kv.placement
        old = {device.instance for device in before.devices.values()} if before else set()
        sources = {t.source.instance for t in preparation.plan.transfers if t.source is not None}
        sources |= set(preparation.survivors.backups.values())
        there = {s.instance for s in self._sessions.all() if s.offer is not None}
        return {name: self._sessions[name] for name in sorted(new | ((old | sources) & there))}

    def _prepare_command(
        self, preparation: Preparation, instance: str, addresses: Mapping[str, str], number: int
    ) -> control.Prepare:
        """What one worker has to do."""
        current = self._kv.placement
        return control.Prepare(
            number,
            control.PlacementMessage.of(preparation.placement),
            control.PlacementMessage.of(current) if current is not None else None,
            tuple(
                control.Parts(device.index, dict(StackedNeeds.of(needs).parameters))
                for device, needs in preparation.needs.items()
                if device.instance == instance
            ),
            tuple(t for t in preparation.plan.transfers if t.target.instance == instance),
            dict(preparation.heirs),
            dict(preparation.carried),
            tuple(preparation.survivors.backups.items()),
            dict(addresses),
            tuple(dict.fromkeys(step for pipeline in self.pipelines for step in pipeline.recent)),
        )

    async def _everyone(self, command: Callable[[int], control.Command]) -> list[control.Done]:
        """Has all members of the change carry out a command; those that only leave may be gone."""
        new = {device.instance for device in self._next.preparation.placement.devices.values()}
        members = self._next.members.items()
        return await self._all({s: command for name, s in members if name in new or not s.over.done()})

    async def _all(self, commands: Mapping[WorkerSession, Callable[[int], control.Command]]) -> list[control.Done]:
        """Has every worker carry out its command; the first that cannot is the end of it.

        Raises:
          InstanceLost: a worker is gone, or was given up because of what it or another said.
        """
        asked = [asyncio.create_task(session.ask(command)) for session, command in commands.items()]
        try:
            return list(await asyncio.gather(*asked))
        except CommandFailed as problem:
            self._prepared = None
            raise InstanceLost(await self._blame(problem)) from problem
        except InstanceLost:
            self._prepared = None
            raise
        finally:
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)

    def _keepers(self, placement: Placement) -> dict[str, str]:
        """Who keeps copies of whose KV from now on."""
        if not self._backup:
            return {}
        zones = {s.instance: s.registration.zone for s in self._sessions.all() if s.offer is not None}
        return choose_keepers({device.instance for device in placement.devices.values()}, zones)

    async def _adopt(self, session: WorkerSession, pipelines: tuple[str, ...], keeper: str) -> None:
        """Makes one worker adopt the placement. Who is lost meanwhile is lost on the new mesh."""
        try:
            await session.ask(lambda number: control.Adopt(number, pipelines, keeper, self._bandwidth))
        except InstanceLost:
            self._forget_instance(session.instance)  # it may have been gone before there were pipelines through it
        except CommandFailed as problem:
            await self._blame(problem)

    async def _blame(self, problem: CommandFailed) -> str:
        """Gives up whoever is at fault for a failed command; says who."""
        name = problem.unreachable or problem.instance
        session = self._sessions.get(name)
        if session is not None and problem.unreachable:
            await asyncio.wait({session.over}, timeout=self._patience)  # most likely it is dead already
        if session is not None and not session.over.done():
            self._sessions.give_up(name, str(problem))
        return f"instance {name} is gone: {problem}"

    async def _connect(self, instance: str) -> None:
        try:
            address = self._sessions[instance].registration.address
            connection = await self._endpoint.connect(address, CONNECT_SECONDS)
        except ConnectionLost as problem:
            self._prepared = None
            self._sessions.give_up(instance, str(problem))
            raise InstanceLost(f"instance {instance} cannot be reached: {problem}") from problem
        if self._connections.get(instance) is not connection:
            self._connections[instance] = connection
            connection.closed.add_done_callback(lambda _: self._disconnected(instance, connection))

    def _disconnected(self, instance: str, connection: Connection) -> None:
        """Steps on their way may be lost with a connection."""
        if self._connections.get(instance) is connection:
            self._sessions.end(instance, "its connection for steps closed")

    def _pipeline(self, placement: Placement, data: int) -> RemotePipeline:
        instances = [placement.group(data, number)[0].instance for number in range(placement.shape.stage)]
        return RemotePipeline(f"{placement.epoch}.{data}", instances, self._buckets, self._send, fuse=self._fuse)

    def _send(self, instance: str, header: StepHeader | MaskHeader, payload: Sequence[memoryview]) -> None:
        try:
            self._connections[instance].send(header, *payload)
        except (KeyError, ConnectionLost) as problem:
            asyncio.get_running_loop().call_soon(self._sessions.end, instance, f"steps cannot be sent to it: {problem}")


def _sum(done: Iterable[control.Done]) -> Traffic:
    done = list(done)
    return Traffic(sum(one.moved for one in done), sum(one.loaded for one in done))
