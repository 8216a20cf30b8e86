"""Whatever arrives, is cancelled or comes back late: no token is lost, no position computed twice, nobody starves."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st
from pure_model import END, Letters, Pages, Steps, is_prefix, next_token, undisturbed

from spotjax.engine.batch import Batch, Span, ahead
from spotjax.engine.pages import PageAllocator
from spotjax.engine.request import FinishReason, RequestState, SamplingParams
from spotjax.engine.scheduler import MOST_PREFILLS, Limits, Scheduler
from spotjax.engine.sequence import Sequence
from spotjax.engine.text import advance

LETTERS = Letters()


def sequence(
    key: int,
    prompt: int = 4,
    max_tokens: int = 4,
    ignore_eos: bool = True,
    penalty: float = 0.0,
    *,
    group: int | None = None,
) -> Sequence:
    """The prompts of one group begin alike."""
    tokens = tuple((7 * (key if group is None else group) + position) % END for position in range(prompt))
    sampling = SamplingParams(max_tokens=max_tokens, seed=key, ignore_eos=ignore_eos, presence_penalty=penalty)
    return Sequence(key, RequestState(f"r{key}", 0, tokens, sampling, LETTERS.end_tokens))


def limits(max_batch: int = 8, prefill_tokens: int = 8, depth: int = 1, rows: int = 4) -> Limits:
    return Limits(max_batch, prefill_tokens, depth, lambda lengths: len(lengths) <= rows)


def make_scheduler(pages: int = 40, page_size: int = 4, *, caching: bool = False, **asked: int) -> Scheduler:
    return Scheduler(limits(**asked), PageAllocator(pages, page_size, caching=caching))


def missing_before(sequence: Sequence, span: Span | None) -> int:
    """What a sequence was missing before the span was scheduled, its last, if there is one."""
    if span is None:
        return sequence.missing
    needed = len(sequence.state.prompt) + sequence.state.sampling.max_tokens - 1
    return min(sequence.length - span.samples, needed) - span.start


def tokens_of(one: Sequence) -> tuple[int, ...]:
    return one.state.prompt + one.state.tokens


@dataclass
class Bench:
    """Runs a scheduler by hand and checks everything that must hold at every step."""

    scheduler: Scheduler
    kv: Pages = field(default_factory=dict)
    in_flight: list[Batch] = field(default_factory=list)
    computed: dict[int, int] = field(default_factory=dict)
    ended: dict[int, Sequence] = field(default_factory=dict)
    prefills: int = 0
    ahead: bool = False
    reused: int = 0

    def __post_init__(self) -> None:
        self.steps = Steps(self.scheduler.pages.page_size, self.kv)

    def schedule(self) -> Batch | None:
        scheduler = self.scheduler
        before = dict(scheduler.running)
        idle = [s for s in before.values() if not s.in_flight]
        decodable = any(s.missing == 1 and len(s.pages) >= scheduler.pages.needed(s.state.length) for s in idle)
        states = {s.key: s.state for s in scheduler.sequences()}
        preempted = scheduler.preempted
        first = scheduler.waiting[0] if scheduler.waiting else None
        fits = first is not None and self.fits(first)
        flying = {span.sequence for batch in self.in_flight for span in batch.spans}

        batch = scheduler.schedule(ahead=self.ahead)

        assert {s.key: s.state for s in scheduler.sequences()} == states, "scheduling changes no state and loses nobody"
        running = len(scheduler.running) + scheduler.preempted - preempted
        self.note_preempted(before.keys() - scheduler.running.keys())
        assert sorted(s.key for s in scheduler.waiting) == [s.key for s in scheduler.waiting], (
            "first come, first served"
        )
        assert not fits or first not in scheduler.waiting or scheduler.preempted > preempted, "first in line, and fits"
        scheduler.check()
        self.check_pages_in_flight()
        if batch is None:
            assert self.in_flight or not scheduler.load, "work is left, and nothing is in flight"
            return None
        keys = [span.sequence for span in batch.spans]
        assert len(keys) == len(set(keys)), "a sequence is twice in one step"
        assert self.ahead or flying.isdisjoint(keys), "a sequence is in two steps at once"
        self.check_spans(batch, running)
        is_prefill = len(batch.spans[0].tokens) > 1
        if is_prefill and self.prefills and decodable:
            assert self.prefills < MOST_PREFILLS, "decoding waits too long for prompts"
            assert self.starting(batch), "more wait for a decode step than for prefill steps"
        if not is_prefill and not self.prefills:
            prompts = [s for s in idle if s.key in scheduler.running and not s.in_flight and s.missing > 1]
            assert all(self.is_being_computed(s) for s in prompts), "two decode steps while a prompt waits"
        self.prefills = self.prefills + 1 if is_prefill else 0
        self.in_flight.append(batch)
        return batch

    def starting(self, batch: Batch) -> bool:
        """Whether more sequences were near their next token than decoded, before this prefill step was scheduled."""
        taken = {span.sequence: span for span in batch.spans}
        missing = [missing_before(s, taken.get(s.key)) for s in self.scheduler.running.values()]
        near = sum(1 < length <= self.scheduler.limits.prefill_tokens for length in missing)
        return near > sum(length <= 1 for length in missing)

    def fits(self, waiting: Sequence) -> bool:
        """Whether there is room for a sequence with what is cached of it."""
        pages, most = self.scheduler.pages, self.scheduler.limits.max_batch
        found = self.scheduler.reuse.find(waiting.state)
        revived = sum(page in pages.cache.idle for page in found)  # which are no longer free then
        needed = pages.needed(waiting.state.length) - len(found)
        return len(self.scheduler.running) < most and needed <= pages.free - revived

    def is_being_computed(self, waiting: Sequence) -> bool:
        """Whether the next page of a sequence is just now computed for another one."""
        stop = waiting.computed + self.scheduler.pages.page_size
        return self.scheduler.pages.caching and any(
            s.in_flight and s.begun >= stop and tokens_of(s)[:stop] == tokens_of(waiting)[:stop]
            for s in self.scheduler.running.values()
        )

    def note_preempted(self, preempted: Iterable[int]) -> None:
        for key in preempted:
            assert key > max(self.scheduler.running, default=-1), "the youngest goes first"
            assert next(s for s in self.scheduler.waiting if s.key == key).computed == 0
            self.computed[key] = 0

    def check_spans(self, batch: Batch, running: int) -> None:
        asked = self.scheduler.limits
        lengths = [len(span.tokens) for span in batch.spans]
        if max(lengths) > 1:
            assert min(lengths) > 1 and max(lengths) <= asked.prefill_tokens, "prefill and decode do not mix"
            assert len(lengths) == 1 or asked.prefill_fits(lengths)
        else:
            assert len(lengths) <= min(asked.max_batch, -(-running // asked.depth)), "more than a fair share"
        for span in batch.spans:
            computed = self.computed.get(span.sequence, 0)
            if self.scheduler.pages.caching and span.start > computed:
                self.reused += span.start - computed  # that it is there is checked when it is read
            else:
                assert span.start == computed, "computed twice, or left out"
            self.computed[span.sequence] = span.start + len(span.tokens)
            own = span.state.prompt + span.state.tokens
            if span.start == len(own):
                self.check_runs_ahead(span, batch.follows)
            else:
                assert span.tokens == own[span.start : span.stop]
        assert batch.follows is None or any(span.tokens[0] < 0 for span in batch.spans)

    def check_runs_ahead(self, span: Span, follows: int | None) -> None:
        """Its token is what a step in flight draws in the sequence's row."""
        (before,) = (batch for batch in self.in_flight if batch.step == follows)
        (row,) = (n for n, other in enumerate(before.spans) if span.tokens == (ahead(n),))
        drawing = before.spans[row]
        assert (drawing.sequence, drawing.stop, drawing.samples) == (span.sequence, span.start, True)
        one = self.scheduler.running[span.sequence]
        assert one.cancelled is None and not one.state.sampling.penalised
        assert len(span.state.tokens) + 1 < span.state.sampling.max_tokens, "that it ends there is known ahead"

    def check_pages_in_flight(self) -> None:
        """No page that a step in flight may write belongs to another."""
        scheduler = self.scheduler
        owners: dict[int, list[int]] = {}
        for one in (*scheduler.sequences(), *scheduler.leaving.values()):
            for page in one.pages:
                owners.setdefault(page, []).append(one.key)
        for batch in self.in_flight:
            for span in batch.spans:
                for number, page in enumerate(span.pages):
                    assert span.sequence in owners.get(page, ()), "a page changed hands too early"
                    written = number >= span.start // scheduler.pages.page_size
                    assert not written or owners[page] == [span.sequence], "a page is written that others read"

    def complete(self, which: int = 0) -> None:
        batch = self.in_flight.pop(which)
        sampled, running = self.steps.result_of(batch).sampled, self.scheduler.running
        states = {
            one.key: advance(one.state, sampled[one.key], LETTERS)
            for span in batch.spans
            if span.samples and (one := running.get(span.sequence)) is not None and one.cancelled is None
        }
        for ended in self.scheduler.commit(batch, states):
            assert ended.state.finish is not None and bool(ended.pages) is ended.in_flight
            assert ended.key not in self.ended, "ended twice"
            self.ended[ended.key] = ended
        self.scheduler.check()
        self.check_pages_in_flight()

    def run(self, most: int = 10_000) -> None:
        """Until nothing is left, one step at a time."""
        for _ in range(most):
            if self.schedule() is None and not self.in_flight:
                return
            self.complete()
        raise AssertionError("does not come to an end")


@settings(max_examples=150, deadline=None)
@given(
    max_batch=st.integers(1, 5),
    prefill_tokens=st.integers(2, 9),
    depth=st.integers(1, 3),
    rows=st.integers(1, 3),
    page_size=st.integers(1, 4),
    spare=st.integers(0, 12),
    shapes=st.lists(
        st.tuples(st.integers(1, 14), st.integers(1, 8), st.booleans(), st.sampled_from((0.0, 0.0, 1.0))),
        min_size=1,
        max_size=9,
    ),
    groups=st.sampled_from([None, 1, 2]),
    caching=st.booleans(),
    cancels=st.booleans(),
    ahead=st.booleans(),
    random=st.randoms(use_true_random=False),
)
def test_every_sequence_gets_exactly_its_tokens(
    max_batch: int, prefill_tokens: int, depth: int, rows: int, page_size: int, spare: int,
    shapes: list[tuple[int, int, bool, float]], groups: int | None, caching: bool, cancels: bool, ahead: bool,
    random: Random,
) -> None:  # fmt: skip
    longest = max(prompt + output for prompt, output, *_ in shapes)
    allocator = PageAllocator(1 + -(-longest // page_size) + spare, page_size, caching=caching)
    scheduler = Scheduler(limits(max_batch, prefill_tokens, depth, rows), allocator)
    bench = Bench(scheduler, ahead=ahead)
    all_of_them = [
        sequence(key, *shape, group=None if groups is None else key % groups) for key, shape in enumerate(shapes)
    ]
    arriving = list(reversed(all_of_them))
    expected = {s.key: undisturbed(s.state, LETTERS) for s in all_of_them}
    steps = 0
    while arriving or scheduler.load:
        steps += 1
        assert steps < 5000, "does not come to an end"
        if arriving and (not scheduler.load or random.random() < 0.5):
            scheduler.add(arriving.pop())
        if cancels and random.random() < 0.1 and (present := list(scheduler.sequences())):
            chosen = random.choice(present)
            reason = random.choice((FinishReason.CANCELLED, FinishReason.DEADLINE))
            flying = chosen.in_flight
            assert scheduler.cancel(chosen, reason) is not flying
            scheduler.check()
            if not flying:
                bench.ended[chosen.key] = chosen
        assert max(scheduler.running, default=-1) < min((s.key for s in scheduler.waiting), default=99), "in order"
        while len(bench.in_flight) < depth + ahead and bench.schedule() is not None:
            assert len(scheduler.running) <= max_batch
        if bench.in_flight and random.random() < 0.7:
            bench.complete(0 if ahead else random.randrange(len(bench.in_flight)))
    while bench.in_flight:  # steps for what has ended
        bench.complete()
    assert scheduler.pages.free == scheduler.pages.total, "at rest all pages are free"
    assert bench.reused == scheduler.reuse.positions or scheduler.preempted or cancels, (
        "what is found need not be computed"
    )
    assert bench.ended.keys() == expected.keys()
    for key, ended in bench.ended.items():
        if ended.cancelled is None:
            assert ended.state == expected[key]
        else:
            assert ended.state.finish in (ended.cancelled, expected[key].finish)
            assert is_prefix(ended.state.tokens, expected[key].tokens)


def test_a_sequence_sent_back_for_pages_keeps_its_tokens_and_is_computed_again_from_the_start() -> None:
    scheduler = make_scheduler(pages=5, page_size=4, prefill_tokens=16)
    old, young = sequence(0, prompt=7, max_tokens=8), sequence(1, prompt=6, max_tokens=8)
    bench = Bench(scheduler)
    for one in (old, young):
        scheduler.add(one)
    while not scheduler.preempted:
        bench.schedule()
        bench.complete()
    kept = young.state.tokens
    assert kept and list(scheduler.waiting) == [young]
    assert (young.pages, young.computed) == ([], 0)
    bench.run()
    assert is_prefix(kept, young.state.tokens)
    assert young.state.tokens == undisturbed(sequence(1, 6, 8).state, LETTERS).tokens
    assert old.state.finish is FinishReason.LENGTH


def test_who_is_sent_back_stays_behind_who_came_earlier() -> None:
    """After a handover a young sequence may run while an older one waits."""
    scheduler = make_scheduler(pages=3, page_size=4, prefill_tokens=16)
    bench = Bench(scheduler)
    for key in (0, 2):
        running = sequence(key, prompt=4, max_tokens=2)
        running.state = advance(running.state, next_token(running.state.prompt, running.state), LETTERS)
        running.pages, running.computed = scheduler.pages.allocate(1), 4
        bench.kv |= {(running.pages[0], n): (n, token) for n, token in enumerate(running.state.prompt)}
        bench.computed[key] = 4
        scheduler.adopt(running)
    scheduler.add(sequence(1, prompt=4, max_tokens=1))
    bench.schedule()
    assert [waiting.key for waiting in scheduler.waiting] == [1, 2]
    bench.complete()
    bench.run()
    assert sorted(bench.ended) == [0, 1, 2]


def test_more_adopted_sequences_than_fit_one_step_take_turns() -> None:
    scheduler = make_scheduler(max_batch=2)
    bench = Bench(scheduler)
    for key in range(5):
        running = sequence(key, prompt=2, max_tokens=3)
        running.pages, running.computed = scheduler.pages.allocate(1), 1
        bench.kv[running.pages[0], 0] = (0, running.state.prompt[0])
        bench.computed[key] = 1
        scheduler.adopt(running)
    rows: list[set[int]] = []
    for _ in range(5):
        batch = bench.schedule()
        assert batch is not None
        rows.append({span.sequence for span in batch.spans})
        bench.complete()
    assert rows == [{0, 1}, {2, 3}, {4, 0}, {1, 2}, {3, 4}]
    bench.run()
    assert sorted(bench.ended) == [0, 1, 2, 3, 4]


def test_a_long_prompt_lets_running_sequences_decode_in_between() -> None:
    scheduler = make_scheduler(prefill_tokens=4)
    bench = Bench(scheduler)
    scheduler.add(sequence(0, prompt=2, max_tokens=10))
    bench.schedule()
    bench.complete()
    scheduler.add(sequence(1, prompt=12, max_tokens=1))
    kinds = []
    for _ in range(5):
        batch = bench.schedule()
        assert batch is not None
        kinds.append([(span.sequence, len(span.tokens)) for span in batch.spans])
        bench.complete()
    assert kinds == [[(0, 1)], [(1, 4)], [(0, 1)], [(1, 4)], [(0, 1)]]


def test_many_prompts_at_once_start_before_the_first_of_them_goes_on() -> None:
    scheduler = make_scheduler(max_batch=20, rows=2)
    bench = Bench(scheduler)
    for key in range(20):
        scheduler.add(sequence(key, prompt=4, max_tokens=30))
    kinds = ""
    for _ in range(11):
        batch = bench.schedule()
        assert batch is not None
        kinds += "prefill " if len(batch.spans[0].tokens) > 1 else f"{len(batch.spans)} "
        bench.complete()
    assert kinds == 4 * "prefill " + "8 prefill 10 prefill 12 prefill 14 "


def test_few_prompts_take_turns_with_the_many_that_decode() -> None:
    scheduler = make_scheduler(max_batch=9, rows=1)
    bench = Bench(scheduler)
    for key in range(5):
        scheduler.add(sequence(key, prompt=1, max_tokens=30))
    bench.schedule()
    bench.complete()
    for key in range(5, 9):
        scheduler.add(sequence(key, prompt=4, max_tokens=30))
    lengths = []
    for _ in range(6):
        batch = bench.schedule()
        assert batch is not None
        lengths.append(len(batch.spans[0].tokens))
        bench.complete()
    assert lengths == [4, 1, 4, 1, 4, 1]


def test_short_prompts_share_a_prefill_step() -> None:
    scheduler = make_scheduler(rows=3)
    for key in range(4):
        scheduler.add(sequence(key))
    batch = scheduler.schedule()
    assert batch is not None and [span.sequence for span in batch.spans] == [0, 1, 2]


def test_steps_in_flight_share_the_running_sequences() -> None:
    scheduler = make_scheduler(depth=2, rows=4)
    bench = Bench(scheduler)
    for key in range(4):
        scheduler.add(sequence(key))
    bench.schedule()
    bench.complete()
    first, second = bench.schedule(), bench.schedule()
    assert first is not None and second is not None
    assert [[span.sequence for span in batch.spans] for batch in (first, second)] == [[0, 1], [2, 3]]
    assert bench.schedule() is None


def test_cancelling_what_waits_or_rests_ends_it_at_once() -> None:
    scheduler = make_scheduler(max_batch=1)
    running, waiting = sequence(0), sequence(1)
    scheduler.add(running)
    scheduler.add(waiting)
    batch = scheduler.schedule()
    assert batch is not None
    assert scheduler.cancel(waiting, FinishReason.CANCELLED)
    assert waiting.state.finish is FinishReason.CANCELLED
    scheduler.commit(batch, {0: advance(running.state, next_token(running.state.prompt, running.state), LETTERS)})
    assert scheduler.cancel(running, FinishReason.DEADLINE)
    assert (running.state.finish, len(running.state.tokens)) == (FinishReason.DEADLINE, 1)
    assert scheduler.load == 0 and scheduler.pages.free == scheduler.pages.total


def test_cancelling_what_is_in_flight_ends_it_when_its_step_is_back() -> None:
    scheduler = make_scheduler()
    flying = sequence(0)
    scheduler.add(flying)
    batch = scheduler.schedule()
    assert batch is not None
    assert not scheduler.cancel(flying, FinishReason.CANCELLED)
    assert flying.state.finish is None
    assert scheduler.commit(batch, {}) == [flying]
    assert (flying.state.finish, flying.state.tokens) == (FinishReason.CANCELLED, ())
    assert scheduler.pages.free == scheduler.pages.total


def test_a_step_is_scheduled_before_the_one_that_it_follows_is_back() -> None:
    bench = Bench(make_scheduler(), ahead=True)
    bench.scheduler.add(sequence(0, prompt=4, max_tokens=3))
    bench.scheduler.add(sequence(1, prompt=4, max_tokens=2))
    first, second, third = bench.schedule(), bench.schedule(), bench.schedule()
    assert first is not None and second is not None and third is None, "of two tokens each at most one is unknown"
    assert [span.sequence for span in second.spans] == [0, 1]
    assert [span.tokens for span in second.spans] == [(ahead(0),), (ahead(1),)]
    assert (first.follows, second.follows, second.spans[0].start) == (None, first.step, 4)
    bench.complete()
    third = bench.schedule()
    assert third is not None and [span.sequence for span in third.spans] == [0], "the other ends by length"
    bench.run()
    assert {key: len(one.state.tokens) for key, one in bench.ended.items()} == {0: 3, 1: 2}


def test_what_ends_while_a_later_step_runs_leaves_its_pages_when_that_is_back() -> None:
    scheduler = make_scheduler(pages=3, page_size=4)
    ending, waiting = sequence(0, prompt=4, max_tokens=4), sequence(1, prompt=5, max_tokens=1)
    for one in (ending, waiting):
        scheduler.add(one)
    first, second = scheduler.schedule(ahead=True), scheduler.schedule(ahead=True)
    assert first is not None and second is not None and scheduler.pages.free == 0
    stopped = advance(ending.state, next_token(ending.state.prompt, ending.state), LETTERS).finished(FinishReason.STOP)
    assert scheduler.commit(first, {0: stopped}) == [ending], "it has ended for all others"
    assert not scheduler.running and scheduler.schedule(ahead=True) is None, "its pages may still be written to"
    scheduler.check()
    assert scheduler.commit(second, {}) == [] and ending.state is stopped
    third = scheduler.schedule(ahead=True)
    assert third is not None and third.spans[0].sequence == 1


def test_what_was_cancelled_runs_ahead_no_more_and_ends_with_its_oldest_step() -> None:
    scheduler = make_scheduler()
    flying = sequence(0)
    scheduler.add(flying)
    first = scheduler.schedule(ahead=True)
    assert first is not None and not scheduler.cancel(flying, FinishReason.CANCELLED)
    assert scheduler.schedule(ahead=True) is None
    assert scheduler.commit(first, {}) == [flying] and scheduler.pages.free == scheduler.pages.total


def test_who_must_know_its_tokens_waits_for_them_and_its_chunks_do_not() -> None:
    bench = Bench(make_scheduler(prefill_tokens=4), ahead=True)
    bench.scheduler.add(sequence(0, prompt=8, max_tokens=3, penalty=1.0))
    first, second, third = bench.schedule(), bench.schedule(), bench.schedule()
    assert first is not None and second is not None and third is None
    assert [(span.start, span.samples) for span in (*first.spans, *second.spans)] == [(0, False), (4, True)]
    bench.complete()
    assert bench.schedule() is None
    bench.run()
    assert len(bench.ended[0].state.tokens) == 3


def test_nobody_runs_ahead_while_another_waits_for_its_page() -> None:
    """Else the younger would never be at rest, and the older would never get a page from it."""
    scheduler = make_scheduler(pages=3, page_size=4, prefill_tokens=16)
    old, young = sequence(0, prompt=4, max_tokens=5), sequence(1, prompt=1, max_tokens=8)
    bench = Bench(scheduler, ahead=True)
    for one in (old, young):
        scheduler.add(one)
    for _ in range(20):
        if bench.schedule() is None or len(bench.in_flight) == 2:
            bench.complete()
        if scheduler.preempted:
            break
    assert scheduler.preempted == 1 and [one.key for one in scheduler.waiting] == [1]
    assert len(young.state.tokens) <= 3
    bench.run()
    assert sorted(bench.ended) == [0, 1]


def test_what_never_comes_back_leaves_no_pages_behind() -> None:
    scheduler = make_scheduler()
    ending, going_on = sequence(0, max_tokens=4), sequence(1, max_tokens=4)
    for one in (ending, going_on):
        scheduler.add(one)
    first, second = scheduler.schedule(ahead=True), scheduler.schedule(ahead=True)
    assert first is not None and second is not None
    scheduler.commit(first, {0: ending.state.finished(FinishReason.STOP), 1: going_on.state})
    scheduler.ground()
    scheduler.check()
    assert not scheduler.leaving and not going_on.in_flight
    assert scheduler.pages.total - scheduler.pages.free == len(going_on.pages)
