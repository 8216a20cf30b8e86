"""A cluster in memory, and a service over it whose whole life can be compared with an undisturbed one."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random

from pure_model import Letters, PurePipeline, turns, undisturbed
from recording_log import RecordingLog

from spotjax.engine.generation import Delta, GenerationRequest
from spotjax.engine.request import RequestState, SamplingParams
from spotjax.engine.scheduler import Limits
from spotjax.errors import InstanceLost
from spotjax.fleet.admission import ServiceLimits
from spotjax.fleet.attendance import Supply
from spotjax.fleet.boundary import Leave
from spotjax.fleet.change import Planning, Recovery
from spotjax.fleet.checkpoint_files import CheckpointFiles
from spotjax.fleet.controller import Controller
from spotjax.fleet.membership import Membership
from spotjax.fleet.observer import Observer
from spotjax.fleet.saving import Saves
from spotjax.meshes.instance import DeviceRef, Instance, InstanceState, InstanceType
from spotjax.meshes.placement import Placement
from spotjax.models.config import DecoderConfig
from spotjax.models.spec import ModelSpec
from spotjax.planner.demand import Demand
from spotjax.planner.needs import Needs
from spotjax.reshard.transfer import PageTransfer, Preparation, Remains, Survivors, Traffic

LETTERS = Letters()
PAGE_SIZE = 4
SPEC = ModelSpec(DecoderConfig(vocab=64, width=16, layers=4, heads=4, kv_heads=2, head_size=4, mlp=32))
TIGHT = SPEC.parameter_bytes
"""Memory of a device with which two devices hold the model and its KV, and one does not."""


def kind(devices: int = 1, memory: int = 2**30) -> InstanceType:
    return InstanceType(f"box{devices}", devices, memory, 1e9, 1e9, 1e9, 1e8)


def instances(count: int, devices: int = 1, memory: int = 2**30) -> list[Instance]:
    return [Instance(f"i{number}", kind(devices, memory)) for number in range(count)]


class PureCluster:
    """Instances of the pure model: nothing can be read from a lost one, and pages are only where they were brought.

    Args:
      random: how many turns everything takes.
      fault: called in the middle of everything that takes time; may raise InstanceLost.
    """

    def __init__(self, random: Random, fault: Callable[[], None] = lambda: None) -> None:
        self.lost: set[str] = set()
        self.pipelines: list[PurePipeline] = []
        self.closed = False
        self.switches = 0
        self._random, self._fault = random, fault
        self._homes: list[frozenset[str]] = []
        self._placement: Placement | None = None
        self._loaded: dict[DeviceRef, Needs] = {}
        self._prepared: Preparation | None = None
        self._fresh: list[PurePipeline] = []

    async def prepare(self, preparation: Preparation) -> Traffic:
        self._prepared = None
        for target in preparation.needs:
            assert target.instance not in self.lost, "planned onto a lost instance"
        for move in preparation.plan.moves:
            assert move.source is None or move.source in self._loaded, f"nothing can be read from {move.source}"
        await self._work(preparation)
        self._loaded |= preparation.needs
        self._prepared, shape = preparation, preparation.placement.shape
        self._fresh = [PurePipeline(PAGE_SIZE, shape.stage, self._delay) for _ in range(shape.data)]
        return Traffic(preparation.plan.bytes_moved, preparation.plan.bytes_loaded)

    async def switch(self, transfers: Sequence[PageTransfer]) -> tuple[Sequence[PurePipeline], Traffic]:
        prepared = self._prepared
        assert prepared is not None, "prepare comes before switch"
        carried = {new: self.pipelines[old] for old, new in prepared.carried.items()}
        stopped = [pipeline for pipeline in self.pipelines if pipeline not in carried.values()]
        assert not any(pipeline.in_flight for pipeline in stopped), "a step is in flight"
        self._fresh = [carried.get(data) or fresh for data, fresh in enumerate(self._fresh)]
        self._copy(transfers)
        await self._work(prepared)
        self.pipelines = self._fresh
        self._prepared, self._placement = None, prepared.placement
        self._homes = [prepared.placement.instances(data) for data in range(prepared.placement.shape.data)]
        self._loaded |= prepared.needs
        self.switches += 1
        return self.pipelines, Traffic()

    async def copy_pages(self, transfers: Sequence[PageTransfer]) -> Traffic:
        prepared = self._prepared
        assert prepared is not None, "prepare comes before copying pages"
        self._copy(transfers)
        await self._work(prepared)
        return Traffic(moved=sum(len(transfer.pages) for transfer in transfers))

    def _copy(self, transfers: Sequence[PageTransfer]) -> None:
        for transfer in transfers:
            assert self.lost.isdisjoint(self._homes[transfer.old]), "KV is read from a lost instance"
            self._fresh[transfer.new].done.append(frozenset(new for _, new in transfer.pages))
            for old, new in transfer.pages:
                for slot in range(PAGE_SIZE):
                    self._fresh[transfer.new].pages.pop((new, slot), None)
                    if (old, slot) in self.pipelines[transfer.old].pages:
                        self._fresh[transfer.new].pages[new, slot] = self.pipelines[transfer.old].pages[old, slot]

    async def reunite(self, sequences: Mapping[int, int]) -> Remains | None:
        """What is in the pages of those instances that are there, as the steps of before tell it."""
        await turns(self._random.randrange(3))
        self._prepared = None
        if self._placement is None:
            return None
        kept = {
            replica: {key: one for key, one in written(pipeline, sequences).items() if not pipeline.lost}
            for replica, pipeline in enumerate(self.pipelines)
        }
        holders = frozenset().union(*self._homes) - self.lost
        return Remains(self._placement, holders, kept)

    def outlive(self) -> None:
        """The controller is gone, and with it whatever it waited for."""
        for pipeline in self.pipelines:
            pipeline.in_flight.clear()

    def held(self) -> dict[DeviceRef, Needs]:
        return dict(self._loaded)

    def evict(self, instance: str, *, at_once: bool) -> None:
        pass

    async def survivors(self, hurt: Mapping[int, Mapping[int, int]]) -> Survivors:
        return Survivors()

    def forget(self, sequences: Sequence[int]) -> None:
        pass

    def joinable(self, instance: str) -> bool:
        return True

    def join(self, instance: str) -> None:
        stopped = all(not pipeline.in_flight for pipeline in self.pipelines)
        assert stopped or all(gone(instance) not in home for home in self._homes), "the mesh stands on its old self"
        self.lost.discard(instance)

    def lose(self, instance: str) -> None:
        self.lost |= {instance, gone(instance)}
        self._loaded = {device: held for device, held in self._loaded.items() if device.instance != instance}
        for pipeline, home in zip(self.pipelines, self._homes, strict=True):
            pipeline.lost |= instance in home
        self._homes = [frozenset(gone(i) if i == instance else i for i in home) for home in self._homes]

    async def close(self) -> None:
        self.closed = True

    def _delay(self) -> int:
        return self._random.choice((0, 1, 2, 9))

    async def _take_time(self) -> None:
        await turns(self._random.randrange(12))

    async def _work(self, preparation: Preparation) -> None:
        before = set(self.lost)
        await self._take_time()
        self._fault()
        sources = {move.source.instance for move in preparation.plan.moves if move.source is not None}
        targets = {device.instance for device in preparation.needs}
        if gone := (self.lost & targets) | ((self.lost - before) & sources):
            raise InstanceLost(f"instance {min(gone)} was lost meanwhile")


def gone(instance: str) -> str:
    """What an instance was: one of that name that is back is another."""
    return f"{instance} (gone)"


def written(pipeline: PurePipeline, certain: Mapping[int, int]) -> dict[int, tuple[tuple[int, ...], int]]:
    """Key to pages and positions of the sequences that a pipeline has KV of, by what was run on it."""
    kept: dict[int, tuple[tuple[int, ...], int]] = {}

    def write(pages: Iterable[int]) -> None:
        over = set(pages)
        for key in [key for key, (pages, _) in kept.items() if not over.isdisjoint(pages)]:
            del kept[key]

    for batch in pipeline.done:
        if isinstance(batch, frozenset):
            write(batch)
            continue
        for span in batch.spans:
            write(span.pages[span.start // PAGE_SIZE :])
            kept[span.sequence] = span.pages, span.start + len(span.tokens)
    return {key: (pages, min(n, certain[key])) for key, (pages, n) in kept.items() if certain.get(key)}


def random_prompt(random: Random, before: Iterable[GenerationRequest]) -> tuple[int, ...]:
    """A prompt that may begin as that of an earlier request does."""
    prompt = tuple(random.randrange(200) for _ in range(random.randint(1, 20)))
    prompts = [request.prompt for request in before]
    if prompts and random.random() < 0.6:
        begin = random.choice(prompts)
        prompt = (begin[: random.randint(1, len(begin))] + prompt)[:20]
    return prompt


@dataclass
class Service:
    """A controller over a pure cluster."""

    controller: Controller
    cluster: PureCluster
    log: RecordingLog
    members: Membership
    requests: dict[str, GenerationRequest] = field(default_factory=dict)

    def submit(
        self, name: str, prompt: Sequence[int] = (1, 2, 3), n: int = 1, resumable: bool = True, **sampling: object
    ) -> str:
        request = GenerationRequest(name, tuple(prompt), SamplingParams(**sampling), n, resumable)
        self.controller.submit(request)
        self.requests[name] = request
        return name

    def expected(self, name: str) -> list[RequestState]:
        request = self.requests[name]
        return [
            undisturbed(
                RequestState(name, choice, request.prompt, request.sampling, LETTERS.end_tokens),
                LETTERS,
            )
            for choice in range(request.n)
        ]

    def check_complete(self, *, but: Sequence[str] = ()) -> None:
        """Every request but some ended as if nothing had happened, and no page is owned by anybody."""
        for name in self.requests.keys() - set(but):
            assert list(self.log.states(name)) == self.expected(name)
        self.check_at_rest()

    def check_at_rest(self) -> None:
        self.controller.check()
        status = self.controller.status()
        assert status.requests_running == status.queued == 0
        assert status.requests_finished == len(self.requests)
        for replica in status.replicas:
            assert (replica.running, replica.waiting, replica.pages_used) == (0, 0, 0)


def make_service(
    random: Random,
    machines: Sequence[Instance],
    alive: int | None = None,
    pages: int = 20,
    max_batch: int = 3,
    queue: int = 1000,
    fault: Callable[[], None] = lambda: None,
    retain_seconds: float = 60.0,
    cluster: PureCluster | None = None,
    supply: Supply | None = None,
    leave: Leave = "early",
    log: RecordingLog | None = None,
    saves: Saves | None = None,
    files: CheckpointFiles | None = None,
    recovery: Recovery = "spotjax",
    observer: Observer | None = None,
) -> Service:
    """A service that is not started, of which the first ``alive`` instances are ready."""
    members = Membership(machines)
    for machine in machines[len(machines) if alive is None else alive :]:
        members.set_state(machine.name, InstanceState.GONE)
    cluster, log = cluster or PureCluster(random, fault), log or RecordingLog()
    limits = ServiceLimits(
        max_positions=40,
        pages=pages,
        page_size=PAGE_SIZE,
        queue=queue,
        retain_seconds=retain_seconds,
        replica=lambda depth: Limits(max_batch, 8, depth, lambda lengths: len(lengths) <= 2),
        prefix_cache=True,
    )
    demand = Demand(batch=max_batch, prompt=8, output=8, page_size=PAGE_SIZE, kv_pages=pages - 1, step_tokens=8)
    controller = Controller(
        "pure", Planning(SPEC, demand, recovery=recovery), members, cluster, log, LETTERS, LETTERS.end_tokens, limits,
        asyncio.get_running_loop().time, lambda: 1e9, supply, leave, saves, files, observer=observer,
    )  # fmt: skip
    logging.getLogger("spotjax.fleet.events").setLevel(logging.WARNING)
    return Service(controller, cluster, log, members)


@dataclass
class Reading:
    """What one client saw of a request."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    text: dict[int, str] = field(default_factory=dict)
    finished: dict[int, Delta] = field(default_factory=dict)

    def take(self, delta: Delta) -> None:
        seen = self.tokens.setdefault(delta.choice, [])
        assert delta.offset == len(seen), "a token was lost or repeated"
        assert delta.choice not in self.finished, "a choice ends once"
        assert delta.tokens or delta.finish is not None, "an empty delta"
        assert (delta.usage is None) == (delta.finish is None)
        seen += delta.tokens
        self.text[delta.choice] = self.text.get(delta.choice, "") + delta.text
        if delta.finish is not None:
            self.finished[delta.choice] = delta

    def check(self, states: Sequence[RequestState]) -> None:
        """It is exactly what was committed."""
        for state in states:
            assert tuple(self.tokens.get(state.choice, ())) == state.tokens
            assert self.text.get(state.choice, "") == state.text
            assert self.finished[state.choice].finish == state.finish


async def read(controller: Controller, name: str, random: Random | None = None) -> Reading:
    """Follows a request to its end; with ``random`` slowly, leaving and coming back in between."""
    reading = Reading()
    n = len(controller._requests.get(name).told)
    while True:
        stream = controller.stream(name, [len(reading.tokens.get(choice, ())) for choice in range(n)])
        ended = True
        async for delta in stream:
            if delta.choice not in reading.finished:  # a stream that is taken up tells of the end again
                reading.take(delta)
            if random is not None:
                await turns(random.randrange(4))
                if random.random() < 0.1:
                    ended = False
                    break
        await stream.aclose()
        if ended:
            return reading
