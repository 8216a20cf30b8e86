"""Figures of a run, from what was seen of its requests. Pure.

The definitions are those of ``vllm bench serve`` (``calculate_metrics`` in vllm/benchmarks/serve.py), here over the
requests that were answered completely:

- TTFT: from sending a request to the first piece of its answer. E2EL: to the last one.
- ITL: between two pieces of an answer, over all pieces of all answers. A piece may have several tokens.
- TPOT: (E2EL - TTFT) / (output tokens - 1), one for each answer of more than one token.
- Throughputs: over the time from the start of the run to the end of its last request.
- Percentiles are interpolated linearly, the standard deviation divides by the count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil

import numpy as np

from spotjax.bench.exchange import INTERRUPTED, Exchange
from spotjax.bench.goodput import Objectives

PERCENTILES = (50.0, 90.0, 95.0, 99.0)


@dataclass(frozen=True)
class Distribution:
    """Of seconds.

    Attributes:
      count: values.
      percentiles: (percent, value), in the order that was asked for.
    """

    count: int
    mean: float
    std: float
    median: float
    least: float
    most: float
    percentiles: tuple[tuple[float, float], ...]

    @classmethod
    def of(cls, values: Sequence[float], percentiles: Sequence[float]) -> Distribution | None:
        """None of no values."""
        if not len(values):
            return None
        found = np.percentile(values, percentiles).tolist()
        return cls(
            count=len(values),
            mean=float(np.mean(values)),
            std=float(np.std(values)),
            median=float(np.median(values)),
            least=float(np.min(values)),
            most=float(np.max(values)),
            percentiles=tuple(zip(map(float, percentiles), found, strict=True)),
        )

    def at(self, percent: float) -> float:
        """One of the percentiles.

        Raises:
          KeyError: it was not asked for.
        """
        return dict(self.percentiles)[percent]


@dataclass(frozen=True)
class Times:
    """Seconds of one complete answer.

    Attributes:
      tpot: 0 for an answer of one token.
      tokens: of the output.
      counted: the server said how many; else they were counted here.
    """

    ttft: float
    tpot: float
    e2el: float
    tokens: int
    counted: bool


@dataclass(frozen=True)
class Summary:
    """Figures of a run. Names and meaning are those of vLLM's JSON, where it has them.

    Attributes:
      failures: requests without a complete answer, by kind.
      interrupted: requests that the end of the run cut off; neither completed nor failed.
      duration: seconds.
      request_goodput: None when no objectives were given.
      max_output_tokens_per_s: most pieces in one second of the clock that starts with the first request; tokens, where
        pieces say how many they have.
      max_concurrent_requests: most requests that ran at any time during one such second.
      most_in_flight: most requests that ran at the same moment.
      queued: seconds between a request's arrival and its sending: it waited for others, or this client was late.
      uncounted_outputs: answers whose tokens the server did not count.
      pieces: of all complete answers.
    """

    completed: int
    failed: int
    failures: dict[str, int]
    interrupted: int
    duration: float
    total_input_tokens: int
    total_output_tokens: int
    request_throughput: float
    request_goodput: float | None
    output_throughput: float
    total_token_throughput: float
    max_output_tokens_per_s: float
    max_concurrent_requests: int
    most_in_flight: int
    ttft: Distribution | None
    tpot: Distribution | None
    itl: Distribution | None
    e2el: Distribution | None
    queued: Distribution | None
    uncounted_outputs: int
    pieces: int


def summarise(
    exchanges: Sequence[Exchange],
    duration: float,
    objectives: Objectives,
    percentiles: Sequence[float] = PERCENTILES,
    count_tokens: Callable[[str], int] | None = None,
) -> Summary:
    """Figures of a run that took ``duration`` seconds.

    Args:
      exchanges: all that were begun.
      duration: more than 0.
      objectives: of goodput.
      percentiles: to be shown, 0 to 100.
      count_tokens: of a text, for servers that do not count; without it a piece counts as one token.
    """
    complete = [exchange for exchange in exchanges if exchange.failure is None]
    times = [answer_times(exchange, count_tokens) for exchange in complete]
    failures: dict[str, int] = {}
    for exchange in exchanges:
        if exchange.failure is not None and exchange.failure != INTERRUPTED:
            failures[exchange.failure.kind] = failures.get(exchange.failure.kind, 0) + 1
    inputs = sum(prompt_tokens(exchange) for exchange in complete)
    outputs = sum(answer.tokens for answer in times)
    good = sum(objectives.met(answer.ttft, answer.tpot, answer.e2el) for answer in times)
    tokens_per_s, concurrent = seconds_of_the_run(complete)

    def distribution(values: Sequence[float]) -> Distribution | None:
        return Distribution.of(values, percentiles)

    return Summary(
        completed=len(complete),
        failed=sum(failures.values()),
        failures=dict(sorted(failures.items())),
        interrupted=len(exchanges) - len(complete) - sum(failures.values()),
        duration=duration,
        total_input_tokens=inputs,
        total_output_tokens=outputs,
        request_throughput=len(complete) / duration,
        request_goodput=good / duration if objectives else None,
        output_throughput=outputs / duration,
        total_token_throughput=(inputs + outputs) / duration,
        max_output_tokens_per_s=float(max(tokens_per_s, default=0)),
        max_concurrent_requests=int(max(concurrent, default=0)),
        most_in_flight=most_in_flight(complete),
        ttft=distribution([answer.ttft for answer in times]),
        tpot=distribution([answer.tpot for answer in times if answer.tokens > 1]),
        itl=distribution([later - earlier for exchange in complete for earlier, later in pairwise(exchange.times)]),
        e2el=distribution([answer.e2el for answer in times]),
        queued=distribution([exchange.sent - exchange.request.arrival for exchange in exchanges]),
        uncounted_outputs=sum(not answer.counted for answer in times),
        pieces=sum(len(exchange.times) for exchange in complete),
    )


def answer_times(exchange: Exchange, count_tokens: Callable[[str], int] | None = None) -> Times:
    """Of a complete answer, which has at least one piece."""
    ttft, e2el = exchange.times[0] - exchange.sent, exchange.times[-1] - exchange.sent
    tokens = exchange.output_tokens
    if not tokens and count_tokens is not None:
        tokens = count_tokens(exchange.text)
    tokens = tokens or sum(exchange.counts) or len(exchange.times)
    tpot = (e2el - ttft) / (tokens - 1) if tokens > 1 else 0.0
    return Times(ttft, tpot, e2el, tokens, counted=bool(exchange.output_tokens))


def prompt_tokens(exchange: Exchange) -> int:
    """As the server counted, else as planned."""
    return exchange.prompt_tokens if exchange.prompt_tokens is not None else exchange.request.prompt_tokens or 0


def seconds_of_the_run(complete: Sequence[Exchange]) -> tuple[list[float], list[int]]:
    """For each second since the first request was sent: tokens (or pieces) that came, requests that ran during it."""
    if not complete:
        return [], []
    start = min(exchange.sent for exchange in complete)
    length = ceil(max(exchange.times[-1] for exchange in complete) - start) + 1
    tokens, running = np.zeros(length), np.zeros(length, dtype=np.int64)
    for exchange in complete:
        slots = (np.asarray(exchange.times) - start).astype(np.int64)
        np.add.at(tokens, slots, exchange.counts or 1)
        running[int(exchange.sent - start) : slots[-1] + 1] += 1
    return tokens.tolist(), running.tolist()


def most_in_flight(complete: Sequence[Exchange]) -> int:
    """Most requests that ran at the same moment; one that ends as another begins does not count with it."""
    changes = sorted([(e.sent, 1) for e in complete] + [(e.times[-1], -1) for e in complete])
    return int(np.cumsum([change for _, change in changes]).max(initial=0))
