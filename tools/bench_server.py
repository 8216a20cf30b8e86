"""What a server adds to its engine: gRPC, streams, commit log and controller over the loop of a replica alone.

``python -m spotjax.tools.bench_server`` decodes with the same stages in turns, batch 1 and 8: in the loop of a replica
in this process, which nobody listens to, and through the gRPC server of this process from a client in another. The time
of a decode step is that from the last sequence's first token to the end. With ``--width`` and ``--layers`` a Llama with
random weights takes the place of the shipped model. Client, server and device share the machine's processors. Prints a
table; ``--output FILE`` writes JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from spotjax import embedded
from spotjax.api.server import ApiServer
from spotjax.api.validation import ServedModel
from spotjax.async_client import AsyncSpotjaxClient
from spotjax.config import ServeConfig
from spotjax.models.catalog import Model
from spotjax.runtime.buckets import Buckets
from spotjax.runtime.pipeline import LocalPipeline
from spotjax.tools.bench_engine import report
from spotjax.tools.bench_look_ahead import PAGE_SIZE, generate, prompts
from spotjax.tools.random_model import small_model


def client(port: int, link: Connection) -> None:
    """The client's process: answers (batch, tokens) with seconds a decode step, until it is told nothing."""

    async def one(server: AsyncSpotjaxClient, prompt: tuple[int, ...], tokens: int, firsts: list[float]) -> None:
        first = True
        async for _ in server.generate(list(prompt), max_tokens=tokens, temperature=0, ignore_eos=True):
            if first:
                firsts.append(time.perf_counter())
            first = False

    async def serve() -> None:
        async with AsyncSpotjaxClient(f"127.0.0.1:{port}") as server:
            while (asked := await asyncio.to_thread(link.recv)) is not None:
                batch, tokens = asked
                firsts: list[float] = []
                await asyncio.gather(*(one(server, prompt, tokens, firsts) for prompt in prompts(batch)))
                link.send((time.perf_counter() - max(firsts)) / (tokens - 1))

    asyncio.run(serve())


async def measure(model: Model, batches: list[int], tokens: int, repeats: int, log: Path) -> list[dict[str, Any]]:
    """A row for every batch, medians."""
    config = ServeConfig(
        model=model.name, instances=1, devices_per_instance=1, mesh="1x1x1", max_batch=max(batches), max_model_len=512,
        prefill_tokens=128, page_size=PAGE_SIZE, commit_log=str(log),
    )  # fmt: skip
    started = await embedded.serve_model(config, model, embedded.local_instances(1, 1))
    stages, compiled = started.cluster.pipelines[0].stages, started.cluster.model
    buckets = Buckets(max(batches), 128, PAGE_SIZE, 512)
    api = ApiServer()
    port = await api.start("127.0.0.1:0")
    await api.attach(started.service, ServedModel(model.name, started.tokenizer, started.max_model_len))
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=client, args=(port, theirs), daemon=True)
    process.start()
    rows = []
    for batch in batches:
        seconds: dict[str, list[float]] = {"engine": [], "server": []}
        for number in range(-2, repeats):
            pipeline = LocalPipeline(compiled, buckets, stages, fuse=True)
            alone, _ = await generate(pipeline, buckets, batch, tokens)
            pipeline.close()
            ours.send((batch, tokens))
            served = await asyncio.to_thread(ours.recv)
            await asyncio.to_thread(compiled.executables.wait_for_background)
            if number >= 0:
                seconds["engine"].append(alone)
                seconds["server"].append(served)
        ratios = [b / a for a, b in zip(seconds["engine"], seconds["server"], strict=True)]
        medians = {f"{name}_ms": 1e3 * statistics.median(seen) for name, seen in seconds.items()}
        least = {f"least_{name}_ms": 1e3 * min(seen) for name, seen in seconds.items()}
        rows.append({"batch": batch, **medians, "overhead": statistics.median(ratios) - 1, **least})
    ours.send(None)
    await asyncio.to_thread(process.join)
    await api.stop(0)
    await started.close()
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, help="of a random Llama")
    parser.add_argument("--layers", type=int, default=12, help="of a random Llama")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        model = small_model(arguments.width, arguments.layers, directory)
        rows = asyncio.run(measure(model, arguments.batch, arguments.tokens, arguments.repeats, directory / "log"))
    parameters = sum(array.size for array in model.checkpoint.spec.parameters)
    report(f"{parameters / 1e6:.3g} million parameters, float32", rows, arguments.output)


if __name__ == "__main__":
    main()
