"""What HTTP costs beside gRPC, for each token that is streamed: ``python -m spotjax.tools.bench_http``.

* CPU time of the server process per token, and per request with one token, with a service that only says letters, at a
  pace at which each token is a message: over HTTP, over gRPC, and read inside the process, which is taken off both
* tokens/s of the shipped model over both, with clients that only count
* memory with 500 streams that wait and 200 that go on

What is compared runs in turns within one run; figures are medians over the turns, ratios medians of the turns' ratios.
``--json FILE`` writes them as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
import msgspec
import psutil
from rich.console import Console
from rich.table import Table

from spotjax.api.http.app import application
from spotjax.api.http.server import HttpServer
from spotjax.api.proto.spotjax.v1 import generation_pb2 as pb
from spotjax.api.proto.spotjax.v1 import generation_pb2_grpc as pb_grpc
from spotjax.api.server import ApiServer
from spotjax.api.validation import ServedModel
from spotjax.engine.generation import GenerationRequest
from spotjax.engine.request import SamplingParams
from spotjax.testing.scripted_generation import ScriptedRequest
from spotjax.testing.scripted_service import ByteTokenizer, ScriptedService
from spotjax.tools.processes import free_port
from spotjax.tools.service import Service, running
from spotjax.transport import loop

TOKENS_PER_SECOND, MESSAGES_PER_SECOND = 200, 4000
"""Of one stream, and of all together, at most: few enough that no two tokens share a message."""
IDLE, ACTIVE = 500, 200
WAITING = "wait"
"""A prompt that gets no token."""

console = Console(width=None if sys.stdout.isatty() else 120)
Read = Callable[[str, str, int], Awaitable[int]]


class PacedService(ScriptedService):
    """Commits one token of every request at each tick; prompts that say so get none."""

    def __init__(self) -> None:
        self.pace = 0.01
        self._tick = asyncio.Event()
        super().__init__(delay=lambda: self._tick.wait())
        self._ticking = asyncio.create_task(self._go_on())

    async def _go_on(self) -> None:
        while True:
            await asyncio.sleep(self.pace)
            self._tick.set()
            self._tick = asyncio.Event()

    async def _run(self, state: ScriptedRequest) -> None:
        if bytes(token for token in state.request.prompt if token < 256) != WAITING.encode():
            await super()._run(state)


async def serve(pipe: Connection) -> None:
    """The server process: answers what it is told through the pipe."""
    service, model = PacedService(), ServedModel("scripted", ByteTokenizer(), max_model_len=1 << 20)
    server = ApiServer()
    address = f"127.0.0.1:{await server.start('127.0.0.1:0')}"
    await server.attach(service, model)
    http = HttpServer(application(server.backend))
    pipe.send((address, f"127.0.0.1:{await http.start('127.0.0.1:0')}"))
    while (told := await asyncio.to_thread(pipe.recv)) is not None:
        service.pace, inside, tokens = told

        async def read(number: int, tokens: int = tokens) -> None:
            name = f"{time.monotonic_ns()}-{number}"
            await service.submit(GenerationRequest(name, (256, ord("x")), SamplingParams(max_tokens=tokens)))
            async for _ in service.stream(name):
                pass

        await asyncio.gather(*map(read, range(inside)))
        service.requests = {name: state for name, state in service.requests.items() if not state.finished}
        pipe.send("done")
    await http.stop()
    await server.stop()


def run_server(pipe: Connection) -> None:
    """In a process of its own."""
    loop.run(serve(pipe))


async def read_http(address: str, prompt: str, tokens: int) -> int:
    """Asks and counts events, with next to no work of its own."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    body = msgspec.json.encode({"prompt": prompt, "max_tokens": tokens, "stream": True, "ignore_eos": True})
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {address}\r\ncontent-type: application/json\r\n"
    writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
    count, end = 0, b""
    try:
        while b"[DONE]" not in end:
            piece = await reader.read(1 << 16)
            assert piece, "the server went away"
            end = end[-6:] + piece
            count += piece.count(b'"index"')
    finally:
        writer.close()
    return count


class GrpcReader:
    """The same over gRPC, on one channel."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.aio.insecure_channel(address)
        self._stub: Any = pb_grpc.GenerationStub(self._channel)

    async def __call__(self, address: str, prompt: str, tokens: int) -> int:
        """Asks and counts messages."""
        sampling = pb.Sampling(max_tokens=tokens, ignore_eos=True)
        call, count = self._stub.Generate(pb.GenerateRequest(text=prompt, sampling=sampling)), 0
        async for _ in call:
            count += 1
        return count

    async def close(self) -> None:
        """Ends the connection."""
        await self._channel.close()


def cpu_seconds(pid: int) -> float:
    """CPU time of all threads of a process, to the nanosecond as Linux keeps it."""
    return sum(int((task / "schedstat").read_text().split()[0]) for task in Path(f"/proc/{pid}/task").iterdir()) / 1e9


class Scripted:
    """The service that says letters, in a process of its own."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=run_server, args=(theirs,), daemon=True)
        self.process.start()
        self.grpc, self.http = self._pipe.recv()

    async def tell(self, pace: float, inside: int = 0, tokens: int = 0) -> None:
        """Sets the pace; reads streams inside the server."""
        self._pipe.send((pace, inside, tokens))
        await asyncio.to_thread(self._pipe.recv)

    async def cost(self, read: Read | None, address: str, streams: int, tokens: int) -> tuple[float, float]:
        """CPU microseconds of the server, and messages per token."""
        await self.tell(1 / rate_of(streams))
        pid = self.process.pid
        assert pid is not None, "it runs"
        before = cpu_seconds(pid)
        if read is None:
            await self.tell(1 / rate_of(streams), streams, tokens)
            counts = [tokens] * streams
        else:
            counts = await asyncio.gather(*(read(address, "x", tokens) for _ in range(streams)))
        return 1e6 * (cpu_seconds(pid) - before), sum(counts) / (streams * tokens)

    def close(self) -> None:
        """Ends the process."""
        self._pipe.send(None)
        self.process.join()


def rate_of(streams: int) -> float:
    """Tokens/s of each of so many streams."""
    return min(TOKENS_PER_SECOND, MESSAGES_PER_SECOND / streams)


async def per_token(scripted: Scripted, streams: int, seconds: float, turns: int) -> dict[str, Any]:
    """Costs of both, above those of the service itself; a token's by the difference of long and short outputs."""
    over_grpc, tokens = GrpcReader(scripted.grpc), max(2, round(seconds * rate_of(streams)))
    kinds: dict[str, tuple[Read | None, str]] = {
        "inside": (None, ""), "http": (read_http, scripted.http), "grpc": (over_grpc, scripted.grpc),
    }  # fmt: skip
    token: dict[str, list[float]] = {name: [] for name in kinds}
    request: dict[str, list[float]] = {name: [] for name in kinds}
    messages: dict[str, list[float]] = {name: [] for name in kinds}
    for turn in range(turns + 1):
        for name, (read, address) in kinds.items():
            short, _ = await scripted.cost(read, address, streams, 1)
            if turn:  # the first one warms up
                long, count = await scripted.cost(read, address, streams, tokens)
                token[name].append((long - short) / (streams * (tokens - 1)))
                request[name].append(short / streams)
                messages[name].append(count)
    await over_grpc.close()

    def above(costs: Mapping[str, Sequence[float]], name: str) -> list[float]:
        return [cost - base for cost, base in zip(costs[name], costs["inside"], strict=True)]

    return {
        "streams": streams,
        "service_us": statistics.median(token["inside"]),
        "http_us": statistics.median(above(token, "http")),
        "grpc_us": statistics.median(above(token, "grpc")),
        "http_over_grpc": statistics.median(
            a / b for a, b in zip(above(token, "http"), above(token, "grpc"), strict=True)
        ),
        "http_request_us": statistics.median(above(request, "http")),
        "grpc_request_us": statistics.median(above(request, "grpc")),
        "http_messages_per_token": statistics.median(messages["http"]),
        "grpc_messages_per_token": statistics.median(messages["grpc"]),
    }


async def with_model(service: Service, streams: int, tokens: int, turns: int) -> dict[str, Any]:
    """Tokens/s of a model over both."""
    over_grpc = GrpcReader(service.address)
    rates: dict[str, list[float]] = {"http": [], "grpc": []}
    ways: dict[str, tuple[Read, str]] = {"http": (read_http, service.http), "grpc": (over_grpc, service.address)}
    for turn in range(turns + 1):
        for name, (read, address) in ways.items():
            begun = time.perf_counter()
            await asyncio.gather(*(read(address, f"x{number}", tokens) for number in range(streams)))
            if turn:
                rates[name].append(streams * tokens / (time.perf_counter() - begun))
    await over_grpc.close()
    return {
        "streams": streams,
        "http_tokens_per_second": statistics.median(rates["http"]),
        "grpc_tokens_per_second": statistics.median(rates["grpc"]),
        "http_over_grpc": statistics.median(a / b for a, b in zip(rates["http"], rates["grpc"], strict=True)),
    }


async def many(scripted: Scripted, tokens: int) -> dict[str, Any]:
    """Memory of the server with streams that wait and others that go on; all of these end."""
    process = psutil.Process(scripted.process.pid)
    await scripted.tell(1 / rate_of(ACTIVE))
    await asyncio.gather(*(read_http(scripted.http, "x", 4) for _ in range(ACTIVE)))  # what is loaded once
    before = process.memory_info().rss
    idle = [asyncio.create_task(read_http(scripted.http, WAITING, tokens)) for _ in range(IDLE)]
    counts = await asyncio.gather(*(read_http(scripted.http, "x", tokens) for _ in range(ACTIVE)))
    with_all = process.memory_info().rss
    for task in idle:
        task.cancel()
    await asyncio.gather(*idle, return_exceptions=True)
    await asyncio.gather(*(read_http(scripted.http, "x", 4) for _ in range(ACTIVE)))
    return {
        "idle": IDLE,
        "active": ACTIVE,
        "messages_per_token": sum(counts) / (ACTIVE * tokens),
        "kib_per_stream": (with_all - before) / (IDLE + ACTIVE) / 1024,
        "kib_per_stream_left": (process.memory_info().rss - before) / (IDLE + ACTIVE) / 1024,
    }


async def bench(arguments: argparse.Namespace) -> dict[str, Any]:
    """All of it."""
    results: dict[str, Any] = {"cores": os.cpu_count(), "load": os.getloadavg()[0]}
    scripted = Scripted()
    try:
        results["per_token"] = [
            await per_token(scripted, streams, arguments.seconds, arguments.turns) for streams in arguments.streams
        ]
        results["many"] = await many(scripted, max(1, round(arguments.seconds * rate_of(ACTIVE))))
    finally:
        scripted.close()
    if arguments.model:
        with tempfile.TemporaryDirectory(prefix="spotjax-bench-http-") as directory:
            http = f"127.0.0.1:{free_port('127.0.0.1')}"
            flags = ("--model", arguments.model, "--instances", "1", "--devices-per-instance", "1", "--mesh", "1x1x1")
            async with running(Service(Path(directory), flags, ["instance-0"], http=http)) as service:
                results["model"] = [
                    await with_model(service, streams, arguments.tokens, arguments.turns)
                    for streams in arguments.streams
                ]
    return results


def show(results: dict[str, Any]) -> None:
    """As tables."""
    costs = Table(
        "streams", "HTTP, us per token", "gRPC", "ratio", "HTTP, us per request", "gRPC", title="CPU time of the server"
    )
    for row in results["per_token"]:
        costs.add_row(
            str(row["streams"]), f"{row['http_us']:.1f}", f"{row['grpc_us']:.1f}", f"{row['http_over_grpc']:.2f}",
            f"{row['http_request_us']:.0f}", f"{row['grpc_request_us']:.0f}",
        )  # fmt: skip
    console.print(costs)
    told = results["many"]
    console.print(f"{told['idle']} idle and {told['active']} active streams: {told['kib_per_stream']:.1f} KiB each")
    if "model" in results:
        rates = Table("streams", "HTTP, tokens/s", "gRPC, tokens/s", "ratio", title="With a model")
        for row in results["model"]:
            http, over_grpc = row["http_tokens_per_second"], row["grpc_tokens_per_second"]
            rates.add_row(str(row["streams"]), f"{http:.0f}", f"{over_grpc:.0f}", f"{row['http_over_grpc']:.2f}")
        console.print(rates)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 200], help="at once (default: 1 and 200)")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement without a model")
    parser.add_argument("--tokens", type=int, default=64, help="of each stream with a model")
    parser.add_argument("--turns", type=int, default=5, help="how often everything is measured")
    parser.add_argument("--model", default="tiny", help="as for spotjax serve; empty: none")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    arguments = parser.parse_args(argv)
    results = asyncio.run(bench(arguments))
    show(results)
    if arguments.json:
        arguments.json.write_bytes(msgspec.json.format(msgspec.json.encode(results)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
