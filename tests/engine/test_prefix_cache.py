"""Sequences that begin alike share pages, the pages of the past go oldest first, and nobody is told of wrong ones."""

from __future__ import annotations

from collections.abc import Sequence as Several
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_scheduler import Bench, make_scheduler, sequence, tokens_of

from spotjax.engine.pages import PageAllocator
from spotjax.engine.prefix_cache import ROOT
from spotjax.engine.request import FinishReason, RequestState
from spotjax.engine.sequence import Sequence


def filled(allocator: PageAllocator, tokens: Several[int]) -> list[int]:
    """Pages that hold these tokens, whole pages of them, known as far as no others have the same; still referred to."""
    size, before = allocator.page_size, ROOT
    pages = allocator.allocate(len(tokens) // size)
    for number, page in enumerate(pages):
        if not allocator.remember(before, tuple(tokens[number * size : (number + 1) * size]), page):
            break
        before = page
    return pages


def found(allocator: PageAllocator, tokens: Several[int]) -> list[int]:
    return allocator.cache.match(tuple(tokens), allocator.page_size, len(tokens) // allocator.page_size)


@given(st.integers(0, 2**32))
def test_what_is_found_is_what_was_filled_with_the_same_tokens(seed: int) -> None:
    """Against a plain record of what was last put into each page, for prompts over two tokens."""
    random = Random(seed)
    allocator, size = PageAllocator(random.randint(5, 14), 2, caching=True), 2
    content: dict[int, tuple[int, ...]] = {}
    running: list[list[int]] = []
    for _ in range(60):
        tokens = [random.randrange(2) for _ in range(random.randint(2, 8))]
        if running and random.random() < 0.5:
            allocator.release(running.pop(random.randrange(len(running))))
        else:
            shared = found(allocator, tokens)
            for number, page in enumerate(shared):
                assert content[page] == tuple(tokens[: (number + 1) * size]), "KV of other tokens"
            allocator.share(shared)
            more = len(tokens) // size - len(shared)
            if more > allocator.free:
                allocator.release(shared)
                continue
            own, before, known = allocator.allocate(more), shared[-1] if shared else ROOT, True
            for number, page in enumerate(own, len(shared)):
                content[page] = tuple(tokens[: (number + 1) * size])
                known = known and allocator.remember(before, content[page][-size:], page)
                before = page
            running.append(shared + own)
        allocator.check(running)
        assert allocator.free + len({page for pages in running for page in pages}) == allocator.total


def test_the_pages_that_were_used_last_stay_longest_and_the_ends_of_prompts_go_first() -> None:
    allocator = PageAllocator(7, 1, caching=True)
    old, new = filled(allocator, [1, 2, 3]), filled(allocator, [4, 5, 6])
    allocator.release(old)
    allocator.release(new)
    allocator.share(found(allocator, [1, 2]))
    assert allocator.free == 4
    first = allocator.allocate(2)
    assert first == [old[2], new[2]], "what nobody has used since, ends first"
    allocator.release(old[:2])
    allocator.allocate(2)
    assert found(allocator, [4, 5, 6]) == [] and found(allocator, [1, 2, 3]) == old[:2]


def test_a_page_in_use_is_never_given_to_another() -> None:
    allocator = PageAllocator(4, 1, caching=True)
    first = filled(allocator, [1, 2])
    allocator.share(first)
    allocator.release(first)
    with pytest.raises(ValueError, match="2 pages asked for, 1 free"):
        allocator.allocate(2)
    assert found(allocator, [1, 2]) == first


def test_two_pages_of_the_same_tokens_are_not_taken_for_each_other() -> None:
    allocator = PageAllocator(9, 1, caching=True)
    first, second = filled(allocator, [1, 2, 3]), filled(allocator, [1, 2, 4])
    assert found(allocator, [1, 2, 4]) == first[:2]
    allocator.release(second)
    assert allocator.free == 5 and not set(second) & set(allocator.cache.idle), "they were nobody's to find"
    allocator.check([first])


def test_what_is_free_or_does_not_exist_cannot_be_shared() -> None:
    allocator = PageAllocator(4, 1, caching=True)
    with pytest.raises(ValueError, match="page 2 is to be shared but holds nothing"):
        allocator.share([2])


def test_a_page_that_was_given_away_again_has_another_life() -> None:
    allocator = PageAllocator(3, 1, caching=True)
    (page,) = filled(allocator, [1])
    before = allocator.life(page)
    allocator.release([page])
    allocator.share([page])
    assert allocator.life(page) == before, "it was kept"
    allocator.release([page])
    allocator.allocate(2)
    assert allocator.life(page) == before + 1


# --- in the scheduler -----------------------------------------------------------------------------------------------


def run(bench: Bench, *sequences: Sequence) -> list[list[tuple[int, int, int]]]:
    """Runs them to their end, steps being (key, first position, length) of each span."""
    steps = []
    for one in sequences:
        bench.scheduler.add(one)
    while (batch := bench.schedule()) is not None:
        steps.append([(span.sequence, span.start, len(span.tokens)) for span in batch.spans])
        bench.complete()
    return steps


def test_a_prompt_that_was_there_before_is_computed_from_its_last_page_on() -> None:
    bench = Bench(make_scheduler(caching=True, prefill_tokens=16))
    run(bench, sequence(0, prompt=10, max_tokens=1, group=0))
    assert run(bench, sequence(1, prompt=10, max_tokens=1, group=0)) == [[(1, 8, 2)]]
    assert (bench.scheduler.reuse.positions, bench.scheduler.prefilled) == (8, 12)


def test_one_position_is_left_to_be_computed() -> None:
    bench = Bench(make_scheduler(caching=True, prefill_tokens=16))
    run(bench, sequence(0, prompt=8, max_tokens=1, group=0))
    assert run(bench, sequence(1, prompt=8, max_tokens=1, group=0)) == [[(1, 4, 4)]]
    assert run(bench, sequence(2, prompt=9, max_tokens=1, group=0)) == [[(2, 8, 1)]]


def test_the_output_of_one_turn_is_found_by_the_next() -> None:
    bench = Bench(make_scheduler(caching=True, prefill_tokens=16))
    first = sequence(0, prompt=6, max_tokens=8)
    run(bench, first)
    second = sequence(1, prompt=20)
    prompt = tokens_of(first) + second.state.prompt[:3]
    second.state = type(second.state)("r1", 0, prompt, second.state.sampling)
    bench.scheduler.add(second)
    batch = bench.schedule()
    assert batch is not None and batch.spans[0].start == 12, "all of its 13 positions that fill pages"


def test_choices_of_one_prompt_compute_it_once() -> None:
    bench = Bench(make_scheduler(caching=True, prefill_tokens=16))
    steps = run(bench, *(sequence(key, prompt=10, max_tokens=1, group=0) for key in range(3)))
    assert steps == [[(0, 0, 10)], [(1, 8, 2), (2, 8, 2)]]
    assert bench.scheduler.pages.free == bench.scheduler.pages.total


def test_long_prompts_that_begin_alike_take_turns_and_each_goes_on_where_the_other_was() -> None:
    bench = Bench(make_scheduler(caching=True, prefill_tokens=8))
    steps = run(bench, *(sequence(key, prompt=21, max_tokens=1, group=0) for key in range(2)))
    assert sum(length for step in steps for _, _, length in step) == 20 + 2, "all but the last is computed once"


def test_who_waits_for_another_goes_on_when_that_is_cancelled() -> None:
    bench = Bench(make_scheduler(caching=True, prefill_tokens=8))
    first, second = (sequence(key, prompt=12, max_tokens=1, group=0) for key in range(2))
    for one in (first, second):
        bench.scheduler.add(one)
    batch = bench.schedule()
    assert batch is not None and [span.sequence for span in batch.spans] == [0]
    assert bench.schedule() is None, "the other waits for the same pages"
    bench.scheduler.cancel(first, FinishReason.CANCELLED)
    bench.complete()
    bench.run()
    assert bench.ended[1].state.finish is FinishReason.LENGTH and bench.reused == 8


def test_who_was_sent_back_finds_what_is_still_there() -> None:
    scheduler = make_scheduler(pages=8, page_size=4, prefill_tokens=16, caching=True)
    bench = Bench(scheduler)
    for key in range(2):
        scheduler.add(sequence(key, prompt=9, max_tokens=10))
    bench.run()
    assert scheduler.preempted and scheduler.reuse.positions
    assert sorted(bench.ended) == [0, 1]


def test_who_does_not_fit_is_looked_up_again_only_when_pages_came_free_or_were_cached(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scheduler = make_scheduler(pages=15, page_size=4, prefill_tokens=16, caching=True)
    bench, lookups = Bench(scheduler), list[RequestState]()
    find = scheduler.reuse.find
    monkeypatch.setattr(scheduler.reuse, "find", lambda state: lookups.append(state) or find(state))
    scheduler.add(sequence(0, prompt=9, max_tokens=32, ignore_eos=True))
    scheduler.add(waiting := sequence(1, prompt=48, max_tokens=1))
    steps = 0
    while waiting in scheduler.waiting:
        batch = scheduler.schedule()
        assert batch is not None
        bench.in_flight.append(batch)
        bench.complete()
        steps += 1
    pages_filled = (9 + 32) // 4
    assert steps > 30
    assert sum(state.request_id == "r1" for state in lookups) <= pages_filled + 2


def test_nothing_is_cached_unless_it_is_wanted() -> None:
    bench = Bench(make_scheduler(prefill_tokens=16))
    run(bench, sequence(0, prompt=10, max_tokens=1, group=0))
    assert run(bench, sequence(1, prompt=10, max_tokens=1, group=0)) == [[(1, 0, 10)]]
    assert bench.scheduler.reuse.positions == 0 and not bench.scheduler.pages.cache.idle


def test_after_a_move_that_was_cut_off_nothing_of_the_past_is_found_and_who_lost_is_computed_again() -> None:
    """Sequence 0 keeps its KV, 1 shares pages with it and loses its own, 2 has ended and is only remembered."""
    bench = Bench(make_scheduler(caching=True, prefill_tokens=16))
    run(bench, sequence(2, prompt=10, max_tokens=1))
    scheduler = bench.scheduler
    kept, lost = (sequence(key, prompt=10, max_tokens=6, group=0) for key in range(2))
    for one in (kept, lost):
        scheduler.add(one)
    while not lost.state.tokens:
        bench.schedule()
        bench.complete()
    assert set(kept.pages) & set(lost.pages) and scheduler.pages.cache.idle
    pages, computed = list(kept.pages), kept.computed
    scheduler.forget({1})
    scheduler.check()
    assert (kept.pages, kept.computed) == (pages, computed) and [*scheduler.running] == [0]
    assert (lost.pages, lost.computed) == ([], 0) and [*scheduler.waiting] == [lost]
    assert scheduler.reuse.find(sequence(3, prompt=10, group=2).state) == []
    assert scheduler.pages.total - scheduler.pages.free == len(pages)
