"""What running as a fleet of processes costs while nothing happens: ``python -m spotjax.tools.bench_fleet``.

* tokens/s of P = 1, 2 and 4 stages, a worker process for each, against the same mesh in one process (embedded mode),
  at a batch of ``--streams``; and from the time per token of a single stream, the overhead of a hop between processes
* tokens/s with KV backup against without
* the part of a step that committing its tokens keeps the controller from other things; how long it takes until they
  are on disk is ``bench_durability``'s
* bytes per second of a migration of about 1 GB of parameters between two workers, against a bare socket copy of as
  many bytes between two processes

What is compared runs in turns within one run, both sides started before; ratios are medians over the turns.
``--output FILE`` writes JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from safetensors.numpy import save_file

from spotjax.engine.durable_log import DurableLog
from spotjax.engine.generation import GenerationRequest
from spotjax.engine.request import RequestState, SamplingParams
from spotjax.models.catalog import SHIPPED
from spotjax.tools.bench_failover import machine
from spotjax.tools.local_fleet import EmbeddedService, LocalFleet
from spotjax.tools.service import Service, ready, running, serving
from spotjax.tools.transport_candidates import raw_bulk, raw_serve, source

PROMPT, NEW = 32, 160
"""Tokens of every prompt, and new tokens of every stream."""
WAIT_SECONDS = 300.0
console = Console(width=None if sys.stdout.isatty() else 160)


async def rate(service: Service, streams: int) -> float:
    """Tokens/s while all streams decode: from the last one's first token to the first one's last."""
    arrivals: list[list[tuple[float, int]]] = []

    async def read(number: int) -> None:
        seen: list[tuple[float, int]] = []
        arrivals.append(seen)
        prompt = [1 + (number + position) % 100 for position in range(PROMPT)]
        async for delta in service.client.generate(prompt, max_tokens=NEW, temperature=0.0, ignore_eos=True):
            seen.append((time.perf_counter(), delta.offset + len(delta.tokens)))

    await asyncio.gather(*(read(number) for number in range(streams)))
    begin, end = max(seen[0][0] for seen in arrivals), min(seen[-1][0] for seen in arrivals)
    inside = [[(when, count) for when, count in seen if begin <= when <= end] for seen in arrivals]
    return sum(seen[-1][1] - seen[0][1] for seen in inside) / (end - begin)


async def in_turns(services: Sequence[Service], streams: int, turns: int) -> list[list[float]]:
    """Rates of every service, measured in turns."""
    rates: list[list[float]] = [[] for _ in services]
    for service in services:
        await rate(service, streams)  # loads programs
    for _ in range(turns):
        for seen, service in zip(rates, services, strict=True):
            seen.append(await rate(service, streams))
    return rates


def ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """Median over the turns of one over the other."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


async def against_one_process(arguments: argparse.Namespace, directory: Path, stages: int) -> dict[str, Any]:
    """A fleet of P workers against the same mesh in one process."""
    names = [f"instance-{number}" for number in range(stages)]
    flags = ("--model", arguments.model, "--mesh", f"1x{stages}x1", "--instance-memory-bytes", str(1 << 34))
    mesh, memory = flags[:4], flags[4:]
    device = ("--devices-per-instance", "1")
    fleet = LocalFleet(directory / f"fleet-{stages}", names, (*mesh, "--no-kv-backup"), (*memory, *device))
    embedded = EmbeddedService(directory / f"embedded-{stages}", (*flags, *device, "--instances", str(stages)), names)
    async with running(fleet), running(embedded):
        across, inside = await in_turns((fleet, embedded), arguments.streams, arguments.repeats)
        single_across, single_inside = await in_turns((fleet, embedded), 1, arguments.repeats)
    hop = statistics.median((1 / a - 1 / b) / (stages + 1) for a, b in zip(single_across, single_inside, strict=True))
    return {
        "stages": stages,
        "fleet_tokens_per_second": statistics.median(across),
        "one_process_tokens_per_second": statistics.median(inside),
        "ratio": ratio(across, inside),
        "single_stream_fleet_ms": 1e3 / statistics.median(single_across),
        "single_stream_one_process_ms": 1e3 / statistics.median(single_inside),
        "hop_us": 1e6 * hop,
    }


async def backup(arguments: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Two workers with KV backup against two without."""
    names = [f"instance-{number}" for number in range(2)]
    flags = ("--model", arguments.model, "--mesh", "1x2x1")
    machine = ("--devices-per-instance", "1", "--instance-memory-bytes", str(1 << 34))
    fleets = [
        LocalFleet(directory / flag, names, (*flags, f"--{flag}"), machine) for flag in ("kv-backup", "no-kv-backup")
    ]
    async with running(fleets[0]), running(fleets[1]):
        kept, bare = await in_turns(fleets, arguments.streams, arguments.repeats)
    return {
        "with_backup_tokens_per_second": statistics.median(kept),
        "without_tokens_per_second": statistics.median(bare),
        "cost": 1 - ratio(kept, bare),
    }


async def commit_seconds(streams: int, directory: Path, steps: int = 200) -> float:
    """Seconds of the event loop that the commit of one step's tokens takes, one for each stream; the disk's not."""
    log = await asyncio.to_thread(DurableLog.open, directory, "step", "benchmark")
    sampling = SamplingParams(max_tokens=steps)
    states = [RequestState(f"request-{n}", 0, tuple(range(PROMPT)), sampling) for n in range(streams)]
    for key, state in enumerate(states):
        await log.accept(GenerationRequest(state.request_id, state.prompt, sampling), [state], key)
    batches = [[_with_tokens(state, step) for state in states] for step in range(1, steps)]
    seconds = 0.0
    for batch in batches:
        told, begin = asyncio.Event(), time.perf_counter()
        log.append(batch, told.set)
        seconds += time.perf_counter() - begin
        await told.wait()
    await log.close()
    return seconds / len(batches)


def _with_tokens(state: RequestState, count: int) -> RequestState:
    return RequestState(state.request_id, 0, state.prompt, state.sampling, tokens=tuple(range(count)))


def write_large_model(directory: Path, gigabytes: float) -> None:
    """A checkpoint of random float32 parameters of about that many gigabytes, with the tiny model's tokenizer."""
    width, mlp, vocab, head_size = 1024, 2816, 2048, 64
    layer = 4 * (4 * width * width + 3 * width * mlp)
    config = json.loads((SHIPPED["tiny"] / "config.json").read_text())
    config |= {
        "hidden_size": width, "intermediate_size": mlp, "vocab_size": vocab, "head_dim": head_size,
        "num_attention_heads": width // head_size, "num_key_value_heads": width // head_size,
        "num_hidden_layers": round(gigabytes * 1e9 / layer), "torch_dtype": "float32",
    }  # fmt: skip
    shapes = {"model.embed_tokens.weight": (vocab, width), "model.norm.weight": (width,)}
    for number in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{number}"
        for name in ("q", "k", "v", "o"):
            shapes[f"{prefix}.self_attn.{name}_proj.weight"] = (width, width)
        for name, shape in (("gate", (mlp, width)), ("up", (mlp, width)), ("down", (width, mlp))):
            shapes[f"{prefix}.mlp.{name}_proj.weight"] = shape
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}.{name}.weight"] = (width,)
    shutil.copytree(SHIPPED["tiny"], directory, ignore=shutil.ignore_patterns("*.safetensors"))
    (directory / "config.json").write_text(json.dumps(config))
    draw = np.random.default_rng(0)
    arrays = {name: draw.standard_normal(shape, np.float32) * np.float32(0.02) for name, shape in shapes.items()}
    save_file(arrays, directory / "model.safetensors")


def bare_copies(size: int) -> tuple[float, float]:
    """Bytes per second of a socket copy between two processes, into memory that was touched before and into fresh.

    Parameters of a new placement always go into fresh memory; what the system takes to give it is part of any copy.
    """
    mine, theirs = multiprocessing.get_context("spawn").Pipe()
    sender = multiprocessing.get_context("spawn").Process(target=_send, args=(theirs, size), daemon=True)
    sender.start()
    port, into = mine.recv(), memoryview(bytearray(size))
    raw_bulk(port, into)
    touched, fresh = raw_bulk(port, into), raw_bulk(port, np.zeros(size, np.uint8).data)
    sender.terminate()
    sender.join()
    return size / touched, size / fresh


def _send(pipe: Any, size: int) -> None:
    raw_serve(pipe.send, source(size))


async def migration(arguments: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """All parameters move from one worker to another, which has none, because the first is drained."""
    write_large_model(directory / "model", arguments.gigabytes)
    names = ["instance-0", "instance-1"]
    flags = ("--model", str(directory / "model"), "--mesh", "1x1x1", "--no-kv-backup", "--no-fuse", "--max-batch", "2",
             "--prefill-tokens", "16", "--max-model-len", "128")  # fmt: skip
    machine = ("--devices-per-instance", "1", "--instance-memory-bytes", str(1 << 34), "--parameter-store", "off")
    rates, touched, fresh, moved = list[float](), list[float](), list[float](), 0
    async with running(LocalFleet(directory / "migration", names, flags, machine)) as fleet:
        for _ in range(arguments.repeats):
            await fleet.until("both workers", lambda s: len(ready(s)) == 2 and s.ready, seconds=WAIT_SECONDS)
            (source_name,) = serving(await fleet.status())
            since = len(fleet.events)
            await fleet.client.drain(source_name)
            copied = [event for event in fleet.events[since:] if event.kind == "precopy"]
            moved = sum(int(event.fields["bytes_moved"]) for event in copied)
            rates.append(moved / sum(float(event.fields["seconds"]) for event in copied))
            for rate, into in zip(bare_copies(moved), (touched, fresh), strict=True):
                into.append(rate)
            await fleet.kill([source_name])
            await fleet.until_gone([source_name])
            await fleet.bring([source_name])
    return {
        "bytes": moved,
        "migration_bytes_per_second": statistics.median(rates),
        "bare_copy_bytes_per_second": statistics.median(touched),
        "into_fresh_memory": statistics.median(fresh),
        "ratio": ratio(rates, touched),
        "ratio_into_fresh_memory": ratio(rates, fresh),
    }


async def bench(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that was asked for."""
    results: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        directory = arguments.logs or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-fleet-")))
        if "stages" in arguments.parts:
            rows = [await against_one_process(arguments, directory, stages) for stages in arguments.stages]
            results["stages"] = rows
            step = arguments.streams / rows[0]["fleet_tokens_per_second"]
            seconds = await commit_seconds(arguments.streams, directory / "commits")
            results["commit"] = [{"commit_us": 1e6 * seconds, "step_ms": 1e3 * step, "part": seconds / step}]
        if "backup" in arguments.parts:
            results["backup"] = [await backup(arguments, directory)]
        if "migration" in arguments.parts:
            results["migration"] = [await migration(arguments, directory)]
    return results


def table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    """Results as a table."""
    shown = Table(title=title)
    for name in rows[0]:
        shown.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        shown.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    return shown


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("stages", "backup", "migration")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--streams", type=int, default=8, help="concurrent streams")
    parser.add_argument("--repeats", type=int, default=5, help="turns")
    parser.add_argument("--gigabytes", type=float, default=1.0, help="parameters that migrate")
    parser.add_argument("--logs", type=Path, help="directory to keep all logs in")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    results = asyncio.run(bench(arguments))
    for title, rows in results.items():
        console.print(table(f"{arguments.model}: {title}", rows))
    console.print(machine(0))
    if arguments.output:
        arguments.output.write_text(json.dumps({"machine": machine(0), **results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
