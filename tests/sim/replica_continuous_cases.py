"""Workloads for the simulated replica, and the same replica step by step: the real scheduler over pipelined stages."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from itertools import count

import numpy as np

from spotjax.engine.batch import Batch
from spotjax.engine.pages import PageAllocator
from spotjax.engine.request import FinishReason, RequestState, SamplingParams
from spotjax.engine.scheduler import Limits, Scheduler
from spotjax.engine.sequence import Sequence
from spotjax.meshes.instance import InstanceType
from spotjax.meshes.layout import split_layers
from spotjax.meshes.shape import MeshShape
from spotjax.models.presets import preset
from spotjax.planner.cost import Roofline
from spotjax.planner.latency import LatencyModel, Stage, Work
from spotjax.runtime.buckets import Buckets
from spotjax.sim.events import EventQueue
from spotjax.sim.replica_continuous import ContinuousReplica
from spotjax.sim.requests import RequestBook
from spotjax.sim.times import ReplicaTimes
from spotjax.sim.workload import RequestTrace

T4 = InstanceType("t4 x 4", 4, 15 * 2**30, 65e12, 320e9, 8e9, 3e9)


@dataclass(frozen=True)
class Case:
    """One replica and its requests."""

    trace: RequestTrace
    model: LatencyModel
    stages: int = 1
    tensor: int = 4
    layers: int = 32
    max_batch: int = 8
    pages: int = 4000
    page_size: int = 16
    prefill_tokens: int = 512

    @property
    def times(self) -> ReplicaTimes:
        shape = MeshShape(1, self.stages, self.tensor)
        return ReplicaTimes(self.model, shape, split_layers(self.layers, self.stages))


def workload(
    seed: int, requests: int, rate: float, prompt: tuple[int, int], output: tuple[int, int], gap_cv: float = 1.0
) -> RequestTrace:
    """Gamma arrivals; lengths uniform between bounds, both included."""
    random = np.random.default_rng(seed)
    gaps = random.gamma(1 / gap_cv**2, gap_cv**2 / rate, requests)
    lengths = [random.integers(low, high + 1, requests) for low, high in (prompt, output)]
    return RequestTrace.of(f"seed {seed}", np.cumsum(gaps), *lengths)


def roofline() -> LatencyModel:
    return Roofline(preset("llama-3-8b"), T4)


def simulated(case: Case) -> RequestBook:
    """Fast-forward."""
    book, queue = RequestBook(case.trace), EventQueue()
    ended: list[int] = []
    replica = ContinuousReplica(
        case.times, case.max_batch, case.pages, case.page_size, book, queue, ended.append, case.prefill_tokens
    )
    queue.run(1e9, book.arrival, replica.add)
    assert sorted(ended) == list(range(len(book))) and replica.load == 0
    return book


@dataclass
class StepByStep:
    """Drives a real scheduler in virtual time; every stage runs one batch after the other."""

    case: Case
    now: float = 0.0
    book: RequestBook = field(init=False)
    preempted: int = 0
    computed: dict[int, int] = field(default_factory=dict)
    """Positions of each request whose KV was there at some time."""

    def run(self) -> RequestBook:
        """Lets all requests come and end."""
        case = self.case
        self.book = book = RequestBook(case.trace)
        buckets = Buckets(case.max_batch, case.prefill_tokens, case.page_size, 1 << 16)
        limits = Limits(case.max_batch, case.prefill_tokens, case.stages, buckets.prefill_fits)
        scheduler = Scheduler(limits, PageAllocator(case.pages, case.page_size))
        layers = split_layers(case.layers, case.stages)
        stages = [Stage(stop - start, n == 0, n == case.stages - 1) for n, (start, stop) in enumerate(layers)]
        free = [0.0] * case.stages
        numbers = count()
        events: list[tuple[float, int, Batch | int]] = [(at, next(numbers), n) for n, at in enumerate(book.arrival)]
        in_flight = 0
        while events:
            self.now, _, event = heappop(events)
            if isinstance(event, int):
                sampling = SamplingParams(max_tokens=book.output[event], ignore_eos=True)
                scheduler.add(Sequence(event, RequestState(str(event), 0, (0,) * book.prompt[event], sampling)))
            else:
                in_flight -= 1
                self._commit(scheduler, event)
            if events and events[0][0] == self.now:
                continue
            while in_flight < case.stages and (batch := scheduler.schedule()) is not None:
                in_flight += 1
                heappush(events, (self._through(stages, free, batch), next(numbers), batch))
        assert scheduler.load == 0
        self.preempted = scheduler.preempted
        return book

    def _through(self, stages: list[Stage], free: list[float], batch: Batch) -> float:
        """When a batch comes out of the pipeline that enters it now."""
        lengths = [(span.start, len(span.tokens)) for span in batch.spans]
        pairs = sum(length * start + length * (length + 1) // 2 for start, length in lengths)
        cached = sum(start + length for start, length in lengths)
        work = Work(sum(length for _, length in lengths), pairs, cached, len(lengths))
        at = self.now
        for n, stage in enumerate(stages):
            at = max(at, free[n]) + self.case.model.stage_seconds(stage, self.case.tensor, work)
            free[n] = at
            at += self.case.model.hop_seconds(work.tokens) if n + 1 < len(stages) else 0.0
        return at

    def _commit(self, scheduler: Scheduler, batch: Batch) -> None:
        states = {}
        for span in batch.spans:
            stop, known = span.start + len(span.tokens), self.computed.get(span.sequence, 0)
            self.book.recomputed[span.sequence] += max(0, min(stop, known) - span.start)
            self.computed[span.sequence] = max(stop, known)
            if span.samples:
                state = replace(span.state, tokens=(*span.state.tokens, 0))
                if len(state.tokens) == state.sampling.max_tokens:
                    state = state.finished(FinishReason.LENGTH)
                    self.book.finish[span.sequence] = self.now
                states[span.sequence] = state
                if len(state.tokens) == 1:
                    self.book.first_token[span.sequence] = self.now
                else:
                    self.book.wait(span.sequence, self.now)
                self.book.last_token[span.sequence] = self.now
        scheduler.commit(batch, states)
