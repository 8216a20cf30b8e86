"""Measures what the prefix cache saves: time to the first token of prompts that begin alike, found and not found.

    python -m spotjax.tools.bench_prefix_cache
    python -m spotjax.tools.bench_prefix_cache --model smollm2-135m-instruct --prefix 1000 --repeats 7 --json out.json

One device, one request at a time, prompts of ``--prefix`` tokens that all begin alike and ``--own`` that do not.
``miss`` is the first request with a prefix that no other had, ``hit`` one with the same prefix after it, both in turns
on one server; ``off`` is a server without the cache, which shows what looking costs. The tokens of hits are compared
with those of the server without it. Times are from submitting to the first token on the stream, medians.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from spotjax import embedded
from spotjax.config import ServeConfig
from spotjax.embedded import EmbeddedServer
from spotjax.engine.generation import GenerationRequest
from spotjax.engine.request import SamplingParams
from spotjax.models.catalog import Model, open_model

NEW = 8
"""Tokens generated of every prompt."""
SAMPLING = SamplingParams(max_tokens=NEW, temperature=0.0, ignore_eos=True)
_names = map("bench-{}".format, itertools.count())


async def ask(server: EmbeddedServer, prompt: Sequence[int]) -> tuple[float, list[int]]:
    """Seconds to the first token, and the tokens."""
    name, tokens, first = next(_names), list[int](), 0.0
    started = time.perf_counter()
    await server.service.submit(GenerationRequest(name, tuple(prompt), SAMPLING))
    async for delta in server.service.stream(name):
        first = first or time.perf_counter() - started
        tokens += delta.tokens
    return first, tokens


async def start(model: Model, positions: int, *, prefix_cache: bool) -> EmbeddedServer:
    """A server of one device with room for all prefixes."""
    config = ServeConfig(
        model=model.name, instances=1, devices_per_instance=1, mesh="1x1x1", max_batch=4, max_model_len=positions,
        durability="none", fuse=False, prefix_cache=prefix_cache,
    )  # fmt: skip
    return await embedded.serve_model(config, model, embedded.local_instances(1, 1))


async def measure(model: Model, prefix: int, own: int, repeats: int) -> list[dict[str, Any]]:
    """Rows of the table; the first of ``repeats`` + 1 rounds, which loads what is compiled, does not count."""
    positions = prefix + own + NEW
    if positions > model.checkpoint.spec.config.max_positions:
        raise SystemExit(f"{model.name} takes {model.checkpoint.spec.config.max_positions} positions, not {positions}")
    cached = await start(model, positions, prefix_cache=True)
    plain = await start(model, positions, prefix_cache=False)
    draw, vocab = np.random.default_rng(0), model.checkpoint.spec.config.vocab
    seconds: dict[str, list[float]] = {"off": [], "miss": [], "hit": []}
    same = True
    try:
        for _ in range(repeats + 1):
            shared = draw.integers(1, vocab, prefix).tolist()
            prompts = [shared + draw.integers(1, vocab, own).tolist() for _ in range(2)]
            for kind, server, prompt in (("miss", cached, prompts[0]), ("off", plain, prompts[1])):
                seconds[kind].append((await ask(server, prompt))[0])
            took, tokens = await ask(cached, prompts[1])
            seconds["hit"].append(took)
            same = same and tokens == (await ask(plain, prompts[1]))[1]
        (load,) = cached.service.status().replicas
        reused = load.tokens_reused / (repeats + 1)
    finally:
        for server in (cached, plain):
            await server.close()
    medians = {kind: statistics.median(some[1:]) for kind, some in seconds.items()}
    return [
        {
            "kind": kind,
            "first_token_seconds": median,
            "least": min(seconds[kind][1:]),
            "most": max(seconds[kind][1:]),
            "of_miss": median / medians["miss"],
            "positions_found": reused if kind == "hit" else 0,
            "same_tokens": same,
        }
        for kind, median in medians.items()
    ]


def table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    """The rows for people."""
    shown = Table(title=title, title_justify="left")
    for heading in ("", "first token (ms)", "least", "most", "of miss", "positions found"):
        shown.add_column(heading, justify="right" if heading else "left")
    for row in rows:
        times = (f"{1e3 * row[name]:.1f}" for name in ("first_token_seconds", "least", "most"))
        shown.add_row(row["kind"], *times, f"{row['of_miss']:.3f}", f"{row['positions_found']:.0f}")
    return shown


def main() -> None:
    """Entry point of ``python -m spotjax.tools.bench_prefix_cache``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="see docs/models.md")
    parser.add_argument("--prefix", type=int, default=1000, help="tokens that prompts have in common")
    parser.add_argument("--own", type=int, default=16, help="tokens of each prompt after them")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the rows there, too")
    arguments = parser.parse_args()
    model = open_model(arguments.model)
    rows = asyncio.run(measure(model, arguments.prefix, arguments.own, arguments.repeats))
    Console().print(table(f"{model.name}: {arguments.prefix} tokens in common, {arguments.own} of its own", rows))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=2))
    if not rows[0]["same_tokens"]:
        raise SystemExit("hits gave other tokens than a server without the cache")


if __name__ == "__main__":
    main()
