"""Results as JSON. Figures have the names that ``vllm bench serve`` gives them, in milliseconds where it does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import pairwise
from typing import Any

import msgspec

from spotjax.bench.exchange import Exchange
from spotjax.bench.machine import load_average, machine, versions
from spotjax.bench.statistics import Distribution, Summary
from spotjax.bench.sweep import Result

VERSION = 1
METRICS = ("ttft", "tpot", "itl", "e2el")


def document(results: Sequence[Result], settings: Mapping[str, Any], date: str, with_requests: bool) -> dict[str, Any]:
    """Everything.

    Args:
      results: of the points.
      settings: of the command, without secrets.
      date: when it began.
      with_requests: has the times of every request, too.
    """
    return {
        "spotjax_bench": VERSION,
        "date": date,
        "machine": machine() | {"load_average_after": load_average()},
        "versions": versions(),
        "settings": dict(settings),
        "interrupted": any(result.run.interrupted for result in results),
        "runs": [run_document(result, with_requests) for result in results],
    }


def run_document(result: Result, with_requests: bool) -> dict[str, Any]:
    """One point."""
    run, arrivals = result.run, result.point.workload.arrivals
    found: dict[str, Any] = {
        "arrivals": arrivals.kind,
        "request_rate": arrivals.rate,
        "burstiness": arrivals.burstiness,
        "max_concurrency": result.point.concurrency,
        "num_prompts": result.point.workload.count,
        "interrupted": run.interrupted,
        "load_average_before": result.load_before,
        "client_cpu_seconds": run.cpu_seconds,
        **figures(result.summary),
        "errors": [list(e.failure) for e in run.exchanges if e.failure is not None],
    }
    if with_requests:
        found["requests"] = [request_document(exchange) for exchange in run.exchanges]
    return found


def figures(summary: Summary) -> dict[str, Any]:
    """All figures, flat: ``mean_ttft_ms``, ``p99_itl_ms`` and so on."""
    flat: dict[str, Any] = {}
    for field in fields(summary):
        value = getattr(summary, field.name)
        if field.name in (*METRICS, "queued"):
            flat |= _distribution(field.name, value)
        else:
            flat[field.name] = value
    return flat


def request_document(exchange: Exchange) -> dict[str, Any]:
    """One request, in seconds from the start of the run. Says nothing of what was asked or answered."""
    complete = exchange.failure is None
    return {
        "arrival": exchange.request.arrival,
        "sent": exchange.sent,
        "prompt_tokens_planned": exchange.request.prompt_tokens,
        "prompt_tokens": exchange.prompt_tokens,
        "output_tokens_asked": exchange.request.output_tokens,
        "output_tokens": exchange.output_tokens,
        "ttft": exchange.times[0] - exchange.sent if exchange.times else None,
        "itls": [later - earlier for earlier, later in pairwise(exchange.times)],
        "e2el": exchange.times[-1] - exchange.sent if complete else None,
        "finish": exchange.finish,
        "failure": None if exchange.failure is None else exchange.failure.kind,
        "answer": exchange.digest,
    }


def encode(value: Any) -> bytes:
    """JSON, indented."""
    return msgspec.json.format(msgspec.json.encode(value), indent=1) + b"\n"


def _distribution(name: str, values: Distribution | None) -> dict[str, float | None]:
    parts = ("mean", "median", "std", "least", "most")
    found = {f"{part}_{name}_ms": None if values is None else 1000 * getattr(values, part) for part in parts}
    for percent, value in () if values is None else values.percentiles:
        found[f"p{percent:g}_{name}_ms"] = 1000 * value
    return found
