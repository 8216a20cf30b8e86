"""Fleet mode: the controller process. Puts its parts together; workers are processes of their own. Imports no jax.

What to serve at is worked out when the first worker has said what its devices are.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from spotjax.api.server import ApiServer
from spotjax.checkpoint.saves import Save, newest
from spotjax.config import ServeConfig, mode
from spotjax.durability import directory_of, open_commit_log
from spotjax.engine.commit_log import CommitLog
from spotjax.errors import ConfigError, ConnectionLost, NoSpareDevices, SpotjaxError
from spotjax.fleet.admission import ServiceLimits
from spotjax.fleet.capacity.loop import CapacityLoop
from spotjax.fleet.capacity.opening import open_capacity
from spotjax.fleet.checkpoint_files import CheckpointFiles
from spotjax.fleet.controller import Controller
from spotjax.fleet.door import Door
from spotjax.fleet.leases import Leases
from spotjax.fleet.membership import Membership
from spotjax.fleet.notices.telling import word_of
from spotjax.fleet.observer import Observer
from spotjax.fleet.recovery_policies import POLICIES
from spotjax.fleet.remote import RemoteCluster
from spotjax.fleet.saving import Saves, still_certain
from spotjax.fleet.sessions import Sessions, WorkerSession
from spotjax.local_workers import LocalWorkers
from spotjax.meshes.instance import Instance, InstanceType
from spotjax.models.catalog import Model, open_model
from spotjax.models.fingerprint import fingerprint
from spotjax.models.tokenizer import Tokenizer
from spotjax.protocol import control
from spotjax.protocol.beats import Beat
from spotjax.protocol.steps import ResultHeader
from spotjax.sizing import foreseeable_degrees, planning_for, resolve_dtype, resolve_limits, virtual_memory
from spotjax.structured.grammars import Grammars
from spotjax.structured.guide import StructureGuide
from spotjax.structured.vocabulary import Vocabulary
from spotjax.telemetry.instances import InstanceReport
from spotjax.transport.connection import Connection
from spotjax.transport.endpoint import Endpoint
from spotjax.transport.join_token import JoinToken
from spotjax.transport.security import Tls

log = logging.getLogger(__name__)

RETURN_SECONDS = 2.5
"""After the start, for workers that kept KV of unfinished requests: they look for a controller every second."""
REUNION_SECONDS = 3.0
"""For the other workers of a mesh, when one is back that has a part of it."""
FORESEEN = 4
"""Workers that a controller which starts none itself gets ready for; more may come."""


class FleetServer:
    """A running controller. ``start`` makes one.

    Attributes:
      service: what the API serves.
      tokenizer, model_name, max_model_len: as clients need them.
      grammars: that output can be kept to.
    """

    def __init__(
        self,
        config: ServeConfig,
        model: Model,
        log: CommitLog,
        saves: Saves,
        address: str,
        newest: Save | None = None,
        observer: Observer | None = None,
    ) -> None:
        self.tokenizer: Tokenizer = model.tokenizer
        self.model_name = model.name
        self.grammars = Grammars(lambda: Vocabulary(model.tokenizer, model.checkpoint.spec.config.vocab))
        self._guide = StructureGuide(self.grammars)
        self._config, self._model, self._log, self._saves, self._newest = config, model, log, saves, newest
        self._observer = observer
        self._sessions = Sessions(Leases(config.lease_seconds), time.monotonic, self)
        tls = None
        if config.tls_certificate:
            tls = Tls.from_files(config.tls_certificate, config.tls_key, config.tls_authority)
        token = JoinToken.from_file(config.join_token) if config.join_token else None
        self._endpoint = Endpoint(Beat | ResultHeader, self._receive, tls=tls, token=token)
        self._workers = LocalWorkers(config, address, on_exit=self._worker_ended) if config.workers else None
        self._address, self._data_port = address, 0
        self._capacity: CapacityLoop | None = None
        self._buying: asyncio.Task[None] | None = None
        self._built = asyncio.Lock()
        self._setup: control.ModelSetup | None = None
        self._service: Controller | None = None
        self._cluster: RemoteCluster | None = None
        self._limits: ServiceLimits | None = None
        self._virtual_memory = 0
        self._opened, self._reunion_began = time.monotonic(), 0.0
        self._readied: set[str] = set()
        self._awaited: set[str] = set()
        """Instances of the mesh that an earlier controller had."""
        self._starting = True
        self._enough = asyncio.Event()
        self._failed_to_start: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._watching: asyncio.Task[None] | None = None

    @property
    def service(self) -> Controller:
        """The controller, which exists once a worker has registered."""
        assert self._service is not None, "the server has not started"
        return self._service

    @property
    def max_model_len(self) -> int:
        """Longest prompt and output together."""
        assert self._limits is not None, "the server has not started"
        return self._limits.longest

    @property
    def failure(self) -> asyncio.Future[None]:
        """Fails with the error that the controller cannot go on from, if there ever is one."""
        return self.service.failure

    def reports(self) -> dict[str, InstanceReport]:
        """What workers say of themselves, and when they were heard last."""
        return {
            session.instance: InstanceReport(session.vitals, self._sessions.silence(session.instance))
            for session in self._sessions.all()
        }

    async def open(self, door: Door) -> None:
        """Takes workers in, starts those of its own, and forms the first mesh.

        Raises:
          ConfigError: the data endpoint's address cannot be listened on, all own workers ended, or the file for
            ``capacity`` is not as it must be.
          ProviderError: whoever is to rent machines out cannot be used.
        """
        try:
            self._data_port = await self._endpoint.listen(self._config.data_listen)
        except OSError as problem:
            raise ConfigError(f"cannot listen on {self._config.data_listen}: {problem}") from problem
        door.join = self._sessions.join
        self._watching = asyncio.create_task(self._sessions.watch(self._config.lease_seconds))
        self._watching.add_done_callback(self._watching_ended)
        if self._config.capacity:
            self._capacity = await open_capacity(
                self._config, self._address, directory_of(self._log), lambda: self._service
            )
            self._buying = asyncio.create_task(self._capacity.run())
        if self._workers is not None:
            await self._workers.add(self._config.workers)
        else:
            log.info("waiting for workers to join")
        enough = asyncio.create_task(self._enough.wait())
        try:
            waiting: set[asyncio.Future[Any]] = {enough, self._failed_to_start}
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            enough.cancel()
        if self._failed_to_start.done():
            self._failed_to_start.result()
        self._starting = False
        await self.service.start()

    async def close(self) -> None:
        """Stops at the next token boundary. Own workers end; others stay, and wait for a controller."""
        if self._buying is not None:
            self._buying.cancel()
            await asyncio.gather(self._buying, return_exceptions=True)
        if self._service is not None:
            await self._service.close()
        else:
            await self._log.close()
        self._guide.close()
        if self._workers is not None:
            await self._workers.stop()
        if self._watching is not None:
            self._watching.cancel()
        for session in self._sessions.all():
            session.end("the controller ends")
        await self._endpoint.close()

    # -- a Watcher of sessions

    async def welcome(self, registration: control.Register) -> control.Welcome | control.Refused:
        """See ``Watcher.welcome``. The first worker decides what everything is sized for."""
        async with self._built:
            if self._setup is None:
                try:
                    await self._build(registration)
                except SpotjaxError as problem:
                    self._fail_to_start(problem)
                    return control.Refused(str(problem), retry=False)
        assert self._setup is not None, "it was just built"
        return control.Welcome(
            self._setup, self._data_port, self._config.lease_seconds, self._log.identity, self.service.epoch,
            self._starting,
        )  # fmt: skip

    def registered(self, session: WorkerSession) -> None:
        """See ``Watcher.registered``."""
        told = session.registration
        instance = Instance(
            told.instance, self._sized(told.kind), on_demand=told.on_demand, zone=told.zone, address=told.address
        )
        self.service.registered(instance)

    def ready(self, session: WorkerSession) -> None:
        """See ``Watcher.ready``."""
        self._readied.add(session.instance)
        assert session.offer is not None, "it has just made one"
        if (kept := session.offer.placement) is not None:  # from before this controller: wait for the others of it
            self._reunion_began = self._reunion_began or time.monotonic()
            self._awaited |= {device.instance for _, device in kept.devices}
        self._look_whether_enough()
        self.service.arrived(session.instance)

    def noticed(self, session: WorkerSession, word: control.Noticed | control.NoticeWithdrawn) -> None:
        """See ``Watcher.noticed``."""
        self.service.noticed(word_of(word, session.instance, time.monotonic()))

    def step_lost(self, session: WorkerSession, instance: str, problem: str) -> None:
        """See ``Watcher.step_lost``: whoever cannot be sent steps to is of no use to the fleet."""
        log.warning("%s says of %s: %s", session.instance, instance, problem)
        self._sessions.give_up(instance, f"{session.instance} lost a step to it: {problem}")

    def ended(self, session: WorkerSession, why: str) -> None:
        """See ``Watcher.ended``."""
        self._readied.discard(session.instance)
        self.service.gone(session.instance, f"({why})")

    def _look_whether_enough(self) -> None:
        """The first mesh is formed of all who are expected, or of those who are there when others stay away."""
        if self._enough.is_set():
            return
        if len(self._readied) < max(1, self._config.workers):
            return
        if self._awaited:  # some are back, and have told who else was there
            there, end = self._awaited <= self._readied, self._reunion_began + REUNION_SECONDS
        else:
            nothing = not any(recorded.goes_on for recorded in self._log.replay())
            there, end = bool(self._config.workers) or nothing, self._opened + RETURN_SECONDS
        left = end - time.monotonic()
        if there or left <= 0:
            self._enough.set()
        else:
            log.info("waiting for workers of before", extra={"seconds": round(left, 1)})
            asyncio.get_running_loop().call_later(left, self._look_whether_enough)

    # -- parts

    async def _build(self, registration: control.Register) -> None:
        """The controller and its cluster, for devices like those of the first worker."""
        config = self._config
        dtype = resolve_dtype(config.dtype, registration.platform)
        spec = replace(self._model.checkpoint.spec, dtype_bytes=dtype.itemsize)
        limits, buckets = resolve_limits(config, spec)
        planning = planning_for(config, spec, limits)
        foreseen = config.workers or FORESEEN
        self._virtual_memory = virtual_memory(spec, limits, foreseen * registration.kind.devices)
        kind = self._sized(registration.kind)
        degrees = foreseeable_degrees(planning, tuple(Instance(f"{n}", kind) for n in range(foreseen)))
        print_of = await asyncio.to_thread(fingerprint, self._model.checkpoint, dtype)
        cluster = RemoteCluster(
            self._sessions, self._endpoint, buckets, config.lease_seconds + 1, fuse=config.fuse,
            backup=config.kv_backup and POLICIES[config.recovery].keeps_kv, bandwidth=config.kv_backup_bandwidth,
            layers=spec.config.layers, save=self._newest,
        )  # fmt: skip
        self._limits, self._cluster = limits, cluster
        self._service = Controller(
            self._model.name, planning, Membership(()), cluster, self._log, self._model.tokenizer,
            self._model.tokenizer.end_tokens, limits, time.monotonic, time.time, self._supply,
            config.leave, self._saves,
            CheckpointFiles(
                spec.config, dtype.name, print_of, self._model.tokenizer, directory_of(self._log), spec.quantization
            ),
            self._capacity.meter if self._capacity is not None else None,
            self._capacity.status if self._capacity is not None else None,
            self._observer,
            self._guide,
        )  # fmt: skip
        self._setup = control.ModelSetup(
            config.model, print_of, dtype.name, limits.pages, config.page_size, limits.max_positions, config.max_batch,
            config.prefill_tokens, tuple(degrees), config.quantization,
        )  # fmt: skip

    def _sized(self, kind: InstanceType) -> InstanceType:
        """An instance type with memory where its devices do not know theirs."""
        return kind if kind.memory_bytes else replace(kind, memory_bytes=self._virtual_memory)

    async def _supply(self, count: int) -> Sequence[str]:
        """More workers on this machine, or machines with one each."""
        if self._capacity is not None:
            return await self._capacity.add(count)
        if self._workers is None:
            raise NoSpareDevices("this controller starts no workers; start them on their machines with --join")
        return await self._workers.add(count)

    def _receive(self, connection: Connection, header: Beat | ResultHeader, payload: memoryview) -> None:
        if isinstance(header, Beat):
            self._sessions.beat(header)
        elif self._cluster is not None:
            self._cluster.receive(header, payload)
        else:
            raise ConnectionLost("results are of no use before there is a mesh")

    def _worker_ended(self, name: str, code: int) -> None:
        """An own worker's process has ended; its session says so too, if it had one."""
        if self._service is not None:
            self._service.gone(name, f"(its process ended with {code})")
        if not self._enough.is_set():
            self._fail_to_start(ConfigError(f"worker {name} ended with {code} before it was ready; see its log above"))

    def _watching_ended(self, watching: asyncio.Task[None]) -> None:
        """Without somebody who looks, the silent would stay for ever."""
        if not watching.cancelled() and (problem := watching.exception()) is not None:
            log.critical("leases are not watched any more", exc_info=problem)
            if not self.failure.done():
                self.failure.set_exception(problem)

    def _fail_to_start(self, problem: Exception) -> None:
        if not self._failed_to_start.done():
            self._failed_to_start.set_exception(problem)


async def start(config: ServeConfig, server: ApiServer, address: str, observer: Observer | None = None) -> FleetServer:
    """Opens the model and serves it on workers as they join; ``observer`` is told what happens.

    Raises:
      ConfigError: settings do not go together.
      CheckpointError: the model cannot be loaded.
      CommitLogError: the commit log cannot be used.
    """
    assert mode(config) == "controller", "not the settings of a controller"
    door = Door(JoinToken.from_file(config.join_token) if config.join_token else None)
    server.add_handlers([door.handler()])
    model = await asyncio.to_thread(open_model, config.model, config.quantization)
    weights = await asyncio.to_thread(fingerprint, model.checkpoint, np.dtype(np.float32))
    commits = await asyncio.to_thread(open_commit_log, config, weights)
    try:
        before = await asyncio.to_thread(newest, config.checkpoint, commits.identity) if config.checkpoint else None
        save = await asyncio.to_thread(still_certain, before, commits) if before else None
        saves = Saves(config.checkpoint, commits.identity, save.path if save is not None else "")
        fleet = FleetServer(config, model, commits, saves, address, save, observer)
    except BaseException:
        await commits.close()  # or its lock would outlive it
        raise
    try:
        await fleet.open(door)
    except BaseException:
        await fleet.close()
        raise
    return fleet
