"""What is written is read back exactly, and nothing that is missing goes unnoticed."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from log_cases import grown, new_request

from spotjax.engine.generation import GenerationRequest
from spotjax.engine.log_records import (
    AcceptedRecord,
    Extent,
    Increment,
    MalformedRecord,
    RecordGap,
    ServiceRecord,
    checksum,
    contiguous,
    decode_accepted,
    decode_increments,
    decode_service,
    encode,
    join,
    state_of,
)
from spotjax.engine.request import FinishReason, Logprobs, RequestState, SamplingParams
from spotjax.engine.structure import Structure, StructureKind

TEXT = st.text(max_size=6)
TOKEN = st.integers(0, 2**31 - 1)
FLOAT = st.floats(allow_nan=False)
LOGPROBS = st.builds(Logprobs, FLOAT, st.lists(st.tuples(TOKEN, FLOAT), max_size=3).map(tuple))
SAMPLING = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 2**40),
    temperature=st.floats(0, 100),
    top_k=st.integers(0, 2**31),
    top_p=st.floats(0, 1, exclude_min=True),
    seed=st.integers(0, 2**64 - 1),
    logit_bias=st.dictionaries(TOKEN, st.floats(-100, 100), max_size=4),
    logprobs=st.none() | st.integers(0, 20),
    stop=st.lists(st.text(min_size=1, max_size=4), max_size=3).map(tuple),
    stop_token_ids=st.lists(TOKEN, max_size=3).map(tuple),
    ignore_eos=st.booleans(),
    structure=st.none() | st.builds(Structure, st.sampled_from(StructureKind), TEXT),
)


@st.composite
def histories(draw: st.DrawFn) -> list[RequestState]:
    """States of one sequence, each an extension of the one before in every field that only grows."""
    prompt = tuple(draw(st.lists(TOKEN, min_size=1, max_size=8)))
    choice, ends = draw(st.integers(0, 127)), draw(st.frozensets(TOKEN, max_size=3))
    states = [RequestState(draw(TEXT), choice, prompt, draw(SAMPLING), ends)]
    for _ in range(draw(st.integers(0, 5))):
        last = states[-1]
        states.append(
            replace(
                last,
                tokens=last.tokens + tuple(draw(st.lists(TOKEN, max_size=3))),
                logprobs=last.logprobs + tuple(draw(st.lists(LOGPROBS, max_size=3))),
                text=last.text + draw(TEXT),
                text_ends=last.text_ends + tuple(draw(st.lists(st.integers(0, 2**40), max_size=3))),
                pending=draw(TEXT),
                decoded=draw(st.integers(0, 2**40)),
                finish=draw(st.none() | st.sampled_from(FinishReason)),
            )
        )
    return states


def increments(states: list[RequestState]) -> list[Increment]:
    """What each state adds to the one before."""
    return [Increment.of(3, after, Extent.of(before)) for before, after in pairwise(states)]


@given(histories(), st.data())
def test_a_sequence_is_its_start_and_its_increments_however_they_are_joined(
    states: list[RequestState], data: st.DataObject
) -> None:
    first = states[0]
    request = GenerationRequest(first.request_id, first.prompt, first.sampling, first.choice + 1)
    accepted = decode_accepted(encode(AcceptedRecord.of(request, [first], 12)))
    assert (accepted.request, accepted.key) == (request, 12)
    parts = [accepted.start[0], *decode_increments(encode(increments(states)))]
    cut = data.draw(st.integers(1, len(parts)))
    parts = [join(parts[:cut]), *([join(parts[cut:])] if parts[cut:] else [])]
    parts = decode_increments(encode(parts))
    assert contiguous(parts) == len(parts)
    assert state_of(accepted, first.choice, join(parts)) == states[-1]


@given(histories())
def test_a_request_can_be_accepted_with_all_that_it_has_so_far(states: list[RequestState]) -> None:
    last = states[-1]
    request = GenerationRequest(last.request_id, last.prompt, last.sampling, last.choice + 1)
    accepted = decode_accepted(encode(AcceptedRecord.of(request, [last], 0)))
    assert state_of(accepted, last.choice, accepted.start[0]) == last


@pytest.mark.parametrize("missing", [1, 2, 3])
def test_a_missing_increment_is_noticed_and_what_is_before_it_is_kept(missing: int) -> None:
    (state,) = new_request("r").states
    states = [state]
    for _ in range(5):
        states.append(grown(states[-1]))
    parts = increments(states)
    del parts[missing]
    assert contiguous(parts) == missing
    with pytest.raises(RecordGap, match=rf"goes on at token {missing + 1}, where token {missing} was to come"):
        join(parts)


def test_text_that_is_missing_without_tokens_is_noticed_too() -> None:
    (state,) = new_request("r").states
    states = [state, replace(state, text="ab"), replace(state, text="abcd"), replace(state, text="abcdef")]
    first, _, last = increments(states)
    assert contiguous([first, last]) == 1


def test_nothing_of_a_sequence_without_its_beginning_is_believed() -> None:
    (state,) = new_request("r").states
    states = [state, grown(state), grown(state, 2)]
    assert contiguous(increments(states)[1:]) == 0
    assert contiguous([]) == 0


def test_a_step_takes_a_few_bytes_for_each_row() -> None:
    (state,) = new_request("r").states
    states = [grown(state, 4_000)] * 64
    step = [Increment.of(1_000, grown(state), Extent.of(state)) for state in states]
    assert len(encode(step)) / 64 < 40


def test_the_service_is_read_back() -> None:
    service = ServiceRecord("identity", "model", 2**40)
    assert decode_service(encode(service)) == service


@pytest.mark.parametrize("decode", [decode_accepted, decode_service, decode_increments])
@given(content=st.binary(max_size=30))
def test_other_bytes_are_an_error_and_nothing_else(decode, content: bytes) -> None:  # type: ignore[no-untyped-def]
    with suppress(MalformedRecord):
        assert encode(decode(content))


def test_a_checksum_holds_for_one_row_only() -> None:
    assert checksum(1, b"content") != checksum(2, b"content") != checksum(2, b"contents")


def test_a_request_from_before_there_were_structures_has_none() -> None:
    request = GenerationRequest("r", (1,), SamplingParams(seed=3, structure=Structure(StructureKind.REGEX, "a")))
    record = AcceptedRecord.of(request, [RequestState("r", 0, (1,), request.sampling)], 0)
    written = msgspec.msgpack.decode(encode(record))
    del written[0]["sampling"]["structure"]
    older = decode_accepted(msgspec.msgpack.encode(written))
    assert older.request == replace(request, sampling=replace(request.sampling, structure=None))
