"""What one step runs and what it returns. The contract between the scheduler and whatever executes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from spotjax.engine.request import RequestState, Sampled


@dataclass(frozen=True, slots=True)
class Span:
    """A run of consecutive positions of one sequence whose KV is to be computed.

    A decode step is a span of one position, a prefill chunk one of many.

    Attributes:
      sequence: key of the sequence within its replica.
      tokens: token ids at positions ``start`` .. ``start + len(tokens)``.
      start: first position; KV of all earlier positions is already in ``pages``.
      pages: KV pages of the sequence in position order, enough for the last position of the span.
      state: the sequence; when ``samples`` its next token is drawn from the logits at the span's last position.
      samples: whether the span reaches the sequence's end, so that a token is drawn.
    """

    sequence: int
    tokens: tuple[int, ...]
    start: int
    pages: tuple[int, ...]
    state: RequestState
    samples: bool


@dataclass(frozen=True, slots=True)
class Batch:
    """Spans that run as one step. All decode or all prefill, so that one packed array comes back."""

    step: int
    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class StepResult:
    """The sampled token of every span of the batch that samples, by sequence."""

    step: int
    sampled: Mapping[int, Sampled]


class Pipeline(Protocol):
    """Runs batches through the stages of one replica."""

    @property
    def depth(self) -> int:
        """Batches that may be in flight at once: the number of stages."""
        ...

    async def run(self, batch: Batch) -> StepResult:
        """Runs one batch.

        Raises:
          InstanceLost: a machine of the replica is gone; nothing of the batch is committed.
        """
        ...
