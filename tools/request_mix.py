"""Requests of every kind, drawn by seed, and whether two outputs of one are the same. Data and pure functions."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from spotjax.api.requests import Sampling
from spotjax.engine.generation import Delta
from spotjax.engine.request import FinishReason, Logprobs

TOLERANCE = 1e-3
"""By how much log-probabilities may differ: sums over other numbers of devices are rounded differently."""

SPEAKERS = ("ROMEO", "JULIET", "HAMLET", "KING RICHARD", "PORTIA", "FIRST WITCH", "FALSTAFF", "CLEOPATRA")
LINES = (
    "But soft, what light through yonder window breaks?",
    "The quality of mercy is not strained.",
    "Now is the winter of our discontent made glorious summer by this sun of York;",
    "When shall we three meet again, in thunder, lightning, or in rain?",
    "To be, or not to be: that is the question.",
    "If music be the food of love, play on.",
    "Friends, Romans, countrymen, lend me your ears;",
)
LINES_SCHEMA = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {"who": {"enum": SPEAKERS}, "says": {"type": "string", "maxLength": 20}},
        "required": ["who", "says"],
        "additionalProperties": False,
    },
    "minItems": 4,
}
KINDS: Mapping[str, Sampling] = {
    "greedy": {"temperature": 0.0},
    "seeded": {"temperature": 0.8},
    "top-p": {"temperature": 0.9, "top_p": 0.9},
    "top-k": {"temperature": 1.1, "top_k": 20, "min_p": 0.01},
    "penalised": {
        "temperature": 0.7,
        "repetition_penalty": 1.3,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.2,
    },
    "logprobs": {"temperature": 0.0, "logprobs": 3, "logit_bias": {4: 2.0, 9: -50.0}},
    "choices": {"temperature": 0.8, "top_k": 50},
    "stopped": {"temperature": 0.7, "stop": ("\n\n", ", and", "my lord"), "logprobs": 0},
    "structured": {"temperature": 0.8, "structure": {"json_schema": LINES_SCHEMA}},
}
"""Sampling settings by what is special about them; ``choices`` are two of one request."""


@dataclass(frozen=True)
class Request:
    """Something to ask of a server again and again; the answer is always the same.

    Attributes:
      name: unique in its mix.
      prompt: text.
      sampling: how tokens are chosen; seeded.
      n: number of choices.
    """

    name: str
    prompt: str
    sampling: Sampling
    n: int = 1


def mix(seed: int, count: int, longest: int = 96) -> list[Request]:
    """``count`` different requests, all kinds in turn, of up to ``longest`` new tokens."""
    draw = random.Random(seed)
    requests = []
    for number, (kind, settings) in zip(range(count), itertools.cycle(KINDS.items()), strict=False):
        lines = draw.sample(LINES, draw.randint(1, 4))
        sampling: Sampling = {
            **settings,
            "max_tokens": draw.randint(longest // 3, longest),
            "seed": draw.getrandbits(63),
            "ignore_eos": kind != "stopped",
        }
        prompt = f"{draw.choice(SPEAKERS)}.\n" + "\n".join(lines)
        requests.append(Request(f"{kind}-{number}", prompt, sampling, n=2 if kind == "choices" else 1))
    return requests


@dataclass
class Output:
    """What a client of one request has seen, choice by choice."""

    tokens: list[list[int]] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    logprobs: list[list[Logprobs]] = field(default_factory=list)
    finish: list[FinishReason | None] = field(default_factory=list)

    @classmethod
    def empty(cls, n: int) -> Output:
        """Nothing yet of ``n`` choices."""
        return cls([[] for _ in range(n)], [""] * n, [[] for _ in range(n)], [None] * n)

    def add(self, delta: Delta) -> str | None:
        """Takes a piece in; says what is wrong if it is not the next one of its choice."""
        choice, seen = delta.choice, len(self.tokens[delta.choice])
        if delta.offset != seen:
            return f"choice {choice} goes on at token {delta.offset}, {seen} were seen: tokens were lost or came twice"
        if self.finish[choice] is not None:
            return f"something of choice {choice} came after its end"
        self.tokens[choice] += delta.tokens
        self.text[choice] += delta.text
        self.logprobs[choice] += delta.logprobs
        self.finish[choice] = delta.finish
        return None


def difference(found: Output, expected: Output) -> str | None:
    """What is first found to differ, for people; None if nothing does, log-probabilities up to rounding."""
    for choice, finish in enumerate(expected.finish):
        if at := _first_difference(found.tokens[choice], expected.tokens[choice]):
            return f"choice {choice} differs from token {at - 1} on"
        if found.text[choice] != expected.text[choice]:
            return f"the text of choice {choice} differs"
        if found.finish[choice] is not finish:
            return f"choice {choice} ended by {found.finish[choice]}, not by {finish}"
        if not _close(found.logprobs[choice], expected.logprobs[choice]):
            return f"log-probabilities of choice {choice} differ"
    return None


def _first_difference(a: Sequence[int], b: Sequence[int]) -> int:
    """One more than the first index at which they differ, 0 if they are the same."""
    if list(a) == list(b):
        return 0
    return 1 + next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _close(a: Sequence[Logprobs], b: Sequence[Logprobs]) -> bool:
    return len(a) == len(b) and all(
        len(ours.top) == len(theirs.top)
        and all(
            math.isclose(x, y, abs_tol=TOLERANCE)
            for x, y in zip(
                (ours.token, *(value for _, value in ours.top)),
                (theirs.token, *(value for _, value in theirs.top)),
                strict=True,
            )
        )
        for ours, theirs in zip(a, b, strict=True)
    )
