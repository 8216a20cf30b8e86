"""The controller: takes requests, streams what is committed, shows and changes the fleet. A ``fleet.service.Service``.

Puts the parts together; how a mesh changes is in ``reconfigure``, what runs next in ``engine.scheduler``.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import Any

from spotjax.engine.batch import Pipeline
from spotjax.engine.commit_log import CommitLog
from spotjax.engine.generation import Delta, GenerationRequest
from spotjax.engine.replica import Replica
from spotjax.engine.request import FinishReason, RequestState
from spotjax.engine.scheduler import Limits, Scheduler
from spotjax.engine.scheduler import Sequence as ScheduledSequence
from spotjax.engine.text import Detokenizer
from spotjax.errors import Draining, InstanceLost, InvalidRequest, Overloaded
from spotjax.fleet.change import Planning
from spotjax.fleet.cluster import Cluster
from spotjax.fleet.dispatch import Dispatcher
from spotjax.fleet.events import EventLog
from spotjax.fleet.membership import Membership
from spotjax.fleet.reconfigure import Clock, Reconfigurer
from spotjax.fleet.requests import AcceptedRequest, RequestTable
from spotjax.fleet.status import FleetEvent, FleetStatus, InstanceStatus, Reconfiguration, ReplicaStatus
from spotjax.meshes.instance import Instance, InstanceState
from spotjax.meshes.shape import Position

log = logging.getLogger(__name__)
Supply = Callable[[int], Awaitable[Sequence[str]]]
PURGE_SECONDS = 10.0
"""How often finished requests are looked through for those past their retention."""


@dataclass(frozen=True)
class ServiceLimits:
    """What the service accepts.

    Attributes:
      max_positions: longest prompt and output together, in tokens.
      pages: KV pages of one replica, page 0 included.
      page_size: positions per page.
      queue: sequences that may wait before requests are refused.
      retain_seconds: how long finished requests can be resumed.
      replica: limits of one replica by the depth of its pipeline.
    """

    max_positions: int
    pages: int
    page_size: int
    queue: int
    retain_seconds: float
    replica: Callable[[int], Limits]


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
      supply: starts so many more instances and names them; they arrive sooner or later. By default it takes those that
        are gone.
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
    ) -> None:
        self._model_name, self._members, self._cluster, self._limits = model_name, members, cluster, limits
        self._log, self._detokenizer, self._end_tokens, self._clock = log, detokenizer, end_tokens, clock
        self._events = EventLog(wall_clock)
        self._requests = RequestTable(log, limits.retain_seconds)
        self.failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Fails with the error that the service cannot go on from."""
        self._dispatcher = Dispatcher(self._make_replica, limits.replica, limits.pages, limits.page_size, self._failed)
        self._reconfigurer = Reconfigurer(
            planning, members, cluster, self._dispatcher, self._events, clock, self._commit_ended
        )
        self._keys = itertools.count()
        self._draining = False
        self._ready_since: float | None = None
        self._all_finished = asyncio.Event()
        self._purging: asyncio.Task[None] | None = None
        self._changes: set[asyncio.Task[Reconfiguration]] = set()
        self._supply: Supply = supply or self._take_spare
        self._awaited: dict[str, asyncio.Future[Reconfiguration]] = {}

    async def start(self) -> Reconfiguration:
        """Forms the first mesh."""
        report = await self._reconfigurer.reconfigure()
        self._ready_since = self._clock()
        self._purging = asyncio.create_task(self._purge())
        self._events.record("ready", self._reconfigurer.epoch, f"serving {self._model_name}")
        return report

    async def close(self) -> None:
        """Stops at the next token boundary and frees everything; unfinished requests stay in the commit log."""
        if self._purging is not None:
            self._purging.cancel()
        await asyncio.gather(*self._changes, return_exceptions=True)
        await self._dispatcher.stop()
        self._events.close()
        await self._cluster.close()

    def submit(self, request: GenerationRequest) -> None:
        """See ``GenerationService.submit``."""
        self._check(request)
        states = [
            RequestState(request.request_id, choice, request.prompt, request.sampling, self._end_tokens)
            for choice in range(request.n)
        ]
        self._log.accept(request, states)
        sequences = tuple(ScheduledSequence(next(self._keys), state) for state in states)
        self._requests.add(AcceptedRequest(request, sequences))
        self._all_finished.clear()
        for sequence in sequences:
            self._dispatcher.add(sequence)

    def stream(self, request_id: str, offsets: Sequence[int] = ()) -> AsyncIterator[Delta]:
        """See ``GenerationService.stream``."""
        return self._requests.stream(request_id, offsets)

    def cancel(self, request_id: str, reason: str = "cancelled") -> bool:
        """See ``GenerationService.cancel``."""
        accepted = self._requests.get(request_id)
        if accepted.finished_at is not None:
            return False
        unfinished = [sequence for sequence in accepted.sequences if sequence.state.finish is None]
        ended = [s.state for s in unfinished if self._dispatcher.cancel(s, FinishReason(reason))]
        self._commit_ended(ended)
        return True

    def status(self) -> FleetStatus:
        """See ``FleetService.status``."""
        placement = self._reconfigurer.placement
        positions: dict[str, dict[int, Position]] = {}
        for position, device in placement.devices.items() if placement else ():
            positions.setdefault(device.instance, {})[device.index] = position
        since = self._ready_since
        return FleetStatus(
            model=self._model_name,
            ready=since is not None and placement is not None and not self._draining,
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
                )
                for i in self._members.all()
            ),
            replicas=tuple(_replica_status(n, replica) for n, replica in enumerate(self._dispatcher.replicas)),
            queued=len(self._dispatcher.parked),
            requests_running=self._requests.running,
            requests_finished=self._requests.finished,
            tokens_committed=self._requests.tokens,
            reconfigurations=max(0, self._reconfigurer.epoch - 1),
            uptime_seconds=self._clock() - since if since is not None else 0.0,
        )

    def recent(self) -> Sequence[FleetEvent]:
        """See ``FleetService.recent``."""
        return self._events.recent()

    def watch(self) -> AsyncIterator[FleetEvent]:
        """See ``FleetService.watch``."""
        return self._events.follow()

    async def preempt(self, instance: str, grace_seconds: float) -> Reconfiguration:
        """See ``FleetService.preempt``."""
        joining = self._members.require_alive(instance).state is InstanceState.JOINING
        if joining or grace_seconds <= 0:
            self._cluster.evict(instance, at_once=True)
            self._lose(instance, "before it joined" if joining else "without notice")
            return await self._finish(self._reconfigurer.reconfigure())
        return await self._finish(self._notice(instance, grace_seconds))

    async def release(self, instance: str) -> Reconfiguration:
        """See ``FleetService.release``."""
        self._members.require_alive(instance)
        self._reconfigurer.require_feasible_without(instance)
        self._members.set_state(instance, InstanceState.DRAINING)
        self._events.record("notice", self._reconfigurer.epoch, f"instance {instance} is drained", instance=instance)
        return await self._finish(self._leave(instance, None))

    async def add(self, count: int) -> Reconfiguration:
        """See ``FleetService.add``."""
        names = await self._supply(count)
        absent = [name for name in names if not self._cluster.joinable(name)]
        if not absent:
            return await self._finish(self._reconfigurer.reconfigure())
        for name in absent:
            self._awaited[name] = asyncio.get_running_loop().create_future()
        reports = await asyncio.gather(*(self._awaited[name] for name in absent))
        return max(reports, key=lambda report: report.epoch)

    # What becomes known of instances that are processes of their own:

    def registered(self, instance: Instance) -> None:
        """A new instance gets ready to join."""
        self._members.register(replace(instance, state=InstanceState.JOINING))
        message = f"instance {instance.name} registered, {instance.type.devices} devices at {instance.address}"
        self._events.record("registered", self._reconfigurer.epoch, message, instance=instance.name)

    def arrived(self, instance: str) -> None:
        """It is ready to join."""
        if self._ready_since is None:
            return  # part of the first mesh
        change = self._in_background(self._reconfigurer.reconfigure())
        if (awaited := self._awaited.pop(instance, None)) is not None:
            change.add_done_callback(lambda done: _pass_on(done, awaited))

    def noticed(self, instance: str, seconds: float) -> None:
        """It will be gone in so many seconds."""
        if instance in self._members.having(InstanceState.READY):
            self._in_background(self._notice(instance, seconds))
        elif instance in self._members.having(InstanceState.JOINING):
            self.gone(instance, "before it joined")

    def gone(self, instance: str, how: str) -> None:
        """It is gone already."""
        if (awaited := self._awaited.pop(instance, None)) is not None and not awaited.done():
            awaited.set_exception(InstanceLost(f"instance {instance} is gone before it joined: {how}"))
        if instance not in {alive.name for alive in self._members.alive()}:
            return
        self._lose(instance, how)
        if self._ready_since is not None:
            self._in_background(self._reconfigurer.reconfigure())

    async def drain(self, seconds: float) -> bool:
        """See ``Service.drain``."""
        self._draining = True
        self._events.record("draining", self._reconfigurer.epoch, f"draining, at most {seconds:g} s", seconds=seconds)
        if self._requests.running:
            try:
                await asyncio.wait_for(self._all_finished.wait(), seconds)
            except TimeoutError:
                return False
        return True

    def check(self) -> None:
        """Verifies that page accounting balances on every replica; for tests, at rest."""
        self._dispatcher.check()

    def _check(self, request: GenerationRequest) -> None:
        """Refuses what cannot be taken, with the limit."""
        if self._draining:
            raise Draining("the server is draining and takes no new requests; try another one")
        if request.request_id in self._requests:
            raise InvalidRequest("request_id", f"{request.request_id!r} is taken; choose another or resume it")
        longest = min(self._limits.max_positions, (self._limits.pages - 1) * self._limits.page_size)
        asked = len(request.prompt) + request.sampling.max_tokens
        if asked > longest:
            raise InvalidRequest(
                "sampling.max_tokens",
                f"prompt ({len(request.prompt)}) and max_tokens ({request.sampling.max_tokens}) together must be at "
                f"most {longest} tokens, got {asked}",
            )
        if request.n > self._limits.queue:
            raise InvalidRequest("n", f"must be at most {self._limits.queue}, the length of the queue, got {request.n}")
        if self._dispatcher.waiting + request.n > self._limits.queue:
            raise Overloaded(
                f"{self._dispatcher.waiting} sequences are waiting, at most {self._limits.queue} may; try again later",
                retry_after=1.0,
            )

    def _make_replica(self, scheduler: Scheduler, pipeline: Pipeline) -> Replica:
        return Replica(scheduler, pipeline, self._log, self._detokenizer, self._deliver)

    def _deliver(self, states: Sequence[RequestState]) -> None:
        self._requests.committed(states, self._clock())
        if not self._requests.running:
            self._all_finished.set()

    def _commit_ended(self, states: Sequence[RequestState]) -> None:
        """Commits sequences that ended outside a step."""
        self._log.append(states)
        self._deliver(states)

    async def _take_spare(self, count: int) -> Sequence[str]:
        return self._members.take_spare(count)

    async def _notice(self, instance: str, grace_seconds: float) -> Reconfiguration:
        self._members.set_state(instance, InstanceState.NOTICED)
        message = f"instance {instance} will be taken in {grace_seconds:g} s"
        self._events.record("notice", self._reconfigurer.epoch, message, instance=instance, seconds=grace_seconds)
        return await self._leave(instance, grace_seconds)

    async def _leave(self, instance: str, grace_seconds: float | None) -> Reconfiguration:
        """Moves off an instance, which is gone when that is done or when its grace, if it has an end, is over."""
        deadline = None
        if grace_seconds is not None:
            call_later = asyncio.get_running_loop().call_later
            deadline = call_later(grace_seconds, self._lose_leaving, instance, "at its deadline")
        try:
            return await self._reconfigurer.reconfigure()
        finally:
            if deadline is not None:
                deadline.cancel()
            self._lose_leaving(instance, "as announced")

    def _in_background(self, change: Coroutine[Any, Any, Reconfiguration]) -> asyncio.Task[Reconfiguration]:
        task = asyncio.create_task(change)
        self._changes.add(task)
        task.add_done_callback(self._change_ended)
        return task

    async def _finish(self, change: Coroutine[Any, Any, Reconfiguration]) -> Reconfiguration:
        """Carries a change through even if whoever asked for it goes away. An error in one ends the service."""
        return await asyncio.shield(self._in_background(change))

    def _change_ended(self, change: asyncio.Task[Reconfiguration]) -> None:
        self._changes.discard(change)
        if not change.cancelled() and (problem := change.exception()) is not None:
            self._failed(problem)

    def _lose_leaving(self, instance: str, how: str) -> None:
        if instance in self._members.having(InstanceState.NOTICED) + self._members.having(InstanceState.DRAINING):
            self._cluster.evict(instance, at_once=False)  # else it is gone, or gone and back
            self._lose(instance, how)

    def _lose(self, instance: str, how: str) -> None:
        self._reconfigurer.lose(instance)
        self._events.record("lost", self._reconfigurer.epoch, f"instance {instance} is gone {how}", instance=instance)

    def _failed(self, problem: BaseException) -> None:
        log.critical("the service cannot go on", exc_info=problem)
        if not self.failure.done():
            self.failure.set_exception(problem)

    async def _purge(self) -> None:
        while True:
            await asyncio.sleep(PURGE_SECONDS)
            self._requests.purge(self._clock())


def _pass_on(change: asyncio.Task[Reconfiguration], awaited: asyncio.Future[Reconfiguration]) -> None:
    """What a change comes to, to who waits for it."""
    if awaited.done():
        return
    if change.cancelled():
        awaited.cancel()
    elif (problem := change.exception()) is not None:
        awaited.set_exception(problem)
    else:
        awaited.set_result(change.result())


def _replica_status(number: int, replica: Replica) -> ReplicaStatus:
    scheduler = replica.scheduler
    used = scheduler.pages.total - scheduler.pages.free
    return ReplicaStatus(number, len(scheduler.running), len(scheduler.waiting), used, scheduler.pages.total)
