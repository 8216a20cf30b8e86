"""A model without weights, devices or jax: its next token is a pure function of the tokens before, seed and choice.

It keeps KV pages, though, and reads every earlier position back from them, so that a page that was lost, shared or
brought to the wrong place is an error where it is read. What a run gives can be compared with ``undisturbed``.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from spotjax.engine.batch import Batch, Span, StepResult
from spotjax.engine.request import Logprobs, RequestState, Sampled
from spotjax.engine.text import advance
from spotjax.errors import InstanceLost

VOCAB = 256
END = 255
"""The end token, a byte that UTF-8 never has."""
Pages = dict[tuple[int, int], tuple[int, int]]
"""(page, slot) to the (position, token) whose KV it has."""
Drawn = Sequence[int | None] | None


class Bytes:
    """A tokenizer whose tokens are the bytes of UTF-8; the end token has no text."""

    end_tokens = frozenset({END})

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(token for token in tokens if token != END).decode("utf-8", "replace")


class Letters:
    """A tokenizer whose tokens are letters; quick to read where text is beside the point."""

    end_tokens = frozenset({END})

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(chr(ord("a") + token % 26) for token in tokens if token != END)


def next_token(tokens: Sequence[int], state: RequestState) -> Sampled:
    """What the model says after ``tokens``."""
    drawn = zlib.crc32(repr((tuple(tokens), state.sampling.seed, state.choice)).encode()) % VOCAB
    logprobs = Logprobs(-float(drawn), ((drawn, 0.0),)) if state.sampling.logprobs is not None else None
    return Sampled(drawn, logprobs)


def undisturbed(state: RequestState, detokenizer: Bytes | Letters) -> RequestState:
    """The sequence at its end, when nothing comes in between."""
    while state.finish is None:
        state = advance(state, next_token((*state.prompt, *state.tokens), state), detokenizer)
    return state


def compute(span: Span, pages: Pages, page_size: int, drawn: Drawn = None) -> Sampled | None:
    """Writes the KV of a span and samples from all that the sequence has in its pages.

    Args:
      drawn: by row, what the step drew that is followed.
    """
    tokens, own = span.tokens, (*span.state.prompt, *span.state.tokens)
    if tokens[0] < 0:
        assert drawn is not None and span.start == len(own), "the one token that is not known yet"
        tokens = (drawn[-1 - tokens[0]],)
        own += tokens
    for position, token in enumerate(tokens, span.start):
        page = span.pages[position // page_size]
        assert page > 0, "page 0 is for padding"
        pages[page, position % page_size] = (position, token)
    stop = span.stop
    assert len(span.pages) == -(-stop // page_size), "as many pages as the span needs"
    read = [pages[span.pages[position // page_size], position % page_size] for position in range(stop)]
    assert read == list(enumerate(own[:stop])), "the pages hold the KV of this very sequence"
    assert span.samples == (stop == len(own))
    return next_token(own, span.state) if span.samples else None


class Steps:
    """Steps on the pure model, one after another.

    Attributes:
      pages: what is in the KV pages.
    """

    def __init__(self, page_size: int, pages: Pages | None = None) -> None:
        self.pages = {} if pages is None else pages
        self._page_size = page_size
        self._drawn: dict[int, list[int | None]] = {}

    def result_of(self, batch: Batch) -> StepResult:
        """What a step gives."""
        drawn = None if batch.follows is None else self._drawn[batch.follows]
        sampled = [compute(span, self.pages, self._page_size, drawn) for span in batch.spans]
        self._drawn[batch.step] = [None if one is None else one.token for one in sampled]
        keys = [span.sequence for span in batch.spans]
        return StepResult(batch.step, {key: one for key, one in zip(keys, sampled, strict=True) if one is not None})


@dataclass
class PurePipeline:
    """Runs batches on the pure model.

    Attributes:
      page_size: positions per page.
      depth: stages.
      delay: turns of the event loop that the next step takes.
      pages: what is in the KV pages.
      batches: all that was run.
      done: those of them that have written their KV, and in between the pages that others' KV was brought into.
    """

    page_size: int
    depth: int = 1
    delay: Callable[[], int] = lambda: 1
    pages: Pages = field(default_factory=dict)
    batches: list[Batch] = field(default_factory=list)
    done: list[Batch | frozenset[int]] = field(default_factory=list)
    in_flight: list[int] = field(default_factory=list)
    lost: bool = False
    ahead: bool = True

    def __post_init__(self) -> None:
        self._steps = Steps(self.page_size, self.pages)
        self._back: list[asyncio.Event] = []

    async def run(self, batch: Batch) -> StepResult:
        """See ``Pipeline.run``."""
        mine = [span.sequence for span in batch.spans]
        assert len(set(mine)) == len(mine), "a sequence is twice in one step"
        assert self.ahead or set(mine).isdisjoint(self.in_flight), "a sequence is in two steps at once"
        self.batches.append(batch)
        self.in_flight += mine
        before, back = self._back[-self.depth :], asyncio.Event()
        self._back.append(back)
        try:
            if len(before) == self.depth:
                await before[0].wait()
            await self.work()
            if before:
                await before[-1].wait()  # nobody overtakes in a pipeline
        finally:
            back.set()
            for key in set(mine).intersection(self.in_flight):
                self.in_flight.remove(key)
        if self.lost:
            raise InstanceLost("the instance of this replica is gone")
        self.done.append(batch)
        return self._steps.result_of(batch)

    async def work(self) -> None:
        """Takes as long as a step does that has the pipeline for itself."""
        await turns(self.delay())


async def turns(count: int) -> None:
    """Lets everything else run for so many turns of the event loop."""
    for _ in range(count):
        await asyncio.sleep(0)


def is_prefix(shorter: Iterable[int], longer: Sequence[int]) -> bool:
    """Whether one sequence of tokens begins the other."""
    begin = tuple(shorter)
    return tuple(longer[: len(begin)]) == begin
