"""Times ways to move bytes between two processes, and Spotjax's own endpoint beside them.

    python -m spotjax.tools.bench_transport --json transport.json

Small: 7.5 kB there and back, as a decode step sends them. Bulk: one large block into memory that the receiver has
allocated and touched before, as a migration reads it. Every round times all candidates in turn, and ratios are taken
within a round, so that other work on the machine disturbs them less. The sender is a process of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import platform
import statistics
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection as Pipe
from multiprocessing.process import BaseProcess
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from spotjax.tools.transport_candidates import (
    LOOPS,
    SMALL,
    buffered_bulk,
    buffered_serve,
    buffered_small,
    grpc_serve,
    grpc_small,
    now,
    raw_bulk,
    raw_serve,
    raw_small,
    run,
    source,
    streams_bulk,
    streams_serve,
    streams_small,
    zmq_bulk,
    zmq_serve,
    zmq_small,
)  # fmt: skip
from spotjax.transport.connection import Connection
from spotjax.transport.endpoint import Endpoint
from spotjax.transport.loop import loop_factory
from spotjax.transport.memory import aligned

# -- Spotjax's endpoint


class Step(msgspec.Struct, tag=True, frozen=True):
    """A header such as steps have."""

    pipeline: str = "epoch-3.replica-1"
    step: int = 0
    stage: int = 1


async def endpoint_serve(ready: Callable[[int], None], data: memoryview) -> None:
    """Serves until the process ends."""

    def echo(connection: Connection, header: Step, payload: memoryview) -> None:
        connection.send(header, payload)

    endpoint = Endpoint(Step, echo, provide=lambda what: [data[: int(what)]])
    ready(await endpoint.listen("127.0.0.1:0"))
    await asyncio.get_running_loop().create_future()


async def endpoint_small(port: int, rounds: int, into: memoryview | None = None) -> list[float]:
    """Seconds of each round trip; while ``into`` is being filled, if given."""
    back: asyncio.Queue[memoryview] = asyncio.Queue()
    endpoint = Endpoint(Step, lambda connection, header, payload: back.put_nowait(payload))
    address, block, seconds = f"127.0.0.1:{port}", bytes(SMALL), []
    connection = await endpoint.connect(address, 5)
    loop = asyncio.get_running_loop()
    read = loop.create_task(repeated_fetch(endpoint, address, into)) if into is not None else None
    for _ in range(rounds):
        start = now()
        connection.send(Step(), block)
        await back.get()
        seconds.append(now() - start)
    if read is not None:
        read.cancel()
        await asyncio.wait({read})
    await endpoint.close()
    return seconds


async def repeated_fetch(endpoint: Endpoint, address: str, into: memoryview) -> None:
    """Keeps one bulk read going until it is cancelled."""
    while True:
        await endpoint.fetch(address, str(len(into)).encode(), into, timeout=10)


async def endpoint_bulk(port: int, into: memoryview) -> float:
    """Seconds to fill ``into``."""

    def unexpected(connection: Connection, header: Step, payload: memoryview) -> None:
        raise AssertionError("nobody sends frames here")

    endpoint = Endpoint(Step, unexpected)
    start = now()
    await endpoint.fetch(f"127.0.0.1:{port}", str(len(into)).encode(), into, timeout=10)
    seconds = now() - start
    await endpoint.close()
    return seconds


# -- the measurement

Small = Callable[[int, int], list[float]]
Bulk = Callable[[int, memoryview], float]


def serve(name: str, size: int, pipe: Pipe) -> None:
    """The other process."""
    data = source(size)
    loop = "uvloop" if name.endswith("uvloop") or name == "endpoint" else "asyncio"
    match name.split(",")[0]:
        case "sockets":
            raw_serve(pipe.send, data)
        case "BufferedProtocol":
            run(loop, buffered_serve(pipe.send, data))
        case "streams":
            run(loop, streams_serve(pipe.send, data))
        case "pyzmq":
            zmq_serve(pipe.send, data)
        case "gRPC":
            run(loop, grpc_serve(pipe.send, data))
        case "endpoint":
            run(loop, endpoint_serve(pipe.send, data))


def candidates() -> dict[str, tuple[Small, Bulk | None]]:
    """How each is timed."""
    found: dict[str, tuple[Small, Bulk | None]] = {"sockets": (raw_small, raw_bulk)}

    def add(name: str, loop: str, small: Any, bulk: Any) -> None:
        timed_bulk = (lambda port, into: run(loop, bulk(port, into))) if bulk else None
        found[name] = (lambda port, rounds: run(loop, small(port, rounds)), timed_bulk)

    loops = [loop for loop, factory in LOOPS.items() if loop == "asyncio" or factory is not None]
    for loop in loops:
        add(f"BufferedProtocol, {loop}", loop, buffered_small, buffered_bulk)
    for loop in loops:
        add(f"streams, {loop}", loop, streams_small, streams_bulk)
    if importlib.util.find_spec("zmq"):
        found["pyzmq"] = (zmq_small, zmq_bulk)
    add("gRPC", "asyncio", grpc_small, None)
    add("endpoint", loops[-1], endpoint_small, endpoint_bulk)
    return found


def started(name: str, size: int) -> tuple[BaseProcess, int]:
    """The other process and its port."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(name, size, theirs), daemon=True)
    process.start()
    return process, ours.recv()


@contextlib.contextmanager
def apart(pid: int) -> Iterator[None]:
    """Two cores for two processes, as on two machines: on one core they would take turns without waking each other."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    if len(cores) < 2:
        yield
        return
    os.sched_setaffinity(0, {min(cores)})
    os.sched_setaffinity(pid, {max(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
        os.sched_setaffinity(pid, cores)


def measured(sizes: Sequence[int], rounds: int, repeats: int, wanted: Sequence[str]) -> dict[str, Any]:
    """Microseconds and GiB/s of every candidate, and their ratios to plain sockets."""
    timed = {name: how for name, how in candidates().items() if not wanted or name in wanted or name == "sockets"}
    peers = {name: started(name, max(sizes)) for name in timed}
    final = aligned(max(sizes))
    final[:] = bytes(len(final))
    small: dict[str, list[float]] = {name: [] for name in timed}
    bulk: dict[str, dict[int, list[float]]] = {name: {size: [] for size in sizes} for name in timed}
    disturbed: list[float] = []
    try:
        for _ in range(repeats):
            for name, (ping, read) in timed.items():
                process, port = peers[name]
                with apart(process.pid or 0):
                    small[name] += ping(port, rounds)[rounds // 10 :]
                for size in sizes if read else ():
                    assert read is not None
                    bulk[name][size].append(size / 2**30 / read(port, final[:size]))
        if "endpoint" in timed:
            loop = "uvloop" if loop_factory else "asyncio"
            disturbed = run(loop, endpoint_small(peers["endpoint"][1], rounds, final))
    finally:
        for process, _ in peers.values():
            process.terminate()
            process.join()
    rows = {name: small_row(seconds, small["sockets"]) for name, seconds in small.items()}
    if disturbed:
        rows["endpoint, during a bulk read"] = small_row(disturbed, small["sockets"])
    for name, speeds in bulk.items():
        for size, values in speeds.items():
            if values:
                ratios = [value / raw for value, raw in zip(values, bulk["sockets"][size], strict=True)]
                rows[name][f"bulk_{size}"] = {
                    "median_gib_per_s": statistics.median(values),
                    "best_gib_per_s": max(values),
                    "median_ratio": statistics.median(ratios),
                    "ratio_of_best": max(values) / max(bulk["sockets"][size]),
                }
    return rows


def small_row(seconds: list[float], reference: list[float]) -> dict[str, Any]:
    """Median and 99th percentile in microseconds, and the median's ratio to plain sockets."""
    ordered = sorted(seconds)
    return {
        "median_us": 1e6 * statistics.median(ordered),
        "p99_us": 1e6 * ordered[int(0.99 * len(ordered))],
        "ratio": statistics.median(ordered) / statistics.median(reference),
    }


def show(report: dict[str, Any]) -> None:
    """Prints the report as a table."""
    console = Console(width=140)
    machine, sizes = report["machine"], report["sizes"]
    title = f"{SMALL} bytes there and back; bulk into touched memory, median of {report['repeats']} (ratio to sockets)"
    table = Table(title=title)
    for heading in ("candidate", "median us", "p99 us", "ratio", *(f"{size / 1e6:.0f} MB, GiB/s" for size in sizes)):
        table.add_column(heading, justify="left" if heading == "candidate" else "right")
    for name, row in report["candidates"].items():
        cells = [f"{row['median_us']:.0f}", f"{row['p99_us']:.0f}", f"{row['ratio']:.2f}x"]
        for size in sizes:
            speed = row.get(f"bulk_{size}")
            cells.append(f"{speed['median_gib_per_s']:.2f} ({speed['median_ratio']:.2f}x)" if speed else "")
        table.add_row(name, *cells)
    console.print(table)
    console.print(", ".join(f"{key} {value}" for key, value in machine.items()))


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256_000_000, 1_000_000_000], metavar="BYTES")
    parser.add_argument("--rounds", type=int, default=2000, metavar="COUNT", help="round trips of small messages")
    parser.add_argument("--repeats", type=int, default=3, metavar="COUNT", help="rounds over all candidates")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="candidates to time beside sockets")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to FILE")
    arguments = parser.parse_args()
    packages = [name for name in ("uvloop", "pyzmq", "grpcio", "xxhash") if installed(name)]
    report = {
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "cores": os.cpu_count(),
            "load": round(os.getloadavg()[0], 2),
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages},
        },
        "sizes": arguments.sizes,
        "repeats": arguments.repeats,
        "candidates": measured(arguments.sizes, arguments.rounds, arguments.repeats, arguments.only),
    }
    show(report)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(report, file, indent=1)


def installed(package: str) -> bool:
    """Whether a distribution is there."""
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    main()
