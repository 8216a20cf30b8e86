"""A pure cluster in which everything takes time, and whose instances arrive when they are ready."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from random import Random

from fleet_cases import PAGE_SIZE, PureCluster, Service, instances, make_service
from pure_model import PurePipeline

from spotjax.engine.batch import Batch, StepResult
from spotjax.fleet.boundary import Leave
from spotjax.fleet.notices.notice import Notice, NoticeKind, Withdrawn
from spotjax.meshes.instance import Instance
from spotjax.reshard.transfer import PageTransfer, Preparation, Traffic

SECONDS = 0.1
"""The longest that parameters, a round of copying or a switch take."""


def now() -> float:
    return asyncio.get_running_loop().time()


@dataclass
class TimedPipeline(PurePipeline):
    """Its steps take seconds.

    Attributes:
      seconds: of the next step.
      working: steps under way.
      steps: when each came back.
    """

    seconds: Callable[[], float] = lambda: 0.05
    working: int = 0
    steps: list[float] = field(default_factory=list)

    async def run(self, batch: Batch) -> StepResult:
        self.working += 1
        try:
            return await super().run(batch)
        finally:
            self.working -= 1

    async def work(self) -> None:
        await asyncio.sleep(self.seconds())
        self.steps.append(now())


class TimedCluster(PureCluster):
    """A pure cluster in time.

    Attributes:
      absent: instances that are not ready to be given work.
      kept: monotonic deadlines of instances that had enough notice; no step may be under way on one that has left.
      late: what went wrong about that.
      copies: pages of every round of copying.
    """

    def __init__(self, random: Random, fault: Callable[[], None] = lambda: None) -> None:
        super().__init__(random, fault)
        self.absent: set[str] = set()
        self.kept: dict[str, float] = {}
        self.late: list[str] = []
        self.copies: list[int] = []

    async def prepare(self, preparation: Preparation) -> Traffic:
        traffic = await super().prepare(preparation)
        depth = preparation.placement.shape.stage
        self._fresh = [TimedPipeline(PAGE_SIZE, depth, lambda: 0, seconds=self._step_seconds) for _ in self._fresh]
        return traffic

    async def copy_pages(self, transfers: Sequence[PageTransfer]) -> Traffic:
        self.copies.append(sum(len(transfer.pages) for transfer in transfers))
        return await super().copy_pages(transfers)

    async def switch(self, transfers: Sequence[PageTransfer]) -> tuple[Sequence[PurePipeline], Traffic]:
        assert self._prepared is not None
        for old, pipeline in enumerate(self.pipelines):
            assert old in self._prepared.carried or not pipeline.working, "a step is under way"
        return await super().switch(transfers)

    def evict(self, instance: str, *, at_once: bool) -> None:
        super().evict(instance, at_once=at_once)
        deadline = self.kept.pop(instance, None)
        for pipeline, home in zip(self.pipelines, self._homes, strict=True):
            if deadline is not None and not at_once and instance in home and pipeline.working:
                self.late.append(f"{instance} still worked when it left, {deadline - now():.3f} s before its end")

    def lose(self, instance: str) -> None:
        super().lose(instance)
        self.kept.pop(instance, None)  # it died before

    def joinable(self, instance: str) -> bool:
        return instance not in self.absent

    async def _take_time(self) -> None:
        await asyncio.sleep(self._random.uniform(0, SECONDS))

    def _step_seconds(self) -> float:
        return self._random.uniform(0.01, 0.05)


@dataclass
class Fleet:
    """A service whose instances are machines somewhere: they are supplied, register, arrive and die."""

    service: Service
    cluster: TimedCluster

    def register(self, instance: str) -> None:
        """A machine of that name is there and gets ready."""
        self.cluster.absent.add(instance)
        kind = self.service.members.all()[0].type
        self.service.controller.registered(Instance(instance, kind, address=f"{instance}:1"))

    def arrive(self, instance: str) -> None:
        """It is ready."""
        self.cluster.absent.discard(instance)
        self.service.controller.arrived(instance)

    def die(self, instance: str) -> None:
        """Its session ends."""
        self.service.controller.gone(instance, "(its connection closed)")

    def notice(
        self,
        instance: str,
        seconds: float | None,
        *,
        in_time: bool = True,
        source: str = "cloud",
        kind: NoticeKind = NoticeKind.PREEMPT,
    ) -> None:
        """Its cloud announces its end; ``in_time`` if that is long enough to leave it in order."""
        if in_time and seconds is not None:
            self.cluster.kept.setdefault(instance, now() + seconds)
        deadline = None if seconds is None else now() + seconds
        self.service.controller.noticed(Notice(source, kind, instance, deadline, "it said so"))

    def withdraw(self, instance: str, source: str = "cloud") -> None:
        """Its cloud takes that back."""
        self.cluster.kept.pop(instance, None)
        self.service.controller.noticed(Withdrawn(source, instance, "it said so"))

    async def finish(self) -> None:
        """Lets all requests end and closes; nothing has failed, and no deadline was missed."""
        assert await self.service.controller.drain(1e6), "requests hang"
        await self.service.controller.close()
        failure = self.service.controller.failure
        if failure.done():
            await failure
        failure.cancel()
        assert not self.cluster.late

    def kinds(self) -> list[str]:
        return [event.kind for event in self.service.controller.recent()]


async def make_fleet(
    count: int,
    alive: int | None = None,
    seed: int = 0,
    leave: Leave = "early",
    memory: int = 2**30,
    fault: Callable[[], None] = lambda: None,
    supply: Callable[[int], Awaitable[Sequence[str]]] | None = None,
    pages: int = 20,
) -> Fleet:
    """A fleet that serves."""
    random = Random(seed)
    cluster = TimedCluster(random, fault)
    service = make_service(
        random, instances(count, 1, memory), alive, pages,
        retain_seconds=1e9, cluster=cluster, supply=supply, leave=leave,
    )  # fmt: skip
    await service.controller.start()
    return Fleet(service, cluster)
