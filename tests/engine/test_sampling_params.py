"""Ranges of sampling parameters: what is outside is refused by the field's name, what is inside is taken."""

from __future__ import annotations

from math import inf, nan

import pytest

from spotjax.engine.request import SamplingParams
from spotjax.errors import InvalidRequest

OUTSIDE = {
    "max_tokens": [0, -1],
    "temperature": [-0.1, 100.1, nan, inf],
    "top_k": [-1],
    "top_p": [0, 1.01, nan],
    "min_p": [-0.1, 1.1, nan],
    "seed": [-1, 2**64],
    "repetition_penalty": [0, 10.1, nan],
    "presence_penalty": [-2.1, 2.1, nan],
    "frequency_penalty": [-2.1, 2.1, nan],
    "logit_bias": [{5: 100.5}, {5: nan}, dict.fromkeys(range(301), 1.0)],
    "logprobs": [-1, 21],
    "stop": [("",), ("a",) * 17],
}
INSIDE = {
    "max_tokens": [1],
    "temperature": [0, 100],
    "top_k": [0, 10**6],
    "top_p": [1e-9, 1],
    "min_p": [0, 1],
    "seed": [0, 2**64 - 1],
    "repetition_penalty": [1e-9, 10],
    "presence_penalty": [-2, 2],
    "frequency_penalty": [-2, 2],
    "logit_bias": [{5: -100, 6: 100}, dict.fromkeys(range(300), 1.0)],
    "logprobs": [None, 0, 20],
    "stop": [(), ("a",) * 16],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field in OUTSIDE for value in OUTSIDE[field]])
def test_a_value_out_of_range_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(InvalidRequest) as refused:
        SamplingParams(**{field: value})
    assert refused.value.field == f"sampling.{field}"


@pytest.mark.parametrize(("field", "value"), [(field, value) for field in INSIDE for value in INSIDE[field]])
def test_the_ends_of_a_range_are_inside(field: str, value: object) -> None:
    assert getattr(SamplingParams(**{field: value}), field) == value


@pytest.mark.parametrize(
    "more",
    [
        {"logprobs": 0}, {"logit_bias": {1: 1.0}}, {"repetition_penalty": 1.1}, {"presence_penalty": 0.1},
        {"frequency_penalty": 0.1}, {"temperature": 0.5},
    ],
    ids=str,
)  # fmt: skip
def test_plain_greedy_is_only_that(more: dict[str, object]) -> None:
    assert SamplingParams(temperature=0).plain_greedy
    assert not SamplingParams(**{"temperature": 0} | more).plain_greedy
