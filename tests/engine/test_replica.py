"""The loop of a replica commits before it delivers, stops at token boundaries and drops what a lost instance did."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from itertools import pairwise
from random import Random

import numpy as np
import pytest
from pure_model import VOCAB, Letters, PurePipeline, turns, undisturbed
from recording_log import RecordingLog
from steps_guide import RisingGuide, rising

from spotjax.engine.batch import Batch, StepResult
from spotjax.engine.generation import GenerationRequest
from spotjax.engine.pages import PageAllocator
from spotjax.engine.replica import Replica
from spotjax.engine.request import FinishReason, RequestState, Sampled, SamplingParams
from spotjax.engine.scheduler import Limits, Scheduler
from spotjax.engine.sequence import Sequence as ScheduledSequence
from spotjax.engine.structure import Structure

LETTERS = Letters()
PAGE_SIZE = 4


class Service:
    """One replica and what became of its sequences."""

    def __init__(self, pipeline: PurePipeline, max_batch: int = 4, log: RecordingLog | None = None) -> None:
        limits = Limits(max_batch, 8, pipeline.depth, lambda lengths: len(lengths) <= 2)
        self.scheduler = Scheduler(limits, PageAllocator(30, PAGE_SIZE))
        self.log = log or RecordingLog()
        self.delivered: list[RequestState] = []
        self.pipeline = pipeline
        self.replica = Replica(self.scheduler, pipeline, self.log, LETTERS, self.deliver)
        self.all_ended = asyncio.Event()
        self.unfinished = 0

    def deliver(self, states: Sequence[RequestState]) -> None:
        for state in states:
            assert self.log.states(state.request_id)[state.choice] == state, "delivered before it was committed"
            self.delivered.append(state)
            self.unfinished -= state.finish is not None
        if not self.unfinished:
            self.all_ended.set()

    def submit(self, key: int, prompt: int = 5, max_tokens: int = 6) -> ScheduledSequence:
        sampling = SamplingParams(max_tokens=max_tokens, seed=key, ignore_eos=True)
        request = GenerationRequest(f"r{key}", tuple(range(key, key + prompt)), sampling)
        sequence = ScheduledSequence(key, RequestState(request.request_id, 0, request.prompt, sampling))
        self.log.accept(request, [sequence.state], key)
        self.scheduler.add(sequence)
        self.unfinished += 1
        self.replica.wake()
        return sequence

    def tokens(self, key: int) -> tuple[int, ...]:
        return self.log.states(f"r{key}")[0].tokens


@pytest.mark.parametrize("depth", [1, 2, 3])
async def test_every_token_is_committed_then_delivered_whatever_order_steps_come_back_in(depth: int) -> None:
    random = Random(depth)
    log = RecordingLog(lambda: random.choice((0, 1, 2, 9)))
    service = Service(PurePipeline(PAGE_SIZE, depth, lambda: random.randrange(5)), log=log)
    loop = asyncio.create_task(service.replica.run())
    sequences = [service.submit(key, max_tokens=2 + key) for key in range(7)]
    await service.all_ended.wait()
    service.replica.stop()
    await loop
    for key, sequence in enumerate(sequences):
        end = undisturbed(RequestState(f"r{key}", 0, sequence.state.prompt, sequence.state.sampling), LETTERS)
        assert service.log.states(f"r{key}") == (end,)
        mine = [state.tokens for state in service.delivered if state.request_id == f"r{key}"]
        assert mine == [end.tokens[: n + 1] for n in range(len(end.tokens))], "each token once, in order"
    assert service.scheduler.pages.free == service.scheduler.pages.total


async def test_as_many_steps_are_in_flight_as_the_pipeline_has_stages() -> None:
    service = Service(PurePipeline(PAGE_SIZE, depth=3, delay=lambda: 50, ahead=False))
    for key in range(3):
        service.submit(key, prompt=1)
    loop = asyncio.create_task(service.replica.run())
    await turns(5)
    assert service.pipeline.in_flight == [0, 1, 2] and len(service.pipeline.batches) == 3
    service.replica.stop()
    await loop


async def test_an_arrival_does_not_wait_for_a_step_while_there_is_room_for_another() -> None:
    service = Service(PurePipeline(PAGE_SIZE, depth=2, delay=lambda: 50, ahead=False))
    service.submit(0, prompt=1)
    loop = asyncio.create_task(service.replica.run())
    await turns(5)
    assert service.pipeline.in_flight == [0]
    service.submit(1, prompt=1)
    await turns(5)
    assert service.pipeline.in_flight == [0, 1]
    service.replica.stop()
    await loop


@pytest.mark.parametrize("ahead", [False, True])
async def test_stopping_commits_the_steps_in_flight_and_starts_no_other(ahead: bool) -> None:
    service = Service(PurePipeline(PAGE_SIZE, delay=lambda: 3, ahead=ahead))
    sequence = service.submit(0)
    loop = asyncio.create_task(service.replica.run())
    await turns(2)
    assert service.pipeline.in_flight == [0] * (1 + ahead)
    service.replica.stop()
    await loop
    assert (service.tokens(0), sequence.in_flight) == (sequence.state.tokens, False)
    assert len(service.tokens(0)) == len(service.pipeline.batches) == 1 + ahead
    assert service.replica.stopping and not service.replica.lost
    service.scheduler.check()


async def test_an_idle_replica_stops_at_once() -> None:
    service = Service(PurePipeline(PAGE_SIZE))
    loop = asyncio.create_task(service.replica.run())
    await turns(1)
    service.replica.stop()
    await loop


async def test_a_lost_instance_ends_the_loop_and_nothing_of_its_steps_is_committed() -> None:
    service = Service(PurePipeline(PAGE_SIZE, depth=2, delay=lambda: 4))
    for key in range(2):
        service.submit(key, prompt=1)
    loop = asyncio.create_task(service.replica.run())
    await turns(3)
    service.pipeline.lost = True
    await loop
    assert service.replica.lost and service.replica.stopping
    assert not service.delivered and service.tokens(0) == service.tokens(1) == ()
    assert all(sequence.in_flight for sequence in service.scheduler.sequences())


async def test_the_next_step_runs_while_the_last_one_is_committed() -> None:
    service = Service(PurePipeline(PAGE_SIZE, delay=lambda: 3))
    in_flight: list[list[int]] = []
    append = service.log.append

    def noted(states: Sequence[RequestState], then: Callable[[], None]) -> None:
        in_flight.append(list(service.pipeline.in_flight))
        append(states, then)

    service.log.append = noted  # type: ignore[method-assign]
    service.submit(0, max_tokens=5)
    loop = asyncio.create_task(service.replica.run())
    await service.all_ended.wait()
    assert in_flight == [[0]] * 4 + [[]]
    service.replica.stop()
    await loop


async def test_a_loss_drops_the_steps_that_follow_too() -> None:
    service = Service(PurePipeline(PAGE_SIZE, delay=lambda: 4))
    sequence = service.submit(0, prompt=1)
    loop = asyncio.create_task(service.replica.run())
    while not service.tokens(0):
        await turns(1)
    service.pipeline.lost = True
    await loop
    assert service.replica.lost and len(service.tokens(0)) == len(sequence.state.tokens) == 1
    assert sequence.computed == 1 and not service.pipeline.in_flight


async def test_a_step_takes_as_long_as_it_had_the_pipeline_for_itself() -> None:
    now = [0.0]

    class Timed(PurePipeline):
        async def run(self, batch: Batch) -> StepResult:
            result = await super().run(batch)
            now[0] += 0.1
            return result

    service = Service(Timed(PAGE_SIZE))
    service.replica = Replica(
        service.scheduler, service.pipeline, service.log, LETTERS, service.deliver, lambda: now[0]
    )
    service.submit(0, max_tokens=20)
    loop = asyncio.create_task(service.replica.run())
    await service.all_ended.wait()
    assert service.replica.step_times.typical == pytest.approx(0.1, rel=0.05)
    assert service.replica.step_times.longest == pytest.approx(0.2, rel=0.1), "two steps until nothing is in flight"
    service.replica.stop()
    await loop


class Failing(PurePipeline):
    async def run(self, batch: Batch) -> StepResult:
        raise ZeroDivisionError("a bug")


async def test_any_other_error_surfaces() -> None:
    service = Service(Failing(PAGE_SIZE))
    service.submit(0)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        await service.replica.run()
    assert not service.replica.lost and not service.delivered


async def test_cancelled_in_flight_ends_with_its_step_and_without_its_token() -> None:
    service = Service(PurePipeline(PAGE_SIZE, delay=lambda: 3))
    flying, other = service.submit(0), service.submit(1)
    loop = asyncio.create_task(service.replica.run())
    await turns(2)
    assert not service.scheduler.cancel(flying, FinishReason.CANCELLED)
    await service.all_ended.wait()
    assert (flying.state.finish, flying.state.tokens) == (FinishReason.CANCELLED, ())
    assert service.log.states("r0") == (flying.state,)
    assert len(other.state.tokens) == 6
    assert service.scheduler.pages.free == service.scheduler.pages.total
    service.replica.stop()
    await loop


async def test_steps_do_not_wait_for_the_log_and_nothing_is_told_before_it_is_recorded() -> None:
    service = Service(PurePipeline(PAGE_SIZE))
    service.submit(0)
    service.log.full = True
    loop = asyncio.create_task(service.replica.run())
    while service.scheduler.running or service.scheduler.waiting:
        await asyncio.sleep(0)
    assert not service.delivered and service.tokens(0) == ()
    assert service.scheduler.pages.free == service.scheduler.pages.total, "whose pages others may have meanwhile"
    service.log.full = False
    await service.all_ended.wait()
    assert [len(state.tokens) for state in service.delivered] == [1, 2, 3, 4, 5, 6]
    service.replica.stop()
    await loop


async def test_a_step_is_recorded_as_a_whole_with_those_who_were_cancelled_in_it() -> None:
    service = Service(PurePipeline(PAGE_SIZE, delay=lambda: 3))
    recorded: list[list[tuple[str, FinishReason | None]]] = []
    append = service.log.append

    def noted(states: Sequence[RequestState], then: Callable[[], None]) -> None:
        recorded.append([(state.request_id, state.finish) for state in states])
        append(states, then)

    service.log.append = noted  # type: ignore[method-assign]
    flying, _ = service.submit(0, prompt=1), service.submit(1, prompt=1, max_tokens=1)
    loop = asyncio.create_task(service.replica.run())
    await turns(2)
    service.scheduler.cancel(flying, FinishReason.DEADLINE)
    await service.all_ended.wait()
    assert recorded == [[("r1", FinishReason.LENGTH), ("r0", FinishReason.DEADLINE)]]
    service.replica.stop()
    await loop


class RisingPipeline(PurePipeline):
    """Draws, of the tokens that a mask allows, the one that the pure model would have drawn or the next above it."""

    async def run(self, batch: Batch) -> StepResult:
        """See ``Pipeline.run``."""
        result = await super().run(batch)
        masks = await asyncio.wrap_future(batch.masks) if batch.masks is not None else None
        sampled = dict(result.sampled)
        for place, row in enumerate(masks.rows if masks is not None else ()):
            assert masks is not None
            bits = np.unpackbits(masks.words[place].view(np.uint8), bitorder="little")
            key = batch.spans[row].sequence
            drawn = sampled[key].token
            sampled[key] = Sampled(min(np.flatnonzero(bits).tolist(), key=lambda token: (token < drawn, token)))
        return StepResult(batch.step, sampled)


def bound(service: Service, key: int, structure: Structure, **sampling: object) -> ScheduledSequence:
    """Submits a request with a structure."""
    params = SamplingParams(**{"max_tokens": 12, "seed": key, "ignore_eos": True, "structure": structure, **sampling})
    request = GenerationRequest(f"r{key}", tuple(range(key, key + 5)), params)
    sequence = ScheduledSequence(key, RequestState(request.request_id, 0, request.prompt, params))
    service.log.accept(request, [sequence.state], key)
    service.scheduler.add(sequence)
    service.unfinished += 1
    service.replica.wake()
    return sequence


def guided(pipeline: PurePipeline) -> tuple[Service, RisingGuide]:
    service, guide = Service(pipeline), RisingGuide(VOCAB)
    service.replica._guide = guide
    return service, guide


async def test_a_sequence_keeps_to_its_structure_and_ends_with_it_while_others_run_ahead() -> None:
    service, guide = guided(RisingPipeline(PAGE_SIZE))
    loop = asyncio.create_task(service.replica.run())
    inside = bound(service, 1, rising(4, 7))
    cut = bound(service, 2, rising(4, 7), max_tokens=3)
    free = service.submit(3, max_tokens=9)
    async with asyncio.timeout(20):
        await service.all_ended.wait()
    service.replica.stop()
    await loop
    assert (len(inside.state.tokens), inside.state.finish) == (7, FinishReason.STOP)
    assert inside.matcher is None, "what has ended is kept for a while, its matcher is not"
    assert all((b - a) % VOCAB in (1, 2, 3, 4) for a, b in pairwise(inside.state.tokens))
    assert (len(cut.state.tokens), cut.state.finish) == (3, FinishReason.LENGTH)
    assert free.state == undisturbed(RequestState("r3", 0, free.state.prompt, free.state.sampling), LETTERS)
    mine = [tokens for tokens in guide.asked if tokens == inside.state.tokens[: len(tokens)] and tokens]
    assert [len(tokens) for tokens in mine] == list(range(1, 7)), "one mask for each token, none ahead of what is known"
    ahead = {span.sequence for batch in service.pipeline.batches for span in batch.spans if span.tokens[0] < 0}
    assert ahead == {3}


async def test_a_sequence_whose_mask_cannot_be_told_ends_alone_and_what_it_drew_is_dropped() -> None:
    service, guide = guided(RisingPipeline(PAGE_SIZE))
    guide.fails_at = 2
    loop = asyncio.create_task(service.replica.run())
    failing, other = bound(service, 1, rising(4, 7)), service.submit(2)
    async with asyncio.timeout(20):
        await service.all_ended.wait()
    service.replica.stop()
    await loop
    assert (len(failing.state.tokens), failing.state.finish) == (2, FinishReason.ERROR)
    assert service.log.states("r1")[0] == failing.state and other.state.finish is FinishReason.LENGTH


async def test_a_token_outside_the_structure_is_never_committed(caplog: pytest.LogCaptureFixture) -> None:
    service, _ = guided(PurePipeline(PAGE_SIZE))  # which knows nothing of masks
    loop = asyncio.create_task(service.replica.run())
    sequence = bound(service, 1, rising(1, 7))
    async with asyncio.timeout(20):
        await service.all_ended.wait()
    service.replica.stop()
    await loop
    assert sequence.state.finish is FinishReason.ERROR and len(sequence.state.tokens) < 2
    assert "request r1: its structure cannot be followed" in caplog.text
