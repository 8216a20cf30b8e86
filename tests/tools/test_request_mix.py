"""Requests of every kind, and telling outputs apart."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotjax.api.requests import generate_request
from spotjax.api.validation import ServedModel, accepted_request
from spotjax.engine.generation import Delta
from spotjax.engine.request import FinishReason, Logprobs
from spotjax.testing.scripted_service import ByteTokenizer, ScriptedStructures
from spotjax.tools.request_mix import KINDS, Output, difference, mix


def output() -> Output:
    logprobs = [Logprobs(-0.5, ((1, -0.5), (2, -1.0))), Logprobs(-0.7, ((3, -0.7), (4, -2.0)))]
    return Output([[1, 3], [5]], ["ab", "c"], [logprobs, []], [FinishReason.LENGTH, FinishReason.STOP])


@given(seed=st.integers(0, 2**32))
def test_a_mix_is_of_all_kinds_and_the_same_for_the_same_seed(seed: int) -> None:
    requests = mix(seed, len(KINDS) + 2)
    assert requests == mix(seed, len(KINDS) + 2)
    assert {request.name.rpartition("-")[0] for request in requests} == set(KINDS)
    assert len({request.name for request in requests}) == len(requests)


async def test_a_server_takes_every_kind() -> None:
    model = ServedModel("scripted", ByteTokenizer(), 4096, ScriptedStructures())
    for request in mix(3, 2 * len(KINDS)):
        message = generate_request(request.prompt, request.sampling, request.name, n=request.n)
        assert (await accepted_request(message, model)).n == request.n


def test_an_output_is_put_together_from_pieces_in_order() -> None:
    found = Output.empty(1)
    assert found.add(Delta("r", 0, 0, (1, 2), "a")) is None
    assert found.add(Delta("r", 0, 2, (3,), "b", finish=FinishReason.LENGTH)) is None
    assert (found.tokens, found.text, found.finish) == ([[1, 2, 3]], ["ab"], [FinishReason.LENGTH])


@pytest.mark.parametrize("offset", [0, 1, 3])
def test_a_lost_or_repeated_token_is_noticed(offset: int) -> None:
    found = Output.empty(1)
    found.add(Delta("r", 0, 0, (1, 2), "a"))
    assert "lost or came twice" in str(found.add(Delta("r", 0, offset, (3,), "b")))


def test_something_after_the_end_is_noticed() -> None:
    found = Output.empty(1)
    found.add(Delta("r", 0, 0, (1,), "a", finish=FinishReason.STOP))
    assert "after its end" in str(found.add(Delta("r", 0, 1, (2,), "b")))


def test_the_same_output_does_not_differ_and_rounding_is_no_difference() -> None:
    other = output()
    other.logprobs[0][1] = Logprobs(-0.7002, ((3, -0.7002), (4, -2.0001)))
    assert difference(output(), output()) is None and difference(other, output()) is None


def change(edit: Callable[[Output], object]) -> Output:
    changed = copy.deepcopy(output())
    edit(changed)
    return changed


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (change(lambda o: o.tokens[0].pop()), "choice 0 differs from token 1"),
        (change(lambda o: o.tokens[0].append(9)), "choice 0 differs from token 2"),
        (change(lambda o: o.tokens[1].__setitem__(0, 9)), "choice 1 differs from token 0"),
        (change(lambda o: o.text.__setitem__(0, "aB")), "text of choice 0"),
        (change(lambda o: o.finish.__setitem__(1, FinishReason.LENGTH)), "choice 1 ended"),
        (change(lambda o: o.logprobs[0].pop()), "log-probabilities of choice 0"),
        (change(lambda o: o.logprobs[0].__setitem__(0, Logprobs(-0.6, ((1, -0.6), (2, -1.0))))), "log-probabilities"),
    ],
)
def test_every_difference_is_found(found: Output, said: str) -> None:
    assert said in str(difference(found, output()))
