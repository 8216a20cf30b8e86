"""How close the whole engine comes to a bare jitted decode loop of the same model, and what a preemption costs.

``python -m spotjax.tools.bench_engine`` runs the model (SmolLM2-135M-Instruct unless told otherwise) in float32 on one
device, batch 1 and 8, 128-token prompts, 64 new tokens: once as one jitted function called in a loop (contiguous KV,
greedy, nothing else), once through scheduler, stages, commit log and streams. Both run in turns in one process, so the
ratio holds on a noisy machine. ``--pause`` measures announced and unannounced preemptions on the embedded default
instead. Prints tables; ``--output FILE`` writes JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

import spotjax
from spotjax import embedded
from spotjax.config import ServeConfig
from spotjax.engine.generation import GenerationRequest
from spotjax.engine.request import SamplingParams
from spotjax.models.catalog import Model, open_model
from spotjax.runtime.pipeline import LocalPipeline
from spotjax.tools.bare_loop import BareLoop

PROMPT, NEW = 128, 64
"""Tokens of every prompt, and new tokens of every sequence."""
console = Console()


def timed_steps(bare: BareLoop, prompts: np.ndarray) -> tuple[np.ndarray, float]:
    """Generates NEW tokens: (tokens (B, NEW), seconds from the first to the last)."""
    steps = bare.steps(prompts, NEW)
    out = [next(steps)]
    first = time.perf_counter()
    out += steps
    return np.stack(out, axis=1), time.perf_counter() - first


class HostTime:
    """Seconds that decode steps spend dispatching and waiting for the device, read off the pipelines."""

    def __init__(self, pipelines: Sequence[LocalPipeline]) -> None:
        self.waiting = 0.0
        self.steps = 0
        for pipeline in pipelines:
            self._wrap(pipeline)

    def _wrap(self, pipeline: LocalPipeline) -> None:
        dispatch = pipeline._dispatch

        def timed(batch: Any) -> Any:
            result = dispatch(batch)
            begin = time.perf_counter()
            result.block_until_ready()
            if all(len(span.tokens) == 1 for span in batch.spans):
                self.waiting += time.perf_counter() - begin
                self.steps += 1
            return result

        pipeline._dispatch = timed  # type: ignore[method-assign]


class Engine:
    """The whole engine on one device."""

    def __init__(self, server: embedded.EmbeddedServer) -> None:
        self.server = server
        self._runs = 0

    async def run(self, prompts: np.ndarray) -> tuple[np.ndarray, float, float]:
        """Tokens (B, NEW), seconds until every row has one, and from then to the last; through requests and streams."""
        self._runs += 1
        service, begin = self.server.service, time.perf_counter()
        sampling = SamplingParams(max_tokens=NEW, temperature=0.0, ignore_eos=True)
        ids = [f"bench-{self._runs}-{row}" for row in range(len(prompts))]
        for name, prompt in zip(ids, prompts.tolist(), strict=True):
            service.submit(GenerationRequest(name, tuple(prompt), sampling))
        firsts: list[float] = []

        async def read(name: str) -> list[int]:
            tokens: list[int] = []
            async for delta in service.stream(name):
                if not tokens:
                    firsts.append(time.perf_counter())
                tokens += delta.tokens
            return tokens

        out = await asyncio.gather(*(read(name) for name in ids))
        end = time.perf_counter()
        # the last to start: from then on all rows decode, as in the bare loop
        return np.array(out), max(firsts) - begin, end - max(firsts)

    async def settle(self, prompts: np.ndarray) -> None:
        """Runs until whole stages are compiled."""
        for _ in range(2):
            await self.run(prompts)
            await asyncio.to_thread(self.server.cluster.model.executables.wait_for_background)


async def compare(model: Model, batch: int, repeats: int) -> dict[str, Any]:
    """Bare loop and engine in turns; medians over the repeats."""
    devices = embedded.local_instances(1, 1)
    config = ServeConfig(
        model=model.name, instances=1, devices_per_instance=1, mesh="1x1x1", max_batch=8, max_model_len=256,
        prefill_tokens=128, durability="none", prefix_cache=False,  # prompts are repeated
    )  # fmt: skip
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, model.checkpoint.spec.config.vocab, (batch, PROMPT)).astype(np.int32)
    bare, engine = BareLoop(model), Engine(await embedded.serve_model(config, model, devices))
    try:
        timed_steps(bare, prompts)
        await engine.settle(prompts)
        rates: dict[str, list[float]] = {"bare": [], "engine": []}
        for _ in range(repeats):
            expected, seconds = timed_steps(bare, prompts)
            rates["bare"].append(batch * (NEW - 1) / seconds)
            tokens, _, seconds = await engine.run(prompts)
            rates["engine"].append((tokens.size - batch) / seconds)
            equal = bool((tokens == expected).all())
        host = HostTime(engine.server.cluster.pipelines)
        _, _, seconds = await engine.run(prompts)
    finally:
        await engine.server.close()
    steps = NEW - 1
    bare_rate, engine_rate = (statistics.median(rates[name]) for name in ("bare", "engine"))
    return {
        "batch": batch,
        "bare_tokens_per_second": bare_rate,
        "engine_tokens_per_second": engine_rate,
        "ratio": statistics.median(e / b for e, b in zip(rates["engine"], rates["bare"], strict=True)),
        "step_ms": 1e3 * batch / engine_rate,
        "outside_device_ms": 1e3 * max(0.0, seconds / steps - host.waiting / host.steps),
        "same_tokens": equal,
    }


async def pauses(model: Model, mesh: str, streams: int, seed: int) -> list[dict[str, Any]]:
    """Largest gap between two tokens of running streams, over their median gap, for one event of each kind."""
    config = ServeConfig(model=model.name, mesh=mesh, durability="none")
    devices = embedded.local_instances(config.embedded_instances, config.devices_per_instance)
    server = await embedded.serve_model(config, model, devices)
    service, executables = server.service, server.cluster.model.executables
    rng = np.random.default_rng(seed)
    vocab = model.checkpoint.spec.config.vocab
    results: list[dict[str, Any]] = []

    async def under_load(kind: str, event: Callable[[], Any]) -> None:
        prompts = rng.integers(0, vocab, (streams, 64)).tolist()
        sampling = SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True)
        times: dict[str, list[float]] = {f"{kind}-{row}": [] for row in range(streams)}
        half = asyncio.Event()
        for name, prompt in zip(times, prompts, strict=True):
            service.submit(GenerationRequest(name, tuple(prompt), sampling))

        async def read(name: str) -> None:
            async for _ in service.stream(name):
                times[name].append(time.perf_counter())
                if all(len(seen) > 60 for seen in times.values()):
                    half.set()

        reading = [asyncio.create_task(read(name)) for name in times]
        await half.wait()
        compiled = executables.compiled
        report = await event() if event is not None else None
        await asyncio.gather(*reading)
        gaps = [np.diff(seen) for seen in times.values()]
        median = float(np.median(np.concatenate(gaps)))
        longest = float(max(gap.max() for gap in gaps))
        results.append(
            {
                "event": kind,
                "mesh_after": str(report.after.shape) if report and report.after else "",
                "median_step_ms": 1e3 * median,
                "largest_gap_ms": 1e3 * longest,
                "gap_in_steps": longest / median,
                "pause_ms": 1e3 * report.pause_seconds if report else 0.0,
                "bytes_moved": report.bytes_moved if report else 0,
                "compiled": executables.compiled - compiled,
            }
        )

    async def nothing() -> None:
        return None

    await under_load("warm-up", nothing)
    await asyncio.to_thread(executables.wait_for_background)
    await under_load("no event", nothing)
    await under_load("announced leave", lambda: service.preempt("instance-1", 30.0))
    await under_load("join", lambda: service.add(1))
    await under_load("unannounced loss", lambda: service.preempt("instance-2", 0.0))
    await server.close()
    return results[1:]


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    return {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "jax": jax.__version__,
        "spotjax": spotjax.__version__,
        "platform": jax.devices()[0].platform,
    }


def table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    """Results as a table."""
    shown = Table(title=title)
    for name in rows[0]:
        shown.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        shown.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    return shown


def report(title: str, rows: Sequence[dict[str, Any]], output: Path | None) -> None:
    """Prints results, and writes them to a file if one is given."""
    console.print(table(title, rows))
    console.print(machine())
    if output:
        output.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2) + "\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="default: smollm2-135m-instruct, with --pause tiny")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--pause", action="store_true", help="measure preemptions on the embedded default")
    parser.add_argument("--mesh", default="auto", help="mesh that --pause starts on")
    parser.add_argument("--streams", type=int, default=8, help="concurrent streams with --pause")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    model = open_model(arguments.model or ("tiny" if arguments.pause else "smollm2-135m-instruct"))
    if arguments.pause:
        rows = asyncio.run(pauses(model, arguments.mesh, arguments.streams, arguments.seed))
        report(f"{model.name}: preemptions on the embedded default", rows, arguments.output)
    else:
        rows = [asyncio.run(compare(model, batch, arguments.repeats)) for batch in arguments.batch]
        report(f"{model.name} float32, one device, {PROMPT}-token prompts, {NEW} new tokens", rows, arguments.output)


if __name__ == "__main__":
    main()
