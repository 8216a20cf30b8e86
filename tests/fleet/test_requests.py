"""Streams of committed output: taken up at any token they give exactly the rest, to any number of readers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from fleet_cases import Reading
from hypothesis import given
from hypothesis import strategies as st
from pure_model import Bytes, next_token, turns
from recording_log import RecordingLog

from spotjax.engine.generation import Delta, GenerationRequest, Usage
from spotjax.engine.request import FinishReason, RequestState, SamplingParams
from spotjax.engine.sequence import Sequence as ScheduledSequence
from spotjax.engine.text import advance
from spotjax.errors import InvalidRequest, UnknownRequest
from spotjax.fleet.requests import AcceptedRequest, RequestTable

BYTES = Bytes()


class Table(RequestTable):
    """A table, and the hand that commits into it."""

    def __init__(self, retain_seconds: float = 60.0) -> None:
        self.recorder = RecordingLog()
        super().__init__(self.recorder, retain_seconds)
        self.now = 0.0

    def accept(self, name: str, n: int = 1, **sampling: object) -> None:
        request = GenerationRequest(name, (1, 2), SamplingParams(**{"max_tokens": 9, "ignore_eos": True} | sampling), n)
        states = [RequestState(name, choice, request.prompt, request.sampling) for choice in range(n)]
        self.log.accept(request, states, 0)
        self.add(AcceptedRequest(request, tuple(ScheduledSequence(c, state) for c, state in enumerate(states))))

    def step(self, name: str, *choices: int) -> None:
        """One more token for each of these choices, in one step."""
        states = [self.recorder.states(name)[choice] for choice in choices]
        self.commit([advance(s, next_token((*s.prompt, *s.tokens), s), BYTES) for s in states])

    def commit(self, states: Sequence[RequestState]) -> None:
        self.log.append(states, lambda: self.committed(states, self.now))


async def everything(table: Table, name: str, offsets: Sequence[int] = ()) -> list[Delta]:
    return [delta async for delta in table.stream(name, offsets)]


@given(st.lists(st.sampled_from([0, 1, 2]), max_size=30), st.integers(1, 9), st.lists(st.just("x"), max_size=1))
def test_a_stream_taken_up_at_any_token_gives_exactly_the_rest(order: list[int], most: int, stop: list[str]) -> None:
    async def check() -> None:
        table = Table()
        table.accept("r", n=3, max_tokens=most, stop=tuple(stop), logprobs=0)
        for choice in [*order, *[0, 1, 2] * 9]:
            if table.recorder.states("r")[choice].finish is None:
                table.step("r", choice)
        states = table.recorder.states("r")
        for offset in range(most + 1):
            offsets = [min(offset + n, len(state.tokens)) for n, state in enumerate(states)]
            for delta, state, start in zip(await everything(table, "r", offsets), states, offsets, strict=True):
                text_before = state.text_ends[start - 1] if start else 0
                assert (delta.choice, delta.offset) == (state.choice, start)
                assert delta.tokens == state.tokens[start:] and delta.logprobs == state.logprobs[start:]
                assert delta.text == state.text[text_before:]
                assert delta.finish == state.finish
                assert delta.usage == Usage(2, len(state.tokens))

    asyncio.run(check())


async def test_every_reader_sees_everything_however_slow_it_is() -> None:
    table = Table()
    table.accept("r", n=2)

    async def follow(pause: int) -> Reading:
        reading = Reading()
        async for delta in table.stream("r", ()):
            reading.take(delta)
            await turns(pause)
        return reading

    readers = [asyncio.create_task(follow(pause)) for pause in (0, 1, 5, 1000)]
    for _ in range(9):
        table.step("r", 0, 1)
        await turns(3)
    for reader in readers:
        (await reader).check(table.recorder.states("r"))


async def test_a_stream_opened_before_the_first_token_waits_for_it() -> None:
    table = Table()
    table.accept("r", max_tokens=1)
    reading = asyncio.create_task(everything(table, "r"))
    await turns(3)
    assert not reading.done()
    table.step("r", 0)
    (delta,) = await reading
    assert delta.tokens == table.recorder.states("r")[0].tokens and delta.finish is FinishReason.LENGTH


async def test_held_back_text_of_a_cancelled_sequence_is_sent_with_its_end() -> None:
    table = Table()
    table.accept("r", stop=("zz",))
    state = table.recorder.states("r")[0]
    for token in b"az":
        state = advance(state, next_token((), state)._replace(token=token), BYTES)
        table.commit([state])
    stream = table.stream("r", ())
    first = await anext(stream)
    table.commit([state.finished(FinishReason.CANCELLED)])
    last = await anext(stream)
    assert (first.text, last.text, last.tokens, last.finish) == ("a", "z", (), FinishReason.CANCELLED)
    assert [delta async for delta in stream] == []


async def test_figures_count_requests_once_and_cancelled_sequences_without_a_token() -> None:
    table = Table()
    table.accept("both", n=2, max_tokens=1)
    table.accept("cancelled", n=2)
    assert table.running == 2
    table.step("both", 0, 1)
    assert (table.running, table.finished, table.tokens) == (1, 1, 2)
    states = table.recorder.states("cancelled")
    table.commit([state.finished(FinishReason.CANCELLED) for state in states])
    assert (table.running, table.finished, table.tokens) == (0, 2, 2)


@pytest.mark.parametrize("offsets", [(0,), (0, 0, 0), (0, 2), (-1, 0)])
async def test_offsets_that_do_not_fit_are_refused(offsets: tuple[int, ...]) -> None:
    table = Table()
    table.accept("r", n=2)
    table.step("r", 0, 1)
    with pytest.raises(InvalidRequest) as refused:
        table.stream("r", offsets)
    assert refused.value.field == "offsets"


async def test_finished_requests_are_kept_for_as_long_as_was_promised() -> None:
    table = Table(retain_seconds=10)
    table.accept("done", max_tokens=1)
    table.accept("running")
    table.now = 5.0
    table.step("done", 0)
    table.purge(14.9)
    assert len(await everything(table, "done")) == 1
    table.purge(15.0)
    assert "done" not in table and "done" not in table.recorder.recorded
    with pytest.raises(UnknownRequest, match="'done' is not known; finished requests are kept for 10 s"):
        table.stream("done", ())
    table.purge(1e9)
    assert "running" in table


async def test_a_request_is_not_forgotten_while_somebody_reads_it() -> None:
    table = Table(retain_seconds=10)
    table.accept("r", n=2, max_tokens=3)
    table.step("r", 0, 1)
    stream = table.stream("r", ())
    seen = [await anext(stream)]
    for _ in range(2):
        table.step("r", 0, 1)
    table.purge(1000.0)
    seen += [delta async for delta in stream]
    assert [sum(len(delta.tokens) for delta in seen if delta.choice == choice) for choice in (0, 1)] == [3, 3]
    table.purge(1000.0)
    assert "r" not in table


async def test_a_reader_that_leaves_does_not_keep_a_request() -> None:
    table = Table(retain_seconds=10)
    table.accept("r", max_tokens=2)
    table.step("r", 0)
    stream = table.stream("r", ())
    await anext(stream)
    await stream.aclose()
    table.step("r", 0)
    table.purge(1000.0)
    assert "r" not in table


def recalled(table: Table) -> RequestState:
    """A request that the log has from before, without any of its tokens; its state."""
    request = GenerationRequest("r", (1, 2), SamplingParams(max_tokens=4, ignore_eos=True))
    state = RequestState("r", 0, request.prompt, request.sampling)
    table.recall(AcceptedRequest(request, (ScheduledSequence(0, state),)), 0.0)
    return state


async def test_who_has_seen_more_than_there_is_at_the_end_this_time_is_told() -> None:
    table = Table()
    state = recalled(table)
    reading = asyncio.create_task(everything(table, "r", [3]))
    for _ in range(2):
        await turns(3)
        state = advance(state, next_token((*state.prompt, *state.tokens), state), BYTES)
        table.committed([state], 0.0)
    await turns(3)
    assert not reading.done()
    table.committed([state.finished(FinishReason.CANCELLED)], 0.0)
    with pytest.raises(InvalidRequest, match="the choice ended after 2 tokens this time"):
        await reading
    with pytest.raises(InvalidRequest, match=r"\[0, 2\]"):
        table.stream("r", [3])


async def test_a_stream_waits_for_tokens_that_its_client_has_seen_and_the_log_lost() -> None:
    table = Table()
    state = recalled(table)
    with pytest.raises(InvalidRequest, match=r"\[0, 4\]"):
        table.stream("r", [5])
    reading = asyncio.create_task(everything(table, "r", [2]))
    for _ in range(4):
        await turns(3)
        state = advance(state, next_token((*state.prompt, *state.tokens), state), BYTES)
        table.committed([state], 0.0)
    assert [(delta.offset, delta.tokens) for delta in await reading] == [(2, state.tokens[2:3]), (3, state.tokens[3:])]
