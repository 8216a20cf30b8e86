"""Generation state on disk: what is loaded is what was saved, to the last bit."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spotjax.checkpoint.generation import (
    SavedGeneration,
    generation_of,
    generation_tree,
    load_generation,
    save_generation,
)
from spotjax.engine.commit_log import RecordedRequest
from spotjax.engine.generation import GenerationRequest
from spotjax.engine.request import FinishReason, Logprobs, RequestState, SamplingParams
from spotjax.errors import CheckpointError

ids = st.integers(0, 2**31 - 1)
tokens = st.lists(ids, max_size=6).map(tuple)
counts = st.lists(st.integers(0, 10**6), max_size=6).map(tuple)
numbers = st.floats(max_value=0, allow_nan=False)
logprobs = st.builds(Logprobs, numbers, st.lists(st.tuples(ids, numbers), max_size=3).map(tuple))
sampling = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 10**6),
    temperature=st.floats(0, 100),
    top_k=st.integers(0, 10**5),
    top_p=st.floats(0, 1, exclude_min=True),
    min_p=st.floats(0, 1),
    seed=st.integers(0, 2**64 - 1),
    repetition_penalty=st.floats(0, 10, exclude_min=True),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    logit_bias=st.dictionaries(ids, st.floats(-100, 100), max_size=3),
    logprobs=st.none() | st.integers(0, 20),
    stop=st.lists(st.text(min_size=1), max_size=3).map(tuple),
    stop_token_ids=tokens,
    ignore_eos=st.booleans(),
)


@st.composite
def recorded(draw: st.DrawFn) -> RecordedRequest:
    """A request with its sequences, in any state."""
    prompt = draw(st.lists(ids, min_size=1, max_size=6).map(tuple))
    request = GenerationRequest(draw(st.text()), prompt, draw(sampling), draw(st.integers(1, 3)), draw(st.booleans()))
    end_tokens = draw(st.frozensets(ids, max_size=3))
    states = tuple(
        RequestState(
            request.request_id, choice, request.prompt, request.sampling, end_tokens, draw(tokens),
            draw(st.lists(logprobs, max_size=4).map(tuple)), draw(st.text()), draw(st.text()),
            draw(st.integers(0, 10**6)), draw(counts), draw(st.none() | st.sampled_from(FinishReason)),
        )
        for choice in range(request.n)
    )  # fmt: skip
    return RecordedRequest(request, states, draw(st.integers(0, 2**62)))


everything = st.builds(SavedGeneration, st.text(), st.integers(0, 2**62), st.lists(recorded(), max_size=4).map(tuple))


@given(everything)
def test_what_comes_out_of_the_tree_is_what_went_in(saved: SavedGeneration) -> None:
    assert generation_of(generation_tree(saved)) == saved


@settings(max_examples=10)
@given(everything)
def test_what_is_loaded_is_what_was_saved(tmp_path_factory: pytest.TempPathFactory, saved: SavedGeneration) -> None:
    path = tmp_path_factory.mktemp("generation") / "state"
    save_generation(path, saved.requests, saved.identity, saved.epoch)
    assert load_generation(path) == saved


def test_a_checkpoint_is_never_written_over(tmp_path: Path) -> None:
    save_generation(tmp_path / "state", [], "service", 3)
    with pytest.raises(CheckpointError, match="state"):
        save_generation(tmp_path / "state", [], "service", 4)
    assert load_generation(tmp_path / "state").epoch == 3


def test_what_is_not_there_or_something_else_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="none"):
        load_generation(tmp_path / "none")
    (tmp_path / "other").mkdir()
    with pytest.raises(CheckpointError, match="other"):
        load_generation(tmp_path / "other")


def test_damaged_state_is_refused() -> None:
    tree = generation_tree(SavedGeneration("service", 1, (some_request(),)))
    tree["tokens"] = tree["tokens"] + 1
    with pytest.raises(ValueError):
        generation_of(tree)


def some_request(output: tuple[int, ...] = (7, 8, 9), key: int = 5) -> RecordedRequest:
    request = GenerationRequest("r", (1, 2), SamplingParams(), n=2)
    states = tuple(RequestState("r", choice, request.prompt, request.sampling, tokens=output) for choice in range(2))
    return RecordedRequest(request, states, key)
