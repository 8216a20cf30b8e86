"""How long until a service that is gone generates on: ``python -m spotjax.tools.bench_restart``.

A controller and its workers on this machine, one replica of a stage each, all die with unfinished requests: every
instance has notice, so that KV comes into the checkpoint, then every process is killed. What was in memory is gone,
kept parameters included, and no file is in the system's cache (that takes root; otherwise it is said). Then, in turns,
from the start of the first process to the first token that clients had not seen:

* ``restart with KV``: commit log, converted parameters, saved KV
* ``restart``: the same without saved KV, which is computed again from prompts and tokens
* ``plain``: a server of the Hugging Face files (written here where the model is a GGUF file) has neither log nor
  checkpoint, is asked everything again, and generates again what was there; with compiled programs, as the others
* ``plain, compiling``: the same without

What that is made of is read off the log lines of the processes. Every token of every way is compared. Parameters are
also read in this process, in turns with their files: that is the ratio to the disk. ``--output FILE`` writes JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from spotjax.api.requests import Sampling
from spotjax.engine.generation import Delta
from spotjax.engine.log_inspection import inspect_log
from spotjax.local_workers import name_of
from spotjax.meshes.slices import whole
from spotjax.models.catalog import open_model
from spotjax.tools.bench_failover import machine
from spotjax.tools.bench_fleet import table
from spotjax.tools.cold_reads import against_disk, forget_files
from spotjax.tools.local_fleet import SHARED_MEMORY, ChildrenFleet
from spotjax.tools.service import POLL_SECONDS, NotInTime
from spotjax.tools.start_phases import Start, Way, compared, medians, what_happened
from spotjax.tools.tiny_directory import save_weights, settings

WAIT_SECONDS = 500.0
console = Console(width=None if sys.stdout.isatty() else 180)
WAYS = (
    Way("restart with KV", kv=True),
    Way("restart"),
    Way("plain", asks_again=True),
    Way("plain, compiling", asks_again=True, compiled=False),
)


class Client:
    """One request, and what it has seen over all services.

    Args:
      name: its id.
      prompt: token ids.
      sampling: parameters.

    Attributes:
      tokens: of the output, as far as anybody has seen.
      known: number of tokens that clients had when the service died.
      first: Unix time of the first token beyond those, in the current service; 0 before.
    """

    def __init__(self, name: str, prompt: Sequence[int], sampling: Sampling) -> None:
        self.name, self.prompt, self.sampling = name, prompt, sampling
        self.tokens: list[int] = []
        self.known, self.first = 0, 0.0

    async def follow(self, deltas: AsyncGenerator[Delta, None]) -> None:
        """Reads a stream.

        Raises:
          ValueError: it says anything else than others before.
        """
        async with contextlib.aclosing(deltas):
            async for delta in deltas:
                end = delta.offset + len(delta.tokens)
                if not self.first and end > self.known:
                    self.first = time.time()
                self.tokens[len(self.tokens) :] = delta.tokens[len(self.tokens) - delta.offset :]
                if tuple(self.tokens[delta.offset : end]) != tuple(delta.tokens):
                    raise ValueError(f"{self.name}: tokens from {delta.offset} on are not those of before")


class Bench:
    """The files and the clients of a service that dies and starts again.

    Args:
      arguments: of the command line.
      directory: for everything.
    """

    def __init__(self, arguments: argparse.Namespace, directory: Path) -> None:
        self._arguments, self._directory = arguments, directory
        self.plain, self.converted = directory / "huggingface", directory / "checkpoint"
        self._programs, self._log, self._starts = directory / "programs", directory / "commits", 0
        self._reading: list[asyncio.Task[None]] = []
        draw, new = random.Random(arguments.seed), 4 * arguments.tokens + 400
        self._positions = arguments.prompt + new
        sampling = Sampling(temperature=0.8, max_tokens=new, ignore_eos=True)
        self.clients = [
            Client(str(n), [draw.randrange(10, 200) for _ in range(arguments.prompt)], {**sampling, "seed": n})
            for n in range(arguments.requests)
        ]

    def write_models(self) -> None:
        """The same weights as a Hugging Face directory and converted."""
        from spotjax.checkpoint.convert import convert  # starts jax

        write_huggingface(self._arguments.model, self.plain)
        convert(open_model(str(self.plain)), str(self.converted))

    async def die(self) -> int:
        """Serves until every request has its tokens, gives all instances notice and ends. Returns bytes of saved KV."""
        async with self._running(Way("first", kv=True), self._log) as fleet:
            await self._until(fleet, lambda: all(len(c.tokens) >= self._arguments.tokens for c in self.clients))
            names = [name_of(number) for number in range(self._arguments.workers)]
            told = asyncio.gather(*(fleet.preempt(name, self._arguments.grace) for name in names))
            await self._until(fleet, lambda: any(event.kind == "stop" for event in fleet.events))
            for request in inspect_log(self._log).going_on:
                self.clients[int(request.request_id)].known = request.tokens[0]
            await self._until(fleet, lambda: all(len(client.tokens) == client.known for client in self.clients))
            saved = [event for event in fleet.events if event.kind == "saved" and "bytes" in event.fields]
            if not saved or not all(client.known for client in self.clients):
                raise NotInTime(f"no KV was saved, or a request had ended\n{fleet.story()}")
            told.cancel()
            await asyncio.gather(told, return_exceptions=True)
        return int(saved[-1].fields["bytes"])

    async def start(self, way: Way) -> Start:
        """One start from nothing."""
        log = self._directory / "log-of-a-start"
        shutil.rmtree(log, ignore_errors=True)
        if not way.asks_again:
            shutil.copytree(self._log, log)
        forget_files()
        begin = time.time()
        async with self._running(way, log) as fleet:
            await self._until(fleet, lambda: all(client.first for client in self.clients))
            return what_happened(begin, list(fleet.server.records()), [client.first for client in self.clients])

    @contextlib.asynccontextmanager
    async def _running(self, way: Way, log: Path) -> AsyncGenerator[ChildrenFleet, None]:
        """A service with all clients reading; its end is that of all its processes."""
        a, self._starts = self._arguments, self._starts + 1
        programs = self._programs if way.compiled else self._directory / f"programs-{self._starts}"
        memory = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
        store = Path(tempfile.mkdtemp(prefix="spotjax-restart-", dir=memory))
        flags = ["--model", str(self.plain if way.asks_again else self.converted), "--workers", str(a.workers)]
        flags += ["--mesh", f"1x{a.workers}x1", "--devices-per-instance", "1", "--instance-memory-bytes", str(1 << 34)]
        flags += ["--max-model-len", str(self._positions), "--max-batch", str(len(self.clients)), "--dtype", "float32"]
        flags += ["--compilation-cache", str(programs), "--parameter-store", str(store)]
        flags += ["--checkpoint", str(self.converted)] if way.kv else []
        fleet = ChildrenFleet(self._directory / f"start-{self._starts}", flags, [], commit_log=log)
        self._reading = []
        try:
            await fleet.start()
            for client in self.clients:
                client.first = 0.0
                if way.asks_again or not client.known:
                    deltas = fleet.client.generate(client.prompt, request_id=client.name, **client.sampling)
                else:
                    deltas = fleet.client.resume(client.name, [client.known])
                self._reading.append(asyncio.create_task(client.follow(deltas)))
            yield fleet
        finally:
            fleet.server.kill()  # before clients end, who would cancel their requests
            for task in self._reading:
                task.cancel()
            await asyncio.gather(*self._reading, return_exceptions=True)
            await fleet.close()
            shutil.rmtree(store)

    async def _until(self, fleet: ChildrenFleet, condition: Callable[[], bool]) -> None:
        """Waits for something that clients or the service say.

        Raises:
          NotInTime: it was not said, or a stream broke off.
        """
        deadline = time.monotonic() + WAIT_SECONDS
        while not condition():
            broken = [task.exception() for task in self._reading if task.done()]
            if broken or time.monotonic() > deadline:
                raise NotInTime(f"not within {WAIT_SECONDS:g} s, or a stream ended: {broken}\n{fleet.story()}")
            await asyncio.sleep(POLL_SECONDS / 10)


def write_huggingface(model: str, directory: Path) -> None:
    """A model's weights, at float16, as a Hugging Face directory."""
    opened = open_model(model)
    config, checkpoint, tokenizer = opened.checkpoint.spec.config, opened.checkpoint, opened.tokenizer
    directory.mkdir()
    arrays = {array.name: checkpoint.read(array.name, whole(array.shape)) for array in checkpoint.spec.parameters}
    save_weights(config, arrays, directory)
    files = {"config.json": json.dumps(settings(config, min(tokenizer.end_tokens, default=0))["config.json"]).encode()}
    for name, content in (files | tokenizer.files()).items():
        (directory / name).write_bytes(content)


async def restarts(arguments: argparse.Namespace, bench: Bench, results: dict[str, Any]) -> None:
    """All ways in turns."""
    with console.status("a service is served and dies"):
        saved = await bench.die()
    starts: dict[Way, list[Start]] = {way: [] for way in WAYS if way.name in arguments.ways}
    for _ in range(arguments.repeats):
        for way, seen in starts.items():
            with console.status(way.name):
                seen.append(await bench.start(way))
            console.log(
                f"{way.name}: {seen[-1].to_first:.1f} s to the first token, {seen[-1].to_last:.1f} s to the last"
            )
    known = [client.known for client in bench.clients]
    results["restarts"] = [medians(way, seen) for way, seen in starts.items()]
    results["ratios"] = compared(starts)
    results["requests"] = [
        {
            "requests": len(known),
            "prompt_tokens": arguments.prompt,
            "output_tokens": statistics.mean(known),
            "saved_kv_bytes": saved,
        }
    ]
    results["starts"] = {way.name: [asdict(start) for start in seen] for way, seen in starts.items()}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--workers", type=int, default=4, help="workers, each a stage of one device")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=200, help="tokens of every prompt")
    parser.add_argument("--tokens", type=int, default=150, help="output tokens of every request before notice is given")
    parser.add_argument("--grace", type=float, default=25.0, help="seconds of notice, in which decoding goes on")
    parser.add_argument("--ways", nargs="+", choices=[way.name for way in WAYS], default=[way.name for way in WAYS])
    parser.add_argument("--repeats", type=int, default=3, help="turns")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--directory", type=Path, help="new directory on the disk to measure, by default a temporary one"
    )
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    results: dict[str, Any] = {"machine": machine(arguments.seed) | {"caches_emptied": forget_files()}}
    with contextlib.ExitStack() as stack:
        if arguments.directory:
            arguments.directory.mkdir()
        directory = arguments.directory or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="restart-")))
        bench = Bench(arguments, directory)
        with console.status("writing the model"):
            bench.write_models()
        results["disk"] = against_disk((bench.converted, bench.plain), arguments.repeats)
        console.print(table("parameters read in one process", results["disk"]))
        asyncio.run(restarts(arguments, bench, results))
    for title in ("requests", "restarts", "ratios"):
        if results[title]:
            console.print(table(f"{arguments.model}: {title} (seconds)", results[title]))
    console.print(results["machine"])
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
