"""One request and what was seen of its answer. Data that endpoints fill and statistics read."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import NamedTuple

MESSAGE = 300
"""Characters that are kept of what a server says went wrong."""


@dataclass(frozen=True)
class PlannedRequest:
    """What is asked for, and when.

    Attributes:
      arrival: seconds from the start of the run.
      prompt: text, or token ids.
      prompt_tokens: how many the prompt should have; None where nobody has counted.
      output_tokens: most new tokens.
      seed: of sampling.
    """

    arrival: float
    prompt: str | tuple[int, ...]
    prompt_tokens: int | None
    output_tokens: int
    seed: int


class Failure(NamedTuple):
    """Why a request has no complete answer: a kind that is counted, and what was said."""

    kind: str
    message: str


INTERRUPTED = Failure("interrupted", "the run was ended before the answer was complete")


@dataclass(slots=True)
class Exchange:
    """A request and its answer. Times are seconds from the start of the run.

    Attributes:
      request: what was asked for.
      sent: when it was sent: later than its arrival where it waited for others to end, or this client was late.
      times: when each piece of the answer came.
      counts: tokens of each piece, where the server says so; else empty.
      prompt_tokens, output_tokens: as the server counted; None if it did not say.
      finish: why the answer ended, in the server's words.
      failure: None for a complete answer.
    """

    request: PlannedRequest
    sent: float = 0.0
    times: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    finish: str | None = None
    failure: Failure | None = None
    _text: list[str] = field(default_factory=list)

    def piece(self, at: float, text: str, tokens: int | None = None) -> None:
        """Takes note of a piece of the answer."""
        self.times.append(at)
        self._text.append(text)
        if tokens is not None:
            self.counts.append(tokens)

    @property
    def text(self) -> str:
        """The answer so far."""
        return "".join(self._text)

    @property
    def digest(self) -> str:
        """Tells answers apart without telling what they say."""
        return hashlib.sha256(self.text.encode(errors="surrogatepass")).hexdigest()[:16]
