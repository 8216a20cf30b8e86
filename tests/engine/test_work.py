"""What schedulers say they have done is what their batches show."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from spotjax.engine.observer import Work
from spotjax.engine.pages import PageAllocator
from spotjax.engine.request import FinishReason, RequestState, SamplingParams
from spotjax.engine.scheduler import Limits, Scheduler
from spotjax.engine.sequence import Sequence

SHAPES = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 10)), min_size=1, max_size=6)
"""Tokens of prompts and outputs."""


def with_token(state: RequestState) -> RequestState:
    tokens = (*state.tokens, len(state.tokens) % 7)
    finish = FinishReason.LENGTH if len(tokens) == state.sampling.max_tokens else None
    return replace(state, tokens=tokens, finish=finish)


@given(SHAPES, st.integers(0, 4), st.booleans())
def test_positions_that_are_computed_again_are_counted_and_no_others(
    shapes: list[tuple[int, int]], spare: int, caching: bool
) -> None:
    longest = max(-(-(prompt + output) // 4) for prompt, output in shapes)
    allocator = PageAllocator(1 + longest + spare, 4, caching=caching)
    scheduler = Scheduler(Limits(4, 8, 1, lambda lengths: len(lengths) <= 2), allocator)
    for key, (prompt, output) in enumerate(shapes):
        state = RequestState(f"r{key}", 0, tuple(range(prompt)), SamplingParams(max_tokens=output))
        scheduler.add(Sequence(key, state))
    reached, entries = Counter[int](), Counter[int]()
    prefilled = again = queried = 0
    while scheduler.load:
        batch = scheduler.schedule()
        for sequence in scheduler.entered:
            entries[sequence.key] += 1
            queried += sequence.state.length
        assert batch is not None
        states = {}
        for span in batch.spans:
            again += max(0, min(span.stop, reached[span.sequence]) - span.start)
            reached[span.sequence] = max(reached[span.sequence], span.stop)
            prefilled += len(span.tokens) if len(span.tokens) > 1 else 0
            if span.samples:
                states[span.sequence] = with_token(span.state)
        scheduler.commit(batch, states)
    work = scheduler.work
    assert work == Work(prefilled, queried if caching else 0, scheduler.reuse.positions, again, scheduler.preempted)
    assert entries.total() == len(shapes) + scheduler.preempted, "who lost its place is let in again"
    assert not again or scheduler.preempted
    assert work.reused <= work.queried


def test_work_adds_up() -> None:
    assert Work(1, 2, 3, 4, 5) + Work(10, 20, 30, 40, 50) == Work(11, 22, 33, 44, 55)
