"""One sequence on its way through a replica: what is computed of it, and what will be when steps in flight are back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from spotjax.engine.batch import Span, ahead
from spotjax.engine.prefix_cache import Tokens
from spotjax.engine.request import FinishReason, RequestState
from spotjax.engine.structure import Matcher


class Flight(NamedTuple):
    """A sequence's part in a step that has not come back.

    Attributes:
      step, row: of the batch.
      stop: the position after the last whose KV it writes.
      samples: whether it draws a token.
    """

    step: int
    row: int
    stop: int
    samples: bool


@dataclass(slots=True, eq=False)
class Sequence:
    """A request's sequence on its way through a replica.

    Attributes:
      key: unique in the process, in order of acceptance.
      state: what is committed.
      pages: KV pages it refers to, in position order; empty while it waits.
      computed: the watermark: positions whose KV is complete.
      cached: leading pages that are in the prefix cache, where others find them.
      reached: positions whose KV was complete once; from ``computed`` up to there it has to be computed again.
      flights: its parts in steps that have not come back, in order; changed by the methods below.
      drawing: tokens that these draw.
      cancelled: why it is to end at the next token boundary, if it is.
      matcher: of its structure, once it was needed.
    """

    key: int
    state: RequestState
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    cached: int = 0
    reached: int = 0
    flights: list[Flight] = field(default_factory=list)
    drawing: int = 0
    cancelled: FinishReason | None = None
    matcher: Matcher | None = None

    @property
    def in_flight(self) -> bool:
        """Whether it is part of a step that has not come back."""
        return bool(self.flights)

    @property
    def begun(self) -> int:
        """Positions whose KV is complete, or is when the steps in flight are back."""
        return self.flights[-1].stop if self.flights else self.computed

    @property
    def length(self) -> int:
        """Positions that it takes when the steps in flight are back, unless it ends before."""
        return self.state.length + self.drawing

    @property
    def missing(self) -> int:
        """Positions whose KV no step computes yet; the last one's logits give the next token."""
        needed = len(self.state.prompt) + self.state.sampling.max_tokens - 1  # nobody attends to the last token
        return min(self.length, needed) - self.begun

    def take_off(self, flight: Flight) -> None:
        """It is part of one more step in flight."""
        self.flights.append(flight)
        self.drawing += flight.samples

    def land(self) -> None:
        """The oldest step in flight is back."""
        self.drawing -= self.flights.pop(0).samples

    def ground(self) -> None:
        """Forgets the steps in flight: they never come back."""
        self.flights.clear()
        self.drawing = 0

    def fall_back(self, computed: int = 0) -> None:
        """Its KV is complete up to there only, and its pages are others than before."""
        self.reached = max(self.reached, self.computed)
        self.computed = computed

    def tokens(self, start: int, stop: int) -> Tokens:
        """The known tokens at some positions."""
        prompt = len(self.state.prompt)
        return self.state.prompt[start:stop] + self.state.tokens[max(0, start - prompt) : max(0, stop - prompt)]

    def span(self, length: int, pages: int) -> Span:
        """Its next positions, for which so many of its pages are needed."""
        state, start = self.state, self.begun
        stop = start + length
        if length > 1:
            tokens = self.tokens(start, stop)
        else:
            tokens = (_token_at(state, start) if start < state.length else ahead(self.flights[-1].row),)
        return Span(self.key, tokens, start, tuple(self.pages[:pages]), state, samples=stop == self.length)

    def may_run_ahead(self) -> bool:
        """Whether it can take part in one more step while it is in flight.

        At most one of its tokens is unknown then, and nothing but the model is to know it.
        """
        if self.cancelled is not None or self.drawing > 1:
            return False
        return not self.drawing or not self.state.sampling.needs_output


def _token_at(state: RequestState, position: int) -> int:
    output = position - len(state.prompt)
    return state.tokens[output] if output >= 0 else state.prompt[position]
