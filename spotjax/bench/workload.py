"""What is asked of a server, put together: arrivals, lengths and prompts, from one seed. Pure.

Arrivals, lengths and prompts are drawn from streams of their own: another rate asks for the same prompts. Points of a
sweep and warm-up requests have prompts of their own, since a server may remember those that it has seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from spotjax.bench.arrivals import Arrivals, Seconds
from spotjax.bench.exchange import PlannedRequest
from spotjax.bench.lengths import Lengths
from spotjax.bench.prompts import GivenPrompt, Prompts, Text
from spotjax.errors import ConfigError
from spotjax.sim.workload import RequestTrace

WARM_UP = 2**31
"""The number of the point that warm-up requests belong to: none that is measured."""


@dataclass(frozen=True)
class Workload:
    """What is asked for.

    Attributes:
      count: requests.
      arrivals: when they come.
      prompt_lengths, output_lengths: None takes them from the trace.
      prompts: where prompts come from, and shared prefixes.
      given: prompts of a file instead, taken in order and again from the first; where one says how many tokens its
        output has, that counts.
      trace: recorded requests, the first ``count`` of which are taken.
      shared_prefix: tokens that all prompts begin with, in addition to their own.
      seed: of all that is drawn.

    Raises:
      ConfigError: there are no requests, or the trace has too few.
    """

    count: int
    arrivals: Arrivals
    prompt_lengths: Lengths | None
    output_lengths: Lengths | None
    prompts: Prompts
    given: Sequence[GivenPrompt] = ()
    trace: RequestTrace | None = None
    shared_prefix: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ConfigError(f"--requests must be at least 1, got {self.count}")
        if self.trace is not None and self.count > len(self.trace):
            raise ConfigError(f"--requests {self.count}: trace {self.trace.name} has {len(self.trace)}")

    def plan(self, point: int = 0) -> list[PlannedRequest]:
        """The requests in order of arrival; ``point`` of a sweep has prompts of its own."""
        draws = np.random.SeedSequence([self.seed, point]).spawn(5)
        arrivals, prompt_lengths, output_lengths, prompts, prefix = map(np.random.default_rng, draws)
        times = self._arrivals(arrivals)
        shared = self.prompts.draw(self.shared_prefix, prefix)[0] if self.shared_prefix else None
        seeds = range(self.seed, self.seed + self.count)
        if self.given:
            given = [self.given[number % len(self.given)] for number in range(self.count)]
            drawn_outputs = self._lengths(self.output_lengths, (), output_lengths)
            outputs = [said.output_tokens or drawn for said, drawn in zip(given, drawn_outputs, strict=True)]
            rows: list[tuple[Text, int | None]] = [(begun(shared, said.text), None) for said in given]
        else:
            recorded = ((), ()) if self.trace is None else (self.trace.prompt.tolist(), self.trace.output.tolist())
            wanted = self._lengths(self.prompt_lengths, recorded[0], prompt_lengths)
            outputs = self._lengths(self.output_lengths, recorded[1], output_lengths)
            drawn = [self.prompts.draw(length, prompts) for length in wanted]
            rows = [
                (begun(shared, text), None if tokens is None else tokens + self.shared_prefix) for text, tokens in drawn
            ]
        return [
            PlannedRequest(float(at), text, tokens, output, seed)
            for at, (text, tokens), output, seed in zip(times, rows, outputs, seeds, strict=True)
        ]

    def warm_up(self, count: int) -> list[PlannedRequest]:
        """So many requests of the same kind, all at once, with prompts that no point of the sweep has."""
        return [replace(request, arrival=0.0) for request in self.plan(WARM_UP)[:count]]

    def _arrivals(self, random: np.random.Generator) -> Seconds:
        if self.arrivals.kind != "trace":
            return self.arrivals.draw(self.count, random)
        assert self.trace is not None, "arrivals of a trace need one"
        trace = self.trace
        if self.arrivals.rate is not None:
            trace = trace.scaled_to(self.arrivals.rate)
        times: Seconds = trace.arrival[: self.count] - trace.arrival[0]
        return times

    def _lengths(self, lengths: Lengths | None, recorded: Sequence[int], random: np.random.Generator) -> list[int]:
        """Drawn, or without a distribution as recorded."""
        drawn: list[int] = (
            list(recorded[: self.count]) if lengths is None else lengths.draw(self.count, random).tolist()
        )
        return drawn


def begun(shared: Text | None, prompt: Text) -> Text:
    """A prompt with what all begin with."""
    if shared is None:
        return prompt
    if isinstance(shared, str) and isinstance(prompt, str):
        return f"{shared} {prompt}"
    assert isinstance(shared, tuple) and isinstance(prompt, tuple)
    return shared + prompt
