"""What it costs to have every token on disk before it is told, for each kind of durability and some batch sizes.

    python -m spotjax.tools.bench_durability --json durability.json

Sequences of random tokens are recorded step by step, each step when the one before was told, so the times are those
that are added to a token; requests end and begin all the time. For comparison a file is written and synced without a
log. Syncs are counted with strace, in runs of their own, where it is installed. Use --directory to choose the disk.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.table import Table

from spotjax.engine.commit_log import CommitLog, MemoryCommitLog
from spotjax.engine.durable_log import Durability, DurableLog
from spotjax.engine.generation import GenerationRequest
from spotjax.engine.request import RequestState, SamplingParams

MODES = (*get_args(Durability), "none")
PROMPT = 512
OUTPUT = 256
"""Tokens of each sequence; when it has them it is forgotten and another one begins."""


def open_log(mode: str, directory: Path) -> CommitLog:
    """A new log."""
    if mode == "none":
        return MemoryCommitLog()
    return DurableLog.open(directory, "step" if mode == "step" else "interval", "benchmark")


class Sequences:
    """A batch of sequences that grow by one token at each step; their beginnings are spread over time."""

    def __init__(self, batch: int, log: CommitLog, chance: random.Random) -> None:
        self._log, self._chance, self._names = log, chance, 0
        self.batch = batch
        self.states: list[RequestState] = []

    async def begin(self, longest: int = OUTPUT) -> None:
        """Accepts the first ones, at random places of their output."""
        self.states = [await self._accepted(self._chance.randrange(longest)) for _ in range(self.batch)]

    async def step(self) -> Sequence[RequestState]:
        """One token more for each."""
        for at, state in enumerate(self.states):
            if len(state.tokens) >= OUTPUT:
                self._log.forget(state.request_id)
                state = await self._accepted(0)
            self.states[at] = grown(state, [self._chance.randrange(50_000)])
        return self.states

    async def _accepted(self, length: int) -> RequestState:
        self._names += 1
        prompt = tuple(self._chance.randrange(50_000) for _ in range(PROMPT))
        sampling = SamplingParams(max_tokens=OUTPUT)
        state = RequestState(f"request-{self._names}", 0, prompt, sampling, frozenset({0}))
        await self._log.accept(GenerationRequest(state.request_id, prompt, sampling), [state], self._names)
        return grown(state, [self._chance.randrange(50_000) for _ in range(length)])


def grown(state: RequestState, tokens: Sequence[int]) -> RequestState:
    """A state with more tokens, of four characters each."""
    ends = tuple(len(state.text) + 4 * (n + 1) for n in range(len(tokens)))
    return replace(
        state,
        tokens=(*state.tokens, *tokens),
        text=state.text + "text" * len(tokens),
        text_ends=(*state.text_ends, *ends),
        decoded=len(state.tokens) + len(tokens),
    )


async def measure(mode: str, batch: int, steps: int, directory: Path, seed: int) -> dict[str, Any]:
    """Figures of one kind of durability and one batch size."""
    log = await asyncio.to_thread(open_log, mode, directory)
    sequences = Sequences(batch, log, random.Random(seed))
    await sequences.begin()
    waits, on_loop, processor = [], 0.0, 0.0
    started = time.perf_counter()
    for _ in range(steps):
        states, told = await sequences.step(), asyncio.Event()
        before, busy, all_busy = time.perf_counter(), time.thread_time(), time.process_time()
        log.append(states, told.set)
        await told.wait()
        waits.append(time.perf_counter() - before)
        on_loop += time.thread_time() - busy
        processor += time.process_time() - all_busy
    seconds = time.perf_counter() - started
    await log.close()
    return {
        "durability": mode,
        "batch": batch,
        "steps": steps,
        "seconds": seconds,
        "median_ms": 1e3 * statistics.median(waits),
        "p99_ms": 1e3 * sorted(waits)[int(0.99 * len(waits))],
        "worst_ms": 1e3 * max(waits),
        "loop_processor_us": 1e6 * on_loop / steps,
        "processor_us": 1e6 * processor / steps,
    }


def bytes_per_token(batch: int, directory: Path, seed: int) -> float:
    """How much larger a log gets by each output token, its share of the prompt included."""

    async def record() -> None:
        log = await asyncio.to_thread(open_log, "interval", directory)
        sequences = Sequences(batch, log, random.Random(seed))
        await sequences.begin(longest=1)
        for _ in range(OUTPUT):
            log.append(await sequences.step(), lambda: None)
            told = asyncio.Event()
            log.append([], told.set)
            await told.wait()
        await log.close()

    asyncio.run(open_log("interval", directory).close())
    empty = (directory / "commits.sqlite").stat().st_size
    asyncio.run(record())
    return ((directory / "commits.sqlite").stat().st_size - empty) / (batch * OUTPUT)


def syncs_per_step(mode: str, batch: int, steps: int, directory: Path) -> float | None:
    """Syncs for each step beyond those of opening and closing, None without strace."""
    if shutil.which("strace") is None:
        return None
    least, more = (count_syncs(mode, batch, count, directory / str(count)) for count in (1, steps + 1))
    return (more - least) / steps


def count_syncs(mode: str, batch: int, steps: int, directory: Path) -> int:
    """Syncs of a process that records so many steps."""
    directory.mkdir(parents=True)
    counts = directory / "strace"
    only = [sys.executable, "-m", "spotjax.tools.bench_durability", "--only", mode, str(batch), "--steps", str(steps)]
    command = ["strace", "-f", "-c", "-e", "trace=fsync,fdatasync", "-o", str(counts), *only]
    subprocess.run([*command, "--directory", str(directory)], check=True, stdout=subprocess.DEVNULL)
    lines = [line.split() for line in counts.read_text().splitlines()]  # share, seconds, microseconds, calls, name
    return sum(int(line[3]) for line in lines if line and line[-1] in ("fsync", "fdatasync"))


def bare_sync(directory: Path, steps: int) -> dict[str, float]:
    """Milliseconds to write 8 KiB over what a file has and sync it, on this disk without a log."""
    path, waits = directory / "bare", []
    path.write_bytes(bytes(4 << 20))
    file = os.open(path, os.O_RDWR)
    try:
        os.fsync(file)
        for step in range(steps):
            before = time.perf_counter()
            os.pwrite(file, os.urandom(8192), step * 8192 % (4 << 20))
            os.fdatasync(file)
            waits.append(time.perf_counter() - before)
    finally:
        os.close(file)
    return {"median_ms": 1e3 * statistics.median(waits), "p99_ms": 1e3 * sorted(waits)[int(0.99 * steps)]}


def report_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures, each from a log of its own."""
    rows = []
    with tempfile.TemporaryDirectory(dir=arguments.directory) as base:
        for mode in MODES:
            for batch in arguments.batch:
                place = Path(base) / f"{mode}-{batch}"
                row = asyncio.run(measure(mode, batch, arguments.steps, place / "timed", arguments.seed))
                traced = syncs_per_step(mode, batch, min(arguments.steps, 1000), place / "traced")
                row["syncs_per_second"] = None if traced is None else traced * arguments.steps / row["seconds"]
                row["syncs_per_step"] = traced
                durable = mode != "none"
                row["bytes_per_token"] = bytes_per_token(batch, place / "sized", arguments.seed) if durable else 0.0
                rows.append(row)
        bare = bare_sync(Path(base), min(arguments.steps, 1000))
    return {
        "machine": {"cores": os.cpu_count(), "load": os.getloadavg()[0], "system": platform.platform()},
        "versions": {"python": platform.python_version(), "sqlite": sqlite3.sqlite_version},
        "seed": arguments.seed,
        "write_and_sync_without_a_log": bare,
        "rows": rows,
    }


def show(report: dict[str, Any]) -> None:
    """Prints the report as a table."""
    console = Console(width=150)
    bare = report["write_and_sync_without_a_log"]
    title = f"from append to told; bare write and sync: median {bare['median_ms']:.2f} ms, p99 {bare['p99_ms']:.2f} ms"
    table = Table(title=title)
    headings = ("durability", "batch", "median ms", "p99 ms", "worst ms", "loop us/step", "processor us/step")
    for heading in (*headings, "syncs/step", "syncs/s", "bytes/token"):
        table.add_column(heading, justify="right")
    for row in report["rows"]:
        times = (f"{row[name]:.3f}" for name in ("median_ms", "p99_ms", "worst_ms"))
        processor = (f"{row[name]:.0f}" for name in ("loop_processor_us", "processor_us"))
        syncs = ("-" if row[n] is None else f"{row[n]:.2f}" for n in ("syncs_per_step", "syncs_per_second"))
        size = f"{row['bytes_per_token']:.0f}"
        table.add_row(row["durability"], str(row["batch"]), *times, *processor, *syncs, size)
    console.print(table)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64], metavar="COUNT")
    parser.add_argument("--steps", type=int, default=3000, metavar="COUNT")
    parser.add_argument("--seed", type=int, default=0, metavar="NUMBER")
    parser.add_argument("--directory", default=tempfile.gettempdir(), help="on the disk that is to be measured")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to FILE")
    parser.add_argument("--only", nargs=2, metavar=("DURABILITY", "BATCH"), help="run one case and print nothing")
    arguments = parser.parse_args()
    if arguments.only:
        mode, batch = arguments.only
        place = Path(arguments.directory) / "log"
        asyncio.run(measure(mode, int(batch), arguments.steps, place, arguments.seed))
        return
    report = report_of(arguments)
    show(report)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
