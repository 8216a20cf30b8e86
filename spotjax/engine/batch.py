"""What one step runs and what it returns. The contract between the scheduler and whatever executes."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from spotjax.engine.request import RequestState, Sampled
from spotjax.engine.structure import Masks


@dataclass(frozen=True, slots=True)
class Span:
    """A run of consecutive positions of one sequence whose KV is to be computed.

    A decode step is a span of one position, a prefill chunk one of many.

    Attributes:
      sequence: key of the sequence within its replica.
      tokens: token ids at positions ``start`` .. ``start + len(tokens)``; of a span that runs ahead ``ahead(row)``.
      start: first position; KV of all earlier positions is already in ``pages``.
      pages: KV pages of the sequence in position order, enough for the last position of the span.
      state: the sequence as committed; when ``samples`` a token is drawn from the logits at the span's last position.
      samples: whether the span reaches the sequence's end, so that a token is drawn.
    """

    sequence: int
    tokens: tuple[int, ...]
    start: int
    pages: tuple[int, ...]
    state: RequestState
    samples: bool

    @property
    def stop(self) -> int:
        """The position after the last."""
        return self.start + len(self.tokens)


def ahead(row: int) -> int:
    """In place of a token id: whatever the step that is followed draws in that row. Negative, as no token id is."""
    return -1 - row


@dataclass(frozen=True, slots=True)
class Batch:
    """Spans that run as one step. All decode or all prefill, so that one packed array comes back.

    Attributes:
      step: number, counted up.
      spans: one a row.
      follows: the step before it that draws the tokens of spans that run ahead; None if there are no such spans.
      masks: which tokens rows with a structure may draw, computed while the step runs; None if there are no such rows.
    """

    step: int
    spans: tuple[Span, ...]
    follows: int | None = None
    masks: Future[Masks] | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """The sampled token of every span of the batch that samples, by sequence."""

    step: int
    sampled: Mapping[int, Sampled]


class Pipeline(Protocol):
    """Runs batches through the stages of one replica, in the order in which they are given to it."""

    @property
    def depth(self) -> int:
        """Batches that it works on at once: the number of stages."""
        ...

    @property
    def ahead(self) -> bool:
        """Whether batches may follow steps that have not come back, because what these draw is where it is needed."""
        ...

    async def run(self, batch: Batch) -> StepResult:
        """Runs one batch.

        Raises:
          InstanceLost: a machine of the replica is gone; nothing of the batch is committed.
        """
        ...
