"""``spotjax bench``: measures a server that generates text, ours or any with OpenAI's interface."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from spotjax.commands.arguments import add_command, add_credential_flags
from spotjax.errors import ConfigError

if TYPE_CHECKING:
    from spotjax.bench.sweep import Point, Result, Told
    from spotjax.commands.arguments import Commands

EXAMPLES = """\
  spotjax bench                                     100 requests at once, to the server on this machine
  spotjax bench --arrivals poisson --rate 2 --requests 60 --prompt-tokens 128 --output-tokens 64 --ignore-eos
  spotjax bench --concurrency 1,4,16,64 --goodput ttft:500 tpot:50 --json sweep.json --plot sweep.png
  spotjax bench --api grpc --arrivals gamma --burstiness 0.25 --rate 1,2,4 --prompt-kind ids
  spotjax bench --server http://127.0.0.1:8000 --api chat --trace azure.csv --trace-window 0:600 --max-prompt 2048

lengths:
  COUNT                            all the same
  uniform:mean=M,ratio=R           whole numbers from M(1-R) to M(1+R), as vllm's random data set has them
  lognormal:mean=M,cv=X[,most=N]   of mean M and coefficient of variation X, cut to N
arrivals:
  all       at once; with --concurrency N this is a closed loop of N clients
  fixed     in equal steps
  poisson   as independent users come
  gamma     as vllm's --burstiness has them: below 1 in bursts, 1 is poisson, above 1 more even
  trace     as recorded in --trace FILE (CSV of Spotjax, Azure LLM inference, Mooncake, queries of SpotServe)
prompts:
  words     common words, about one token each; the default
  text      text of random tokens of --tokenizer, exactly as long as asked for where that is possible; needs --tokenizer
  ids       random token ids below --vocabulary, of --tokenizer, or as a server says over gRPC; not for chats
"""
DEFAULT_LENGTH = "128"


def add_commands(commands: Commands) -> None:
    """Adds the command."""
    parser = add_command(commands, "bench", run, "measure a server under load", EXAMPLES)
    add = parser.add_argument
    add("--api", choices=("completions", "chat", "grpc"), default="completions", help="OpenAI's completions or chats"
        " over HTTP, or Spotjax's gRPC (default: completions)")  # fmt: skip
    add("--server", metavar="ADDRESS", help="URL, or HOST:PORT for gRPC (default: where spotjax serve listens)")
    add("--model", metavar="NAME", help="to ask for (default: the first that the server lists)")
    add_credential_flags(parser)
    add("--timeout", type=float, default=600.0, metavar="SECONDS", help="a request without a complete answer after this"
        " time has failed (default: 600)")  # fmt: skip
    load = parser.add_argument_group("load").add_argument
    load("--requests", type=int, metavar="COUNT", help="how many (default: 100; with --trace: all of it)")
    load("--arrivals", choices=("all", "fixed", "poisson", "gamma", "trace"), help="how they come, see below (default:"
         " all, poisson with --rate, trace with --trace)")  # fmt: skip
    load("--rate", type=numbers, metavar="R[,R...]", help="requests per second; several are a sweep; stretches a trace")
    load("--burstiness", type=float, metavar="B", help="of gamma")
    load("--concurrency", type=whole_numbers, metavar="N[,N...]", help="most requests in flight; several are a sweep")
    load("--warm-up", type=int, default=2, metavar="COUNT", help="requests before each run that do not count (default:"
         " 2)")  # fmt: skip
    load("--seed", type=int, default=0, metavar="NUMBER", help="of arrivals, lengths and prompts (default: 0)")
    asked = parser.add_argument_group("what is asked for").add_argument
    asked("--prompt-tokens", metavar="LENGTHS", help="see below (default: 128, or those of --trace)")
    asked("--output-tokens", metavar="LENGTHS", help="the same, for most new tokens")
    asked("--prompt-kind", choices=("words", "text", "ids"), help="see below")
    asked("--tokenizer", type=Path, metavar="PATH", help="tokenizer.json, or a directory that has one")
    asked("--vocabulary", type=int, metavar="COUNT", help="draw token ids below this number")
    asked("--prompts", type=Path, metavar="FILE", help="prompts, one a line; or .jsonl of prompt and output_tokens")
    asked(
        "--shared-prefix", type=int, default=0, metavar="TOKENS", help="begin all prompts of a run alike (default: 0)"
    )
    asked("--trace", type=Path, metavar="FILE", help="recorded arrivals and lengths")
    asked("--trace-window", metavar="START:STOP", help="seconds of the trace to take")
    asked("--max-prompt", type=int, metavar="TOKENS", help="cut longer prompts of the trace")
    asked("--max-output", type=int, metavar="TOKENS", help="cut longer outputs of the trace")
    asked("--temperature", type=float, default=0.0, metavar="T", help="0 always takes the likeliest token (default: 0)")
    asked("--ignore-eos", action="store_true", help="do not end at the model's end tokens; not part of OpenAI's"
          " interface, so some servers refuse it")  # fmt: skip
    asked("--extra-body", metavar="JSON", help="object of more fields for every HTTP request")
    shown = parser.add_argument_group("results").add_argument
    shown(
        "--goodput", nargs="+", default=[], metavar="METRIC:MS", help="count requests within limits: ttft, tpot, e2el"
    )
    shown("--percentiles", type=numbers, default=(50.0, 90.0, 99.0), metavar="P[,P...]", help="(default: 50,90,99)")
    shown("--json", type=Path, metavar="FILE", help="write all figures, settings, machine and versions")
    shown("--json-requests", action="store_true", help="write the times of every request, too")
    shown("--plot", type=Path, metavar="FILE", help="draw the distributions, as png, svg or pdf")


def numbers(text: str) -> tuple[float, ...]:
    """Numbers joined by commas."""
    return tuple(float(part) for part in text.split(","))


def whole_numbers(text: str) -> tuple[int, ...]:
    """Whole numbers joined by commas."""
    return tuple(int(part) for part in text.split(","))


def run(arguments: argparse.Namespace) -> int:
    """Runs the command: 0, 1 when requests failed, 130 when it was interrupted."""
    from rich.console import Console

    from spotjax.commands.bench_inputs import measured
    from spotjax.commands.bench_views import results_view, warnings
    from spotjax.transport import loop

    check_outputs(arguments)
    date = datetime.now(UTC).isoformat(timespec="seconds")
    with progress() as (told, finished):
        results, settings = loop.run(measured(arguments, told, finished))
    if not results:
        return 130
    Console().print(results_view(results, settings))
    for warning in warnings(results):
        print(f"spotjax: {warning}", file=sys.stderr)
    if arguments.json:
        from spotjax.bench.results import document, encode

        try:
            arguments.json.write_bytes(encode(document(results, settings, date, arguments.json_requests)))
        except OSError as problem:
            raise ConfigError(f"--json: {arguments.json} cannot be written: {problem}") from problem
    if arguments.plot:
        from spotjax.bench.plots import plot

        plot(results, f"{settings['model']} by {settings['api']} at {settings['server']}", arguments.plot)
    if any(result.run.interrupted for result in results):
        return 130
    return 1 if any(result.summary.failed for result in results) else 0


def check_outputs(arguments: argparse.Namespace) -> None:
    """Before anything that takes long: files can be written where they are asked for.

    Raises:
      ConfigError: one cannot; names the flag.
    """
    for name in ("plot", "json"):
        path = getattr(arguments, name)
        if path is not None and not path.resolve().parent.is_dir():
            raise ConfigError(f"--{name}: there is no directory {path.resolve().parent}")
    if arguments.json_requests and not arguments.json:
        raise ConfigError("--json-requests needs --json FILE to write to")
    if arguments.plot:
        from spotjax.bench.plots import require_matplotlib

        require_matplotlib()


@contextmanager
def progress() -> Iterator[tuple[Callable[[Point], Told], Callable[[Result], None]]]:
    """Shows on standard error, if that is a terminal, how many requests of each run have ended, and its figures."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from spotjax.bench.exchange import Exchange

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:

        def told(point: Point) -> Told:
            bar, failed = bars.add_task(point.name, total=point.workload.count), 0

            def ended(exchange: Exchange) -> None:
                nonlocal failed
                failed += exchange.failure is not None
                said = f"{point.name}, {failed} failed" if failed else point.name
                bars.update(bar, advance=1, description=said)

            return ended

        def finished(result: Result) -> None:
            if console.is_terminal:
                done, rate = result.summary.completed, result.summary.output_throughput
                console.print(f"{result.point.name}: {done} completed, {rate:.1f} tokens/s")

        yield told, finished
