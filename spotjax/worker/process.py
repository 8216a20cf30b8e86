"""The worker process: joins a controller, and again when it is lost, until it is released or its machine goes.

Puts the parts together: devices, data endpoint, heartbeat, sessions, notices.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np

from spotjax.config import ServeConfig
from spotjax.errors import ConnectionLost, TransportError
from spotjax.fleet.notices.standing import Standing, Word
from spotjax.fleet.notices.telling import message_of, seconds_left
from spotjax.machine_notices import MachineNotices
from spotjax.protocol import control
from spotjax.protocol.backup import BackupHeader
from spotjax.protocol.steps import MaskHeader, StepHeader
from spotjax.reshard.store_directory import default_directory
from spotjax.runtime.compiled import CompiledModel
from spotjax.runtime.devices import device_type, local_devices
from spotjax.runtime.executables import Devices
from spotjax.runtime.program_cache import cache_directory
from spotjax.transport.connection import Connection
from spotjax.transport.credentials import channel_credentials
from spotjax.transport.endpoint import Endpoint
from spotjax.transport.join_token import JoinToken
from spotjax.transport.security import Tls
from spotjax.worker.backup_store import BackupStore
from spotjax.worker.copies import Copies
from spotjax.worker.executor import CONTROLLER, StageExecutor
from spotjax.worker.heartbeat import Heartbeat
from spotjax.worker.heartbeat_process import BEATS_PER_LEASE, TlsFiles
from spotjax.worker.links import Links
from spotjax.worker.peers import RemotePeers
from spotjax.worker.session import End, Session
from spotjax.worker.vitals import SECONDS as VITALS_SECONDS
from spotjax.worker.vitals import vitals
from spotjax.worker.watchdog import Watchdog
from spotjax.worker.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Buffer

log = logging.getLogger("spotjax.worker")

READ_SECONDS = 5.0
"""Without progress, after which a peer counts as unreachable."""
CANCEL_SECONDS = 1.0
"""For work to end that was cancelled."""
RETRY_SECONDS = (0.1, 1.0)
"""Between attempts to join, doubling from the first to the second."""
LONGEST_TIMER = 3600.0
"""Seconds after which a deadline that is far away is looked at again."""


async def run(config: ServeConfig) -> int:
    """Works for the controller at ``config.join``; returns the exit code."""
    if config.slice_hosts > 1:
        from spotjax.worker import slice_process

        return await slice_process.run(config)
    process = WorkerProcess(config)
    await process.open()
    try:
        return await process.work()
    finally:
        await process.close()


class WorkerProcess:
    """This process as a worker."""

    FRAMES: Any = StepHeader | MaskHeader | BackupHeader
    """Headers of the frames that it takes."""
    KIND: type[Worker] = Worker

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        self._name = config.name or socket.gethostname()
        self._incarnation = uuid.uuid4().hex
        files = (config.tls_certificate, config.tls_key, config.tls_authority)
        self._tls_files = TlsFiles(*files) if config.tls_certificate else None
        self._trust = (self._tls_files, config.join_token)
        self._token = JoinToken.from_file(config.join_token) if config.join_token else None
        self._worker: Worker | None = None
        self._copies = Copies(BackupStore())
        self._session: Session | None = None
        self._heartbeat: Heartbeat | None = None
        self._beating = ("", 0.0)
        self._watchdog = Watchdog()
        self._standing = Standing()
        self._notices: MachineNotices | None = None
        self._changed = asyncio.Event()
        """What stands has."""
        self._reported: set[asyncio.Task[None]] = set()
        self._member_at = 0.0
        """When this was last part of a fleet, or began to look for one; on the event loop's clock."""

    async def open(self) -> None:
        """Takes the devices and listens."""
        self._loop = asyncio.get_running_loop()
        self._devices = self._take_devices()
        tls = Tls.from_files(*self._tls_files) if self._tls_files is not None else None
        self._endpoint = Endpoint(self.FRAMES, self._receive, provide=self._provide, tls=tls, token=self._token)
        port = await self._endpoint.listen(self._config.data_listen)
        self._address = f"{self._config.advertise or self._config.data_listen.rpartition(':')[0]}:{port}"
        self._watchdog.start()
        self._links = Links(self._endpoint, self._steps_lost)
        self._peers = self._make_peers()

    async def work(self) -> int:
        """Joins and works, again and again."""
        self._listen()
        pause, self._member_at = RETRY_SECONDS[0], self._loop.time()
        log.info("joining the fleet of %s", self._config.join)
        while True:
            started = self._loop.time()
            stay = asyncio.create_task(self._stay())
            await self._until_over(stay)
            if not stay.done():
                await self._break_off(stay)
                return 0
            match stay.result():
                case End.RELEASED:
                    log.info("released by the controller")
                    if self._config.acknowledge_notices and self._notices is not None:
                        await self._notices.acknowledge()
                    return 0
                case End.TAKEN:
                    os._exit(1)  # as if the machine were taken: nothing is finished or cleaned up
                case End.REFUSED:
                    return 1
            if self._abandoned():
                return 0
            lasted = self._loop.time() - started
            if lasted > RETRY_SECONDS[1]:
                log.warning("the controller is lost; trying to join again")
            pause = RETRY_SECONDS[0] if lasted > RETRY_SECONDS[1] else min(2 * pause, RETRY_SECONDS[1])
            pausing = asyncio.create_task(asyncio.sleep(pause))
            await self._until_over(pausing)
            if not pausing.done():
                pausing.cancel()
                return 0

    async def close(self) -> None:
        """Frees everything and removes the parameters from shared memory."""
        if self._heartbeat is not None:
            await asyncio.to_thread(self._heartbeat.close)
        if self._worker is not None:
            await asyncio.to_thread(self._worker.close, for_good=True)
        self._watchdog.close()
        await self._disconnect()
        if self._notices is not None:
            await self._notices.close()

    async def _disconnect(self) -> None:
        await self._endpoint.close()

    def _abandoned(self) -> bool:
        """Whether there was no fleet for so long that none is to be expected."""
        seconds = self._config.abandoned_seconds
        if not seconds or self._loop.time() < self._member_at + seconds:
            return False
        log.error("part of no fleet for %g s: this worker ends, as abandoned_seconds says", seconds)
        return True

    async def _stay(self) -> End:
        kind = device_type(self._devices, self._config.instance_memory_bytes)
        on_demand = self._config.price_class == "on_demand"
        registration = control.Register(
            control.VERSION, self._name, self._incarnation, kind, self._devices[0].platform, on_demand,
            self._config.zone, self._address,
        )  # fmt: skip
        if self._tls_files is not None:
            credentials = channel_credentials(*self._tls_files)
            channel = grpc.aio.secure_channel(self._config.join, credentials, options=control.OPTIONS)
        else:
            channel = grpc.aio.insecure_channel(self._config.join, options=control.OPTIONS)
        async with channel:
            self._session = Session(channel, registration, self._prepare, self._news, self._token)
            telling = asyncio.create_task(self._tell_vitals(self._session))
            try:
                return await self._session.run()
            finally:
                telling.cancel()
                if self._session.ready:
                    self._member_at = self._loop.time()
                self._session = None

    async def _tell_vitals(self, session: Session) -> None:
        """Says again and again how this worker is. Nothing depends on it: what goes wrong is told, and no more."""
        try:
            while True:
                if session.ready and self._worker is not None:
                    how = await asyncio.to_thread(vitals, self._worker, self._devices, self._endpoint.traffic)
                    await session.tell(how)
                await asyncio.sleep(VITALS_SECONDS)
        except Exception:
            log.exception("operators see nothing more of this worker until it joins again")

    async def _prepare(self, welcome: control.Welcome) -> Worker:
        """Makes a worker for what the controller serves, or takes the one that there is."""
        controller = f"{self._config.join.rpartition(':')[0]}:{welcome.data_port}"
        self._links.addresses = {CONTROLLER: controller}
        await self._beat(controller, welcome.lease_seconds / BEATS_PER_LEASE)
        await self._links.connect(CONTROLLER)
        if self._worker is None or self._worker.setup != welcome.setup:
            if self._worker is not None:
                await asyncio.to_thread(self._worker.close, for_good=True)
                self._worker = None
            stores = None if self._config.parameter_store == "off" else Path(
                self._config.parameter_store or default_directory()
            )  # fmt: skip
            self._worker = await asyncio.to_thread(self._load, welcome.setup, stores)
        await asyncio.to_thread(self._worker.serve, welcome)
        return self._worker

    def _load(self, setup: control.ModelSetup, stores: Path | None) -> Worker:
        programs = cache_directory(self._config.compilation_cache)
        return self.KIND.load(
            self._name, self._devices, setup, self._peers, self._links, self._copies, self._make_executor, programs,
            stores, self._config.read_bandwidth, self._config.attention, self._config.cpu_kernels,
        )  # fmt: skip

    async def _beat(self, controller: str, interval: float) -> None:
        """Has the heartbeat go to that address of the controller, which is another one when it has started anew."""
        if self._beating == (controller, interval):
            return
        if self._heartbeat is not None:
            await asyncio.to_thread(self._heartbeat.close)
        self._heartbeat = Heartbeat(controller, self._name, self._incarnation, interval, *self._trust)
        await asyncio.to_thread(self._heartbeat.start)
        self._beating = controller, interval

    def _take_devices(self) -> Devices:
        devices = local_devices(self._config.devices_per_instance)
        return tuple(devices[: self._config.devices_per_instance] if devices[0].platform == "cpu" else devices)

    def _make_peers(self) -> RemotePeers:
        return RemotePeers(self._name, self._copies, self._endpoint, self._loop, READ_SECONDS)

    def _make_executor(self, model: CompiledModel, max_positions: int) -> StageExecutor:
        return StageExecutor(self._name, model, max_positions, self._links.send, self._step_failed, self._watchdog)

    def _listen(self) -> None:
        gpu = self._devices[0].platform == "gpu"
        self._notices = MachineNotices(self._config, self._name, self._heard, signals=True, gpu=gpu)

    def _heard(self, word: Word) -> None:
        """A source says something of this machine: the fleet hears it, too, or will once there is one."""
        stands = self._standing.hear(word, time.monotonic())
        if stands == self._standing:
            return
        self._standing = stands
        self._changed.set()
        if self._session is not None and self._session.ready and self._seconds_left() > 0:
            self._report(message_of(stands.words.get(word.source, word), time.monotonic()))

    def _news(self) -> Sequence[control.FromWorker]:
        """What another controller has to hear."""
        return [message_of(word, time.monotonic()) for word in self._standing.words.values()]

    def _seconds_left(self) -> float:
        ready = self._session is not None and self._session.ready
        return seconds_left(self._standing, time.monotonic(), ready=ready)

    async def _until_over(self, task: asyncio.Task[Any]) -> None:
        """Until the task has ended, or the time of this worker is over."""
        while not task.done() and (left := self._seconds_left()) > 0:
            self._changed.clear()
            changed = asyncio.create_task(self._changed.wait())
            try:
                waiting: set[asyncio.Task[Any]] = {task, changed}
                timeout = min(left, LONGEST_TIMER)
                await asyncio.wait(waiting, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            finally:
                changed.cancel()

    async def _break_off(self, stay: asyncio.Task[End]) -> None:
        """Time is up."""
        stay.cancel()
        await asyncio.wait({stay}, timeout=CANCEL_SECONDS)
        if not stay.done():  # compiling, which cannot be interrupted
            await asyncio.to_thread(self._forsake)
            os._exit(0)

    def _forsake(self) -> None:
        """What must be done even if the rest of the process cannot be ended in order."""
        if self._heartbeat is not None:
            self._heartbeat.close()

    def _receive(self, connection: Connection, header: Any, payload: memoryview) -> None:
        if self._worker is None:
            raise ConnectionLost(f"{connection.peer} sent a {type(header).__name__} before there was a model")
        if isinstance(header, StepHeader):
            self._worker.executor.receive(header, payload)
        elif isinstance(header, MaskHeader):
            self._worker.executor.receive_masks(header, payload)
        elif isinstance(header, BackupHeader):
            self._copies.store.put(header, np.frombuffer(payload, np.uint8))
        else:
            raise TransportError(f"{connection.peer} sent a {type(header).__name__}, which is not for this process")

    def _provide(self, what: bytes) -> Sequence[Buffer]:
        if self._worker is None:
            raise ConnectionLost("not ready yet")
        return self._worker.provide(what)

    def _step_failed(self, problem: str) -> None:
        self._loop.call_soon_threadsafe(self._steps_lost, self._name, problem)

    def _steps_lost(self, instance: str, problem: str) -> None:
        """Results that do not reach the controller are ours: it hears of that, or has lost us anyway."""
        self._report(control.StepLost(self._name if instance == CONTROLLER else instance, problem))

    def _report(self, message: control.FromWorker) -> None:
        if self._session is not None:
            task = asyncio.create_task(self._session.tell(message))
            self._reported.add(task)
            task.add_done_callback(self._reported.discard)
