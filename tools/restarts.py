"""What came of restarts of a server, and whether its commit log says what clients were told."""

from __future__ import annotations

import itertools
import time
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from spotjax.engine.log_inspection import inspect_log
from spotjax.tools.load import Load, Stream
from spotjax.tools.service import Life, Service

BUFFERED_SECONDS = 0.1
"""For what an earlier life had sent to be read by its clients."""
RETAINED_SECONDS = 500.0
"""Less than finished requests are kept by default."""


@dataclass(frozen=True)
class Restart:
    """A server that died and served again.

    Attributes:
      after_death: seconds from the first death without a token since to the first token of any stream.
      after_start: the same from the start of the life that brought it.
      sequences: those that the log had unfinished; None if the server was dead again before it said so.
      kept: those of them that had KV.
    """

    after_death: float
    after_start: float
    sequences: int | None
    kept: int


def restarts(lives: Sequence[Life], streams: Sequence[Stream]) -> list[Restart]:
    """All restarts after which tokens came, by the arrivals at clients."""
    arrivals = sorted(moment for stream in streams for moment in stream.times)
    found: list[Restart] = []
    died: float | None = None
    for before, life in itertools.pairwise(lives):
        died = before.ended if died is None else died
        first = bisect_right(arrivals, life.started + BUFFERED_SECONDS)
        if first == len(arrivals) or (life.ended and arrivals[first] > life.ended):
            continue
        found.append(Restart(arrivals[first] - died, arrivals[first] - life.started, life.sequences, life.kept))
        died = None
    return found


def disagreements(service: Service, load: Load) -> list[str]:
    """What of the log of a service that ended is not as its clients saw it, or not as it should be at the end."""
    summary = inspect_log(service.commit_log)
    recorded = {request.request_id: request.tokens for request in summary.requests}
    told = {name: tokens for name, (_, tokens) in load.ended.items()}
    long_ago = time.monotonic() - RETAINED_SECONDS
    problems = [f"the log is damaged: {damage}" for damage in summary.damage]
    problems += [f"{request.request_id} is unfinished in the log" for request in summary.requests if request.unfinished]
    problems += [
        f"the log has {recorded[name]} tokens of {name}, clients saw {tokens}"
        for name, tokens in told.items()
        if recorded.get(name, tokens) != tokens
    ]
    problems += [
        f"the log has nothing of {name}"
        for name, (ended, _) in load.ended.items()
        if name not in recorded and ended > long_ago
    ]
    unasked = [name for name in recorded if load.is_ours(name) and name not in told]
    return problems + [f"the log has {name}, which did not end for its client" for name in unasked]
