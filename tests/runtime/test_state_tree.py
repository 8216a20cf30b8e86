"""Generation state as a pytree."""

from __future__ import annotations

import jax
import numpy as np

from spotjax.engine.request import FinishReason, Logprobs, RequestState, SamplingParams
from spotjax.runtime import state_tree


def some_state() -> RequestState:
    sampling = SamplingParams(max_tokens=5, temperature=0.5, seed=2**40, logit_bias={3: 1.5}, logprobs=1, stop=("x",))
    logprobs = (Logprobs(-0.5, ((4, -0.5),)), Logprobs(-1.0, ((9, -0.25),)))
    return RequestState(
        "r", 1, (1, 2, 3), sampling, frozenset({0}), (4, 5), logprobs, "ab", "c", 2, (1, 2), FinishReason.LENGTH
    )


def test_the_state_survives_a_round_trip_through_its_leaves() -> None:
    leaves, structure = jax.tree.flatten(some_state())
    assert jax.tree.unflatten(structure, leaves) == some_state()
    assert {1, 2, 3, 4, 5} <= set(leaves), "prompt and output tokens are leaves"


def test_every_field_is_either_structure_or_in_the_leaves() -> None:
    paths = {jax.tree_util.keystr(path[:1]) for path, _ in jax.tree_util.tree_leaves_with_path(some_state())}
    fields = {f".{name}" for name in RequestState.__dataclass_fields__}
    assert paths == fields - {f".{name}" for name in state_tree.STATE_STRUCTURE}


def test_leaves_can_become_arrays_and_come_back() -> None:
    arrays = jax.tree.map(np.asarray, some_state())
    assert jax.tree.map(lambda leaf: leaf.item(), arrays) == some_state()
