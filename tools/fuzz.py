"""Sends what nobody should send to all that reads from outside: ``python -m spotjax.tools.fuzz --inputs 100000``.

Frames and bulk reads of the data plane, messages of the control stream, requests in protobuf, files of API keys, HTTP,
and garbage on all ports, with TLS and without. A bug is an error that is not a refusal, an answer of 500 or more, or
memory that grows. Input 7 of a part is always the same for a seed: ``--part http --only 7`` tries it alone.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

from spotjax.tools.fuzz_inputs import one
from spotjax.tools.fuzz_servers import Servers, require_well, serving, try_http, try_large, try_port

SHARES = {"frames": 30, "bulk": 10, "control": 20, "requests": 15, "keys": 5, "http": 15, "ports": 5}
"""Of a hundred inputs."""
AT_ONCE = 16
"""Connections."""
WARM = 0.1
"""Of a part's inputs, before its memory is looked at: caches are full then."""
GROWTH_BYTES = 48 << 20
"""That memory may have grown by, of all parts together: the allocator's fragments, and records of requests."""
Try = Callable[[Random], Awaitable[bool]]


@dataclass(frozen=True)
class Outcome:
    """Of one part.

    Attributes:
      part: its name.
      inputs: tried.
      taken: of these, for valid.
      seconds: that it took.
      before, after: bytes of memory once it was warm, and at its end.
      bugs: what went wrong, with the inputs' numbers.
    """

    part: str
    inputs: int
    taken: int
    seconds: float
    before: int
    after: int
    bugs: tuple[str, ...]


def resident() -> int:
    """Bytes of memory of this process."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def tried(part: str, numbers: Sequence[int], seed: int, attempt: Try) -> Outcome:
    """Tries the inputs of a part, several at once."""
    bugs: list[str] = []
    taken, started, before = 0, time.monotonic(), 0
    gate = asyncio.Semaphore(AT_ONCE)

    async def attempted(number: int) -> bool:
        async with gate:
            try:
                return await attempt(Random(f"{seed} {part} {number}"))
            except Exception as problem:
                bugs.append(f"{part} {number}: {type(problem).__name__}: {problem}")
                return False

    warm = max(1, int(len(numbers) * WARM))
    for begin in range(0, len(numbers), step := max(AT_ONCE, min(warm, 500))):
        taken += sum(await asyncio.gather(*map(attempted, numbers[begin : begin + step])))
        if not before and begin + step >= warm:
            before = resident()
    return Outcome(part, len(numbers), taken, time.monotonic() - started, before, resident(), tuple(bugs))


def attempt_of(part: str, servers: Servers) -> Try:
    """What tries an input of a part."""
    if part == "http":
        return partial(try_http, servers)
    return partial(try_port, servers) if part == "ports" else partial(one, part)


async def run(inputs: int, seed: int, parts: Sequence[str], only: int | None) -> list[Outcome]:
    """Tries all parts, each with its share of the inputs, or one input of each."""
    outcomes = []
    with tempfile.TemporaryDirectory() as directory:
        async with serving(Path(directory)) as servers:
            for part in parts:
                numbers = range(only, only + 1) if only is not None else range(max(1, inputs * SHARES[part] // 100))
                outcomes.append(await tried(part, numbers, seed, attempt_of(part, servers)))
                await require_well(servers)
            if "http" in parts and only is None:
                before = resident()
                for _ in range(4):
                    await try_large(servers)
                print(f"four bodies of 10 MB: memory {(resident() - before) / 2**20:+.1f} MiB", flush=True)
    return outcomes


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool; returns 1 if there is a bug."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000, help="of all parts together (default: 100000)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn (default: 0)")
    parser.add_argument(
        "--part", action="append", choices=list(SHARES), help="only this one; may be given several times"
    )
    parser.add_argument("--only", type=int, metavar="NUMBER", help="only this input")
    arguments = parser.parse_args(argv)
    logging.disable(logging.ERROR)  # every refusal is a line
    try:
        outcomes = asyncio.run(run(arguments.inputs, arguments.seed, arguments.part or list(SHARES), arguments.only))
    finally:
        logging.disable(logging.NOTSET)
    grown = 0
    for outcome in outcomes:
        grown += outcome.after - outcome.before
        print(
            f"{outcome.part:9} {outcome.inputs:7} inputs, {outcome.taken:6} taken for valid, {outcome.seconds:6.1f} s, "
            f"memory {outcome.before / 2**20:6.1f} to {outcome.after / 2**20:6.1f} MiB, {len(outcome.bugs)} bugs"
        )
        for bug in outcome.bugs[:5]:
            print(f"  {bug[:1000]}")
    bugs = sum(len(outcome.bugs) for outcome in outcomes)
    leaks = grown > GROWTH_BYTES
    print(
        f"{sum(o.inputs for o in outcomes)} inputs, {bugs} bugs, memory {grown / 2**20:+.1f} MiB while they were tried"
    )
    return 1 if bugs or leaks else 0


if __name__ == "__main__":
    sys.exit(main())
