"""How long devices wait for the host between two steps, with and without steps that are dispatched ahead.

``python -m spotjax.tools.bench_look_ahead`` runs the loop of a replica over real stages in this process, batch 1 and 8,
once as it is and once with no step scheduled before the one that it follows is back, in turns, so that the ratio holds
on a noisy machine. The settings: one stage; two stages; one stage whose device takes ``--slow`` milliseconds longer a
step (a callback that sleeps: host and device do not share a processor then, as on an accelerator); one stage with a
host that is as much slower; and one stage on a worker that frames reach after ``--link`` milliseconds. For every stage
the waits are those between the end of a step's computation and the begin of the next one's dispatch. With ``--width``
and ``--layers`` a Llama with random weights (512 and 12: 41 million parameters) takes the place of the shipped model.
Prints a table; ``--output FILE`` writes JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np

from spotjax import embedded
from spotjax.config import ServeConfig
from spotjax.engine.batch import Batch, Pipeline, StepResult
from spotjax.engine.commit_log import MemoryCommitLog
from spotjax.engine.pages import PageAllocator
from spotjax.engine.replica import Replica
from spotjax.engine.request import RequestState, SamplingParams
from spotjax.engine.scheduler import Limits, Scheduler  # fmt: skip
from spotjax.engine.sequence import Sequence as ScheduledSequence
from spotjax.fleet.remote_pipeline import RemotePipeline
from spotjax.models.catalog import Model
from spotjax.protocol.steps import MaskHeader, ResultHeader, StepHeader
from spotjax.runtime.buckets import Buckets
from spotjax.runtime.compiled import CompiledModel
from spotjax.runtime.pipeline import LocalPipeline
from spotjax.runtime.stage import Stage
from spotjax.tools.bench_engine import console, report
from spotjax.tools.random_model import small_model
from spotjax.transport.memory import aligned
from spotjax.worker.executor import Role, StageExecutor
from spotjax.worker.watchdog import Watchdog

PAGE_SIZE, PROMPT = 16, 16


class Waits:
    """Notes when stages are given steps and when these are computed; decode steps only.

    Args:
      stages: watched from now on.
      slow: seconds that the last stage's device takes longer.
    """

    def __init__(self, stages: Sequence[Stage], slow: float) -> None:
        self._slow = slow
        self._spans: dict[Stage, list[tuple[float, float]]] = defaultdict(list)
        self._original = {stage: stage.run for stage in stages}
        self._queues: list[SimpleQueue[tuple[float, jax.Array] | None]] = []
        for stage in stages:
            queue: SimpleQueue[tuple[float, jax.Array] | None] = SimpleQueue()
            self._queues.append(queue)
            threading.Thread(target=self._watch, args=(stage, queue), daemon=True).start()
            stage.run = partial(self._run, stage, queue)  # type: ignore[method-assign]

    def _run(self, stage: Stage, queue: SimpleQueue[Any], shape: Any, *inputs: Any) -> jax.Array:
        entered = time.perf_counter()
        out: jax.Array = self._original[stage](shape, *inputs)
        if self._slow and stage.last:
            out = sleeping(self._slow)(out)
        if shape.span == 1:
            queue.put((entered, out))
        return out

    def _watch(self, stage: Stage, queue: SimpleQueue[tuple[float, jax.Array] | None]) -> None:
        while (seen := queue.get()) is not None:
            entered, out = seen
            out.block_until_ready()
            self._spans[stage].append((entered, time.perf_counter()))

    def end(self) -> tuple[float, float]:
        """Seconds that a stage waits for the next step, in the middle of all; share of the time that stages wait."""
        for queue, (stage, run) in zip(self._queues, self._original.items(), strict=True):
            queue.put(None)
            stage.run = run  # type: ignore[method-assign]
        waits, whole = [], 0.0
        for spans in self._spans.values():
            waits += [max(0.0, entered - ready) for (_, ready), (entered, _) in pairwise(spans)]
            whole += spans[-1][1] - spans[0][0]
        return statistics.median(waits), sum(waits) / whole


@cache
def sleeping(seconds: float) -> Callable[[jax.Array], jax.Array]:
    """A computation that takes so long and changes nothing."""

    def sleep(_: Any) -> np.ndarray:
        time.sleep(seconds)
        return np.zeros((), np.float32)

    def slow(values: jax.Array) -> jax.Array:
        zero: jax.Array = jax.pure_callback(sleep, jax.ShapeDtypeStruct((), jnp.float32), values[0, 0])
        return values + zero

    compiled: Callable[[jax.Array], jax.Array] = jax.jit(slow)
    return compiled


@dataclass
class Host:
    """The host's part of a replica: how much slower it is, and whether steps are dispatched ahead."""

    pipeline: Pipeline
    ahead: bool
    slow: float = 0.0

    @property
    def depth(self) -> int:
        """See ``Pipeline``."""
        return self.pipeline.depth

    async def run(self, batch: Batch) -> StepResult:
        """See ``Pipeline``; the time is spent on the event loop's thread, as scheduling and committing are."""
        result = await self.pipeline.run(batch)
        time.sleep(self.slow)
        return result


@dataclass
class Link:
    """A worker in this process that frames reach late."""

    model: CompiledModel
    stage: Stage
    buckets: Buckets
    seconds: float
    executor: StageExecutor = field(init=False)
    pipeline: RemotePipeline = field(init=False)

    def __post_init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        failed: Callable[[str], None] = console.print
        self.executor = StageExecutor(
            "worker", self.model, self.buckets.max_positions, self._answer, failed, Watchdog()
        )
        self.executor.install({("1.0", 0): Role(self.stage, 0, True, "")})
        self.pipeline = RemotePipeline("1.0", ["worker"], self.buckets, self._send, fuse=True)

    def _send(self, _: str, header: StepHeader | MaskHeader, payload: Sequence[memoryview]) -> None:
        assert isinstance(header, StepHeader), "nothing here has a structure"
        whole = b"".join(payload)
        frame = aligned(len(whole))
        frame[:] = whole
        self._loop.call_later(self.seconds, self.executor.receive, header, frame)

    def _answer(self, target: str, header: msgspec.Struct, payload: tuple[memoryview, ...]) -> None:
        assert isinstance(header, ResultHeader)
        frame, receive = memoryview(b"".join(payload)), self.pipeline.receive
        self._loop.call_soon_threadsafe(self._loop.call_later, self.seconds, receive, header, frame)


@contextmanager
def local(model: CompiledModel, stages: Sequence[Stage], buckets: Buckets, link: float) -> Iterator[Pipeline]:
    """The stages as a pipeline of this process, or behind a link."""
    if link:
        far = Link(model, stages[0], buckets, link)
        yield far.pipeline
        far.executor.close()
        return
    pipeline = LocalPipeline(model, buckets, stages, fuse=True)
    yield pipeline
    pipeline.close()


async def generate(
    pipeline: Pipeline, buckets: Buckets, batch: int, tokens: int
) -> tuple[float, list[tuple[int, ...]]]:
    """Runs a batch to its end: seconds a decode step, and what came out."""
    ended = asyncio.Event()
    firsts: dict[str, float] = {}
    ends: dict[str, RequestState] = {}

    def deliver(states: Sequence[RequestState]) -> None:
        for state in states:
            firsts.setdefault(state.request_id, time.perf_counter())
            if state.finish is not None:
                ends[state.request_id] = state
        if len(ends) == batch:
            ended.set()

    limits = Limits(buckets.max_batch, buckets.prefill_tokens, pipeline.depth, buckets.prefill_fits)
    pages = batch * -(-(PROMPT + tokens) // PAGE_SIZE) + 1
    scheduler = Scheduler(limits, PageAllocator(pages, PAGE_SIZE))
    replica = Replica(scheduler, pipeline, MemoryCommitLog(), Letters(), deliver)
    sampling = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    for key, prompt in enumerate(prompts(batch)):
        scheduler.add(ScheduledSequence(key, RequestState(str(key), 0, prompt, sampling)))
    loop = asyncio.create_task(replica.run())
    await ended.wait()
    end = time.perf_counter()
    replica.stop()
    await loop
    seconds = (end - max(firsts.values())) / (tokens - 1)
    return seconds, [ends[str(key)].tokens for key in range(batch)]


def prompts(count: int) -> list[tuple[int, ...]]:
    """Token ids that every vocabulary has."""
    return [tuple((13 * key + 7 * position) % 250 + 1 for position in range(PROMPT)) for key in range(count)]


class Letters:
    """A tokenizer that takes no time."""

    end_tokens: frozenset[int] = frozenset()

    def decode(self, tokens: Sequence[int]) -> str:
        """See ``engine.text.Detokenizer``."""
        return "x" * len(tokens)


@dataclass(frozen=True)
class Setting:
    """What is measured: stages, and what is slow, in seconds."""

    name: str
    stages: int = 1
    device: float = 0.0
    host: float = 0.0
    link: float = 0.0


async def measure(
    model: Model, settings: Sequence[Setting], batches: Sequence[int], tokens: int, repeats: int
) -> list[dict[str, Any]]:
    """All settings that have as many stages."""
    count = settings[0].stages
    config = ServeConfig(
        model=model.name, instances=count, devices_per_instance=1, mesh=f"1x{count}x1", max_batch=max(batches),
        max_model_len=512, prefill_tokens=128, page_size=PAGE_SIZE,
    )  # fmt: skip
    devices = dict(list(embedded.local_instances(2, 1).items())[:count])
    server = await embedded.serve_model(config, model, devices)
    stages, compiled = server.cluster.pipelines[0].stages, server.cluster.model
    buckets = Buckets(max(batches), 128, PAGE_SIZE, 512)
    rows = []
    for setting in settings:
        for batch in batches:
            with local(compiled, stages, buckets, setting.link) as pipeline:
                await generate(Host(pipeline, True), buckets, batch, tokens)
                await asyncio.to_thread(compiled.executables.wait_for_background)
                rows.append(await compare(setting, pipeline, stages, buckets, batch, tokens, repeats))
    await server.close()
    return rows


async def compare(
    setting: Setting,
    pipeline: Pipeline,
    stages: Sequence[Stage],
    buckets: Buckets,
    batch: int,
    tokens: int,
    repeats: int,
) -> dict[str, Any]:
    """One line of the table: with and without in turns, medians."""
    steps: dict[bool, list[float]] = {False: [], True: []}
    waits: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    outputs = set()
    for _ in range(repeats):
        for ahead in (False, True):
            watch = Waits(stages, setting.device)
            seconds, out = await generate(Host(pipeline, ahead, setting.host), buckets, batch, tokens)
            steps[ahead].append(seconds)
            waits[ahead].append(watch.end())
            outputs.add(tuple(out))
    row: dict[str, Any] = {"setting": setting.name, "batch": batch}
    for name, ahead in (("without", False), ("ahead", True)):
        wait, idle = (statistics.median(column) for column in zip(*waits[ahead], strict=True))
        row |= {f"step_ms_{name}": 1e3 * statistics.median(steps[ahead]), f"wait_ms_{name}": 1e3 * wait}
        row[f"idle_{name}"] = idle
    ratios = [a / b for a, b in zip(steps[True], steps[False], strict=True)]
    return row | {"ratio": statistics.median(ratios), "same_tokens": len(outputs) == 1}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, help="of a random Llama")
    parser.add_argument("--layers", type=int, default=12, help="of a random Llama")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--slow", type=float, default=5.0, help="milliseconds")
    parser.add_argument("--link", type=float, nargs="+", default=[0.1, 2.0], help="milliseconds one way")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    slow = arguments.slow / 1e3
    one = [
        Setting("one stage"),
        Setting(f"device + {arguments.slow:g} ms", device=slow),
        Setting(f"host + {arguments.slow:g} ms", host=slow),
        *(Setting(f"link {ms:g} ms", link=ms / 1e3) for ms in arguments.link),
        *(
            Setting(f"link {ms:g} ms, device + {arguments.slow:g} ms", device=slow, link=ms / 1e3)
            for ms in arguments.link
        ),
    ]
    with tempfile.TemporaryDirectory() as directory:
        model = small_model(arguments.width, arguments.layers, Path(directory))
        rows = [
            row
            for settings in (one, [Setting("two stages", stages=2)])
            for row in asyncio.run(measure(model, settings, arguments.batch, arguments.tokens, arguments.repeats))
        ]
    parameters = sum(array.size for array in model.checkpoint.spec.parameters)
    report(f"{model.name}, {parameters / 1e6:.3g} million parameters, float32", rows, arguments.output)


if __name__ == "__main__":
    main()
