"""What ``spotjax bench`` is to do, from its arguments: the server, the points of the sweep, and what is asked for."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec

from spotjax.async_client import AsyncSpotjaxClient
from spotjax.bench.arrivals import ArrivalKind, Arrivals
from spotjax.bench.goodput import Objectives
from spotjax.bench.grpc_endpoint import GrpcEndpoint
from spotjax.bench.http_endpoint import HttpEndpoint, tls_context
from spotjax.bench.lengths import Lengths, parse_lengths
from spotjax.bench.load import Run
from spotjax.bench.prompts import Prompts, TokenIds, TokenText, Vocabulary, Words, read_prompts
from spotjax.bench.statistics import Summary, summarise
from spotjax.bench.sweep import Point, Result, Told, measure
from spotjax.bench.workload import Workload
from spotjax.commands.arguments import credentials_of
from spotjax.commands.bench import DEFAULT_LENGTH
from spotjax.commands.simulate_inputs import parsed_window
from spotjax.config import DEFAULT_LISTEN, TLS
from spotjax.errors import ConfigError
from spotjax.sim.traces.formats import open_requests
from spotjax.sim.workload import RequestTrace

REQUESTS = 100
HTTP_SERVER = "http://127.0.0.1:8471"
SECRET = ("api_key", "run")
"""Arguments that no result has."""


async def measured(
    arguments: argparse.Namespace, told: Callable[[Point], Told], finished: Callable[[Result], None]
) -> tuple[list[Result], dict[str, Any]]:
    """Measures; results, and the settings that they were measured with.

    Raises:
      ConfigError: an argument is wrong.
      EndpointFailed: there is no server, or a warm-up request failed.
    """
    objectives = Objectives.parse(arguments.goodput)
    check_numbers(arguments)
    arguments.prompt_kind = prompt_kind(arguments)
    vocabulary = Vocabulary.read(arguments.tokenizer) if arguments.tokenizer else None
    count_tokens = None if vocabulary is None else vocabulary.count

    def figures(run: Run) -> Summary:
        return summarise(run.exchanges, run.duration, objectives, arguments.percentiles, count_tokens)

    arguments.server = arguments.server or (DEFAULT_LISTEN if arguments.api == "grpc" else HTTP_SERVER)
    points_of(arguments, Words())  # what is wrong with them is said before a server is asked for anything
    async with endpoint_of(arguments) as endpoint:
        arguments.model = await endpoint.find_model()
        points = points_of(arguments, await prompts_of(arguments, vocabulary, endpoint))
        results = await measure(
            endpoint, points, figures, warm_up=arguments.warm_up, timeout=arguments.timeout, told=told,
            finished=finished,
        )  # fmt: skip
    return results, settings_of(arguments)


@contextlib.asynccontextmanager
async def endpoint_of(arguments: argparse.Namespace) -> AsyncIterator[HttpEndpoint | GrpcEndpoint]:
    """The server that is asked.

    Raises:
      ConfigError: an argument is wrong, or something has to be installed.
    """
    if arguments.api == "grpc":
        if arguments.extra_body:
            raise ConfigError("--extra-body is for HTTP")
        options = {"temperature": arguments.temperature, "ignore_eos": arguments.ignore_eos}
        credentials = credentials_of(arguments)
        async with AsyncSpotjaxClient(arguments.server, 0, credentials, arguments.api_key) as client:
            yield GrpcEndpoint(client, arguments.model, options)
        return
    tls = tls_context(*(getattr(arguments, name) for name in TLS))
    async with HttpEndpoint(
        arguments.server, arguments.api, arguments.model, http_options(arguments), arguments.api_key, tls
    ) as server:
        yield server


def http_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Fields of every HTTP request.

    Raises:
      ConfigError: ``--extra-body`` is no JSON object.
    """
    options: dict[str, Any] = {"temperature": arguments.temperature}
    if arguments.ignore_eos:
        options["ignore_eos"] = True
    if arguments.extra_body:
        try:
            options |= msgspec.json.decode(arguments.extra_body, type=dict[str, Any])
        except msgspec.MsgspecError as problem:
            raise ConfigError(f"--extra-body must be a JSON object: {problem}") from problem
    return options


def prompt_kind(arguments: argparse.Namespace) -> str:
    """What drawn prompts are made of.

    Raises:
      ConfigError: a tokenizer is missing, a vocabulary is not used, or chats are to be token ids.
    """
    kind: str = arguments.prompt_kind or ("words" if arguments.tokenizer is None else "text")
    if kind == "text" and arguments.tokenizer is None:
        raise ConfigError("--prompt-kind text needs --tokenizer")
    if kind != "ids" and arguments.vocabulary is not None:
        raise ConfigError("--vocabulary is for --prompt-kind ids")
    if kind == "ids" and arguments.api == "chat":
        raise ConfigError("--prompt-kind ids is not for --api chat: a chat is text")
    return kind


async def prompts_of(
    arguments: argparse.Namespace, vocabulary: Vocabulary | None, endpoint: HttpEndpoint | GrpcEndpoint
) -> Prompts:
    """Where drawn prompts come from.

    Raises:
      ConfigError: the server does not say how many token ids there are, and nobody else has.
    """
    kind = arguments.prompt_kind
    if kind == "words":
        return Words()
    if vocabulary is not None:
        return TokenText(vocabulary) if kind == "text" else TokenIds(vocabulary.usable)
    count = arguments.vocabulary
    if count is None and isinstance(endpoint, GrpcEndpoint):
        count = await endpoint.vocabulary()
    if count is None:
        raise ConfigError("--prompt-kind ids needs --vocabulary or --tokenizer: this server does not say how many")
    return TokenIds(range(count))


def points_of(arguments: argparse.Namespace, prompts: Prompts) -> list[Point]:
    """The points of the sweep; one, if nothing is swept.

    Raises:
      ConfigError: both rate and concurrency are swept, or what is asked for does not fit together.
    """
    rates, limits = arguments.rate or (None,), arguments.concurrency or (None,)
    if len(rates) > 1 and len(limits) > 1:
        raise ConfigError("--rate and --concurrency cannot both have several values: sweep one")
    workloads = [workload_of(arguments, prompts, rate) for rate in rates]
    return [Point(workload, limit) for workload in workloads for limit in limits]


def workload_of(arguments: argparse.Namespace, prompts: Prompts, rate: float | None) -> Workload:
    """What is asked for, at a rate.

    Raises:
      ConfigError: an argument is wrong or has no meaning beside another.
    """
    trace = trace_of(arguments)
    given = read_prompts(arguments.prompts) if arguments.prompts else []
    if given and (trace is not None or arguments.prompt_tokens or arguments.prompt_kind == "ids"):
        raise ConfigError(
            "--prompts has prompts: --trace, --prompt-tokens and --prompt-kind ids have no meaning with it"
        )
    kind: ArrivalKind = arguments.arrivals or ("trace" if trace is not None else "all" if rate is None else "poisson")
    if kind == "trace" and trace is None:
        raise ConfigError("--arrivals trace needs --trace FILE")
    default = REQUESTS if trace is None else len(trace)
    return Workload(
        count=default if arguments.requests is None else arguments.requests,
        arrivals=Arrivals(kind, rate, arguments.burstiness),
        prompt_lengths=lengths_of("--prompt-tokens", arguments.prompt_tokens, trace is not None),
        output_lengths=lengths_of("--output-tokens", arguments.output_tokens, trace is not None),
        prompts=prompts,
        given=given,
        trace=trace,
        shared_prefix=arguments.shared_prefix,
        seed=arguments.seed,
    )


def trace_of(arguments: argparse.Namespace) -> RequestTrace | None:
    """The recorded requests, cut as asked for.

    Raises:
      ConfigError: the file cannot be read, nothing is left of it, or there is none to cut.
    """
    cut = arguments.trace_window, arguments.max_prompt, arguments.max_output
    if arguments.trace is None:
        if any(part is not None for part in cut):
            raise ConfigError("--trace-window, --max-prompt and --max-output are for --trace")
        return None
    trace = open_requests(arguments.trace)
    if arguments.trace_window is not None:
        trace = trace.window(*parsed_window("--trace-window", arguments.trace_window))
    if not len(trace):
        raise ConfigError(f"--trace: no requests are left of {arguments.trace}")
    most = [2**62 if limit is None else limit for limit in (arguments.max_prompt, arguments.max_output)]
    return trace.clipped(*most)


def lengths_of(flag: str, text: str | None, recorded: bool) -> Lengths | None:
    """The distribution that a flag asks for; None for lengths that are recorded."""
    if text is None and recorded:
        return None
    return parse_lengths(flag, text or DEFAULT_LENGTH)


def check_numbers(arguments: argparse.Namespace) -> None:
    """Raises ConfigError for a number that is out of range; names the flag."""
    positive = {"requests": arguments.requests, "timeout": arguments.timeout, "vocabulary": arguments.vocabulary}
    for name, value in positive.items():
        if value is not None and not value > 0:
            raise ConfigError(f"--{name} must be more than 0, got {value:g}")
    natural = {"warm-up": arguments.warm_up, "shared-prefix": arguments.shared_prefix, "seed": arguments.seed,
               "temperature": arguments.temperature}  # fmt: skip
    for name, value in natural.items():
        if not value >= 0:
            raise ConfigError(f"--{name} must not be negative, got {value:g}")
    if any(limit < 1 for limit in arguments.concurrency or ()):
        raise ConfigError(f"--concurrency must be at least 1, got {min(arguments.concurrency)}")
    if not all(0 <= percent <= 100 for percent in arguments.percentiles):
        raise ConfigError(f"--percentiles must be from 0 to 100, got {','.join(map(str, arguments.percentiles))}")


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What it was measured with, as JSON can have it; nothing secret."""
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(arguments).items()
        if name not in SECRET
    }
