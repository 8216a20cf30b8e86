"""What metrics and traces take of a step, on the tiny model and on SmolLM2-135M-Instruct.

``python -m spotjax.tools.bench_telemetry`` serves a model embedded on one device three times: with nobody listening,
with metrics, and with metrics and traces whose spans are made and thrown away. All three decode the same batches by
turns in one process, in changing order, so the ratio holds on a noisy machine; the median over the rounds counts.
Because what is measured is less than the noise of whole runs, it also says what the calls of one step take by
themselves: an observer is told of steps of that batch, without an engine. Prints tables; ``--output FILE`` writes JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import time
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
from prometheus_client.exposition import generate_latest
from rich.console import Console
from rich.table import Table

import spotjax
from spotjax import embedded
from spotjax.config import ServeConfig
from spotjax.engine.generation import GenerationRequest
from spotjax.engine.request import FinishReason, RequestState, SamplingParams
from spotjax.fleet.observer import Observer, Unobserved
from spotjax.models.catalog import Model, open_model
from spotjax.telemetry.recorder import Recorder
from spotjax.telemetry.server_telemetry import ServerTelemetry
from spotjax.telemetry.tracing import Tracing

PROMPT, NEW = 32, 96
"""Tokens of every prompt, and new tokens of every sequence."""
KINDS = ("off", "metrics", "traces")
console = Console()


def observer_of(kind: str) -> Observer:
    """Who listens; spans are made by the SDK, and nobody takes them."""
    if kind == "off":
        return Unobserved()
    if kind == "metrics":
        return Recorder()
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    exporter.shutdown()  # takes nothing
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return Recorder(Tracing(provider))


async def decode(server: embedded.EmbeddedServer, name: str, prompts: np.ndarray) -> float:
    """Seconds of a step while all rows decode: from the moment that all have begun to the last token."""
    sampling = SamplingParams(max_tokens=NEW, temperature=0.0, ignore_eos=True)
    times: list[list[float]] = [[] for _ in prompts]

    async def read(row: int) -> None:
        async for _ in server.service.stream(f"{name}-{row}"):
            times[row].append(time.perf_counter())

    for row, prompt in enumerate(prompts.tolist()):
        server.service.submit(GenerationRequest(f"{name}-{row}", tuple(prompt), sampling))
    await asyncio.gather(*map(read, range(len(prompts))))
    begin, end = max(seen[0] for seen in times), min(seen[-1] for seen in times)
    steps = sum(begin < at <= end for at in times[0])
    return (end - begin) / steps


async def compare(model: Model, batch: int, rounds: int) -> dict[str, Any]:
    """All three by turns; seconds of a step each, and what of the others' time is the cost."""
    config = ServeConfig(
        model=model.name, instances=1, devices_per_instance=1, mesh="1x1x1", max_batch=batch, max_model_len=256,
        prefill_tokens=128, durability="none", prefix_cache=False, retain_seconds=0.0,
    )  # fmt: skip
    prompts = np.random.default_rng(0).integers(0, model.checkpoint.spec.config.vocab, (batch, PROMPT))
    servers = {
        kind: await embedded.serve_model(config, model, embedded.local_instances(1, 1), observer_of(kind))
        for kind in KINDS
    }
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    try:
        for kind, server in servers.items():
            for warming in range(2):
                await decode(server, f"warm-{kind}-{warming}", prompts)
                await asyncio.to_thread(server.cluster.model.executables.wait_for_background)
        orders = list(permutations(KINDS))
        for number in range(rounds):
            for kind in orders[number % len(orders)]:
                seconds[kind].append(await decode(servers[kind], f"run-{number}", prompts))
    finally:
        for server in servers.values():
            await server.close()
    step = statistics.median(seconds["off"])
    result: dict[str, Any] = {"model": model.name, "batch": batch, "step_ms": 1e3 * step}
    for kind in KINDS[1:]:
        ratios = [on / off for on, off in zip(seconds[kind], seconds["off"], strict=True)]
        alone = calls(kind, batch, NEW)
        result[f"{kind}_percent"] = 100 * (statistics.median(ratios) - 1)
        result[f"{kind}_calls_us"] = 1e6 * alone
        result[f"{kind}_calls_percent"] = 100 * alone / step
    return result


def calls(kind: str, batch: int, steps: int) -> float:
    """Seconds of what an observer is told in one step, its share of requests that come and go included; least of 20."""
    sampling = SamplingParams(max_tokens=steps)
    times = []
    for number in range(20):
        observer = observer_of(kind)
        states = [
            [
                RequestState(
                    f"{number}-{row}", 0, (1,) * PROMPT, sampling, tokens=(1,) * token,
                    finish=FinishReason.LENGTH if token == steps else None,
                )
                for row in range(batch)
            ]
            for token in range(steps + 1)
        ]  # fmt: skip
        now = time.monotonic()
        begin = time.perf_counter()
        for state in states[0]:
            observer.arrived(GenerationRequest(state.request_id, state.prompt, sampling), now)
            observer.begun(state, now)
        for token in range(1, steps + 1):
            now += 0.01
            observer.stepped(False, 0.01)
            observer.recorded(0.001)
            observer.committed(states[token], now)
        times.append((time.perf_counter() - begin) / steps)
    return min(times)


def scrape() -> float:
    """Seconds that one scrape of a server takes which has nothing to serve; least of 20."""
    telemetry, times = ServerTelemetry(lambda: None), []
    for _ in range(20):
        begin = time.perf_counter()
        generate_latest(telemetry.registry)
        times.append(time.perf_counter() - begin)
    return min(times)


def show(results: Sequence[dict[str, Any]]) -> None:
    """The table."""
    table = Table(title="what metrics, and metrics with traces, take of a decode step")
    for heading in ("model", "batch", "step", "metrics", "calls", "traces, too", "calls"):
        table.add_column(heading, justify="left" if heading == "model" else "right", no_wrap=True)
    for r in results:
        row = [str(r["model"]), str(r["batch"]), f"{r['step_ms']:.3f} ms"]
        for kind in KINDS[1:]:
            calls_take = f"{r[f'{kind}_calls_us']:.1f} us, {r[f'{kind}_calls_percent']:.2f} %"
            row += [f"{r[f'{kind}_percent']:+.2f} %", calls_take]
        table.add_row(*row)
    console.print(table)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["tiny", "smollm2-135m-instruct"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=12, help="of which each serves all three ways once")
    parser.add_argument("--output", type=Path, help="JSON goes there")
    arguments = parser.parse_args()
    results = []
    for name in arguments.models:
        model = open_model(name)
        for batch in arguments.batches:
            results.append(asyncio.run(compare(model, batch, arguments.rounds)))
            show(results[-1:])
    seconds = scrape()
    console.print(f"a scrape: {1e3 * seconds:.2f} ms")
    if arguments.output:
        machine = {"cpus": os.cpu_count(), "load": os.getloadavg(), "python": platform.python_version()}
        report = {"spotjax": spotjax.__version__, "machine": machine, "results": results, "scrape_seconds": seconds}
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
