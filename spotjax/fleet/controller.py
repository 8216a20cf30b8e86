"""The controller: takes requests, streams what is committed, shows and changes the fleet. A ``fleet.service.Service``.

Puts the parts together; who is there is in ``attendance``, how a mesh changes in ``reconfigure``, what runs next in
``engine.scheduler``.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial

from spotjax.engine.batch import Pipeline
from spotjax.engine.commit_log import CommitLog
from spotjax.engine.generation import Delta, GenerationRequest
from spotjax.engine.replica import Replica
from spotjax.engine.request import FinishReason, RequestState
from spotjax.engine.scheduler import Scheduler
from spotjax.engine.structure import Guide
from spotjax.engine.text import Detokenizer
from spotjax.errors import CheckpointError, Draining
from spotjax.fleet.admission import Admission, ServiceLimits
from spotjax.fleet.attendance import Attendance, Supply
from spotjax.fleet.boundary import Leave
from spotjax.fleet.capacity.load import Meter
from spotjax.fleet.change import Planning
from spotjax.fleet.checkpoint_files import CheckpointFiles
from spotjax.fleet.cluster import Cluster
from spotjax.fleet.dispatch import Dispatcher
from spotjax.fleet.events import EventLog
from spotjax.fleet.membership import Membership
from spotjax.fleet.notices.standing import Word
from spotjax.fleet.observer import Observer, Unobserved
from spotjax.fleet.reconfigure import Clock, Reconfigurer
from spotjax.fleet.recovery import certain, recalled
from spotjax.fleet.requests import RequestTable
from spotjax.fleet.save_request import SaveRequests
from spotjax.fleet.saving import Saves, Saving
from spotjax.fleet.service import UseObserver
from spotjax.fleet.status import (
    CapacityStatus,
    FleetEvent,
    FleetStatus,
    InstanceStatus,
    Reconfiguration,
    ReplicaStatus,
    Saved,
)
from spotjax.meshes.instance import Instance
from spotjax.meshes.shape import Position

log = logging.getLogger(__name__)
PURGE_SECONDS = 10.0
"""How often finished requests are looked through for those past their retention."""


class Controller:
    """One service over one cluster. Call ``start`` before anything else, inside an event loop.

    Args:
      model_name: shown to operators.
      planning: what changes of the mesh are planned with.
      members: the instances; those that are ready at start form the first mesh.
      cluster: their devices.
      log: where tokens are committed.
      detokenizer: of the model.
      end_tokens: tokens of the model that end generation.
      limits: what is accepted.
      clock: monotonic seconds.
      wall_clock: Unix time in seconds.
      supply: where more instances come from; see ``Attendance``.
      leave: when the mesh leaves an instance that has notice.
      saves: where KV is saved when the whole fleet is to be taken; None for nowhere.
      files: writes the rest of what is saved on request; None where nothing can be.
      meter: is told what arrives and what is done, if somebody wants to know.
      capacity: what operators see of how the fleet comes by its machines.
      observer: is told what happens to requests and to the mesh, if somebody wants to know.
      guide: keeps output to structures; None where no request has one.

    Attributes:
      planning: as given.
    """

    def __init__(
        self,
        model_name: str,
        planning: Planning,
        members: Membership,
        cluster: Cluster,
        log: CommitLog,
        detokenizer: Detokenizer,
        end_tokens: frozenset[int],
        limits: ServiceLimits,
        clock: Clock,
        wall_clock: Clock,
        supply: Supply | None = None,
        leave: Leave = "early",
        saves: Saves | None = None,
        files: CheckpointFiles | None = None,
        meter: Meter | None = None,
        capacity: Callable[[], CapacityStatus] | None = None,
        observer: Observer | None = None,
        guide: Guide | None = None,
    ) -> None:
        self.planning = planning
        self._meter, self._capacity, self._guide = meter, capacity, guide
        self._model_name, self._members, self._cluster, self._limits = model_name, members, cluster, limits
        self._log, self._detokenizer, self._clock = log, detokenizer, clock
        self._events, self._observer = EventLog(wall_clock), observer or Unobserved()
        self._requests = RequestTable(log, limits.retain_seconds)
        self.failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Fails with the error that the service cannot go on from."""
        self._dispatcher = Dispatcher(
            self._make_replica, limits.replica, limits.pages, limits.page_size, self._failed,
            caching=limits.prefix_cache,
        )  # fmt: skip
        self._saving = Saving(cluster, self._events, saves or Saves(), self._requests.unfinished)
        self._reconfigurer = Reconfigurer(
            planning, members, cluster, self._dispatcher, self._events, log, self._saving, clock, self._commit_ended,
            leave, self._observer,
        )  # fmt: skip
        self._save_requests = (
            SaveRequests(cluster, self._reconfigurer, self._saving, files, self._events, clock) if files else None
        )
        self._attendance = Attendance(members, cluster, self._reconfigurer, self._events, clock, supply, self._failed)
        self._admission = Admission(
            log, self._requests, self._dispatcher, limits, end_tokens, self._commit_ended, clock, self._observer
        )
        self._epochs_before = log.epoch
        log.on_change = self._log_changed
        self._draining = False
        self._ready_since: float | None = None
        self._purging: asyncio.Task[None] | None = None

    async def start(self) -> Reconfiguration:
        """Takes up the requests that the log has, and forms the first mesh."""
        await self._recover()
        report = await self._attendance.open()
        self._ready_since = self._clock()
        self._purging = asyncio.create_task(self._purge())
        self._events.record("ready", self._reconfigurer.epoch, f"serving {self._model_name}")
        return report

    async def close(self) -> None:
        """Stops at the next token boundary and frees everything; unfinished requests stay in the commit log."""
        if self._purging is not None:
            self._purging.cancel()
        if self._save_requests is not None:
            await self._save_requests.close()
        await self._attendance.close()
        await self._saving.close()
        await self._dispatcher.stop()
        await self._log.close()
        self._events.close()
        await self._cluster.close()

    def submit(self, request: GenerationRequest) -> Awaitable[None]:
        """See ``GenerationService.submit``."""
        if self._draining and request.request_id not in self._requests:
            raise Draining("the server is draining and takes no new requests; try another one")
        accepted = self._admission.submit(request)
        if self._meter is not None:
            self._meter.arrived(self._clock(), len(request.prompt), request.n)
        return accepted

    def accepted(self, request_id: str) -> GenerationRequest:
        """See ``GenerationService.accepted``."""
        return self._requests.get(request_id).request

    def stream(self, request_id: str, offsets: Sequence[int] = ()) -> AsyncIterator[Delta]:
        """See ``GenerationService.stream``."""
        return self._requests.stream(request_id, offsets)

    def cancel(self, request_id: str, reason: str = "cancelled") -> bool:
        """See ``GenerationService.cancel``."""
        accepted = self._requests.get(request_id)
        if all(sequence.state.finish for sequence in accepted.sequences):
            return False
        self._admission.cancel(accepted, FinishReason(reason))
        return True

    def observe(self, observer: UseObserver) -> None:
        """See ``Service.observe``."""
        self._requests.observe(observer)

    def status(self) -> FleetStatus:
        """See ``FleetService.status``."""
        placement = self._reconfigurer.placement
        positions: dict[str, dict[int, Position]] = {}
        for position, device in placement.devices.items() if placement else ():
            positions.setdefault(device.instance, {})[device.index] = position
        since = self._ready_since
        return FleetStatus(
            model=self._model_name,
            ready=since is not None and placement is not None and not self._draining and not self._log.problem,
            draining=self._draining,
            placement=placement,
            instances=tuple(
                InstanceStatus(
                    i.name,
                    i.type.name,
                    i.state,
                    i.type.devices,
                    positions.get(i.name, {}),
                    i.zone,
                    "on_demand" if i.on_demand else "spot",
                    i.address,
                    i.name in self._members.advised,
                    self._members.seconds_left(i.name, self._clock()),
                )
                for i in self._members.all()
            ),
            replicas=tuple(_replica_status(n, replica) for n, replica in enumerate(self._dispatcher.replicas))
            if placement
            else (),
            queued=self._admission.recording
            + (len(self._dispatcher.parked) if placement else self._dispatcher.sequences),
            requests_running=self._requests.running,
            requests_finished=self._requests.finished,
            tokens_committed=self._requests.tokens,
            reconfigurations=max(0, self._reconfigurer.epoch - self._epochs_before - 1),
            uptime_seconds=self._clock() - since if since is not None else 0.0,
            notices=self._attendance.notices(),
            capacity=self._capacity() if self._capacity is not None else None,
            epoch=self._reconfigurer.epoch,
            log_problem=self._log.problem,
            work=self._dispatcher.work,
        )

    @property
    def epoch(self) -> int:
        """Of the last mesh, that of an earlier controller if there was none yet."""
        return self._reconfigurer.epoch

    def members(self) -> Sequence[Instance]:
        """Instances that are not gone."""
        return self._members.alive()

    def record(self, kind: str, message: str, **fields: str | int | float) -> None:
        """Puts something into the stream of events that happened beside the service."""
        self._events.record(kind, self._reconfigurer.epoch, message, **fields)

    def recent(self) -> Sequence[FleetEvent]:
        """See ``FleetService.recent``."""
        return self._events.recent()

    def watch(self, after: int = 0) -> AsyncIterator[FleetEvent]:
        """See ``FleetService.watch``."""
        return self._events.follow(after)

    async def preempt(self, instance: str, grace_seconds: float) -> Reconfiguration:
        """See ``FleetService.preempt``."""
        return await self._attendance.preempt(instance, grace_seconds)

    async def release(self, instance: str) -> Reconfiguration:
        """See ``FleetService.release``."""
        return await self._attendance.release(instance)

    async def add(self, count: int) -> Reconfiguration:
        """See ``FleetService.add``."""
        return await self._attendance.add(count)

    async def save(self, directory: str, *, parameters: bool, state: bool, seconds: float) -> Saved:
        """See ``FleetService.save``."""
        if self._save_requests is None:
            raise CheckpointError("this service was made without what it takes to save")
        return await self._save_requests.save(directory, parameters=parameters, state=state, seconds=seconds)

    def registered(self, instance: Instance) -> None:
        """See ``Attendance.registered``."""
        self._attendance.registered(instance)

    def arrived(self, instance: str) -> None:
        """See ``Attendance.arrived``."""
        self._attendance.arrived(instance)

    def noticed(self, word: Word) -> None:
        """See ``Attendance.noticed``."""
        self._attendance.noticed(word)

    def gone(self, instance: str, how: str) -> None:
        """See ``Attendance.gone``."""
        self._attendance.gone(instance, how)

    async def drain(self, seconds: float) -> bool:
        """See ``Service.drain``."""
        self._draining = True
        self._events.record("draining", self._reconfigurer.epoch, f"draining, at most {seconds:g} s", seconds=seconds)
        if self._requests.running:
            try:
                await asyncio.wait_for(self._requests.idle.wait(), seconds)
            except TimeoutError:
                return False
        return True

    def check(self) -> None:
        """Verifies that page accounting balances on every replica; for tests, at rest."""
        self._dispatcher.check()

    def _make_replica(self, scheduler: Scheduler, pipeline: Pipeline) -> Replica:
        return Replica(
            scheduler, pipeline, self._log, self._detokenizer, self._deliver, self._clock, self._observer, self._guide
        )

    def _deliver(self, states: Sequence[RequestState]) -> None:
        """These are recorded."""
        try:
            now = self._clock()
            self._requests.committed(states, now)
            self._observer.committed(states, now)
            if self._meter is not None:
                for state in states:
                    if state.finish is not None:
                        self._meter.finished(len(state.tokens))
            self._cluster.forget([self._requests.key_of(state) for state in states if state.finish is not None])
        except Exception as problem:  # who follows them would wait for ever: the next server on the log tells them
            self._failed(problem)

    def _commit_ended(self, states: Sequence[RequestState]) -> None:
        """Commits sequences that ended outside a step."""
        if states:
            self._log.append(states, partial(self._deliver, states))

    def _log_changed(self) -> None:
        problem = self._log.problem
        message = f"nothing is accepted, streams wait: {problem}" if problem else "the commit log is written again"
        self._events.record("log", self._reconfigurer.epoch, message)

    def _failed(self, problem: BaseException) -> None:
        log.critical("the service cannot go on", exc_info=problem)
        if not self.failure.done():
            self.failure.set_exception(problem)

    async def _recover(self) -> None:
        """Takes up the requests that the log has, with what workers still have of their KV."""
        waiting = self._admission.recall(self._clock())
        remains = await self._cluster.reunite({key: certain(sequence.state) for key, sequence in waiting.items()})
        if remains is not None:
            limits = self._limits
            replicas = recalled(
                remains, waiting, limits.replica, limits.pages, limits.page_size, caching=limits.prefix_cache
            )
            self._dispatcher.recall(replicas)
            self._reconfigurer.recall(remains)
        if waiting:
            kept = sum(sequence.computed > 0 for sequence in waiting.values())
            message = f"{len(waiting)} sequences of an earlier run go on, {kept} of them with KV"
            self._events.record("recovered", self._reconfigurer.epoch, message, sequences=len(waiting), kept=kept)

    async def _purge(self) -> None:
        while True:
            await asyncio.sleep(PURGE_SECONDS)
            self._requests.purge(self._clock())


def _replica_status(number: int, replica: Replica) -> ReplicaStatus:
    scheduler, pages = replica.scheduler, replica.scheduler.pages
    needed = [*(sequence.pages for sequence in scheduler.running.values()), *scheduler.reserved.values()]
    return ReplicaStatus(
        data=number,
        running=len(scheduler.running),
        waiting=len(scheduler.waiting),
        pages_used=len(set().union(*needed)),
        pages_total=pages.total,
        pages_cached=len(pages.cache.idle),
        tokens_prefilled=scheduler.prefilled,
        tokens_reused=scheduler.reuse.positions,
    )
