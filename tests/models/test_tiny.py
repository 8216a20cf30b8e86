"""The shipped model: complete, small, readable by others, and as good as its card says."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from spotjax.models import catalog
from spotjax.models.catalog import Model, open_model
from spotjax.models.decoder import Decoder

Logits = Callable[[Sequence[int]], NDArray[np.float32]]

DIRECTORY = Path(catalog.__file__).parent / "tiny"
WEIGHTS = "model.safetensors"
SETTINGS = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
# From the held-out part of Hamlet: the model was never trained on it.
HELD_OUT = """\
Hor.
Is't possible?

Ham.
Here's the commission: read it at more leisure.
But wilt thou bear me how I did proceed?

Hor.
I beseech you.

Ham.
Being thus benetted round with villanies,--
Or I could make a prologue to my brains,
They had begun the play,--I sat me down;
Devis'd a new commission; wrote it fair:
I once did hold it, as our statists do,
A baseness to write fair, and labour'd much
How to forget that learning; but, sir, now
It did me yeoman's service. Wilt thou know
The effect of what I wrote?

Hor.
Ay, good my lord.
"""
LONGEST = 320
"""Tokens of the longest text below."""

PROMPT = "HAMLET.\n"
GREEDY = [
    41,
    469,
    259,
    1506,
    297,
    334,
    296,
    369,
    894,
    199,
    419,
    309,
    259,
    1506,
    297,
    259,
    647,
    281,
    34,
    783,
    608,
    1977,
    260,
    41,
    469,
    259,
    1506,
    297,
    334,
    12,
    296,
    369,
]


@pytest.fixture(scope="module")
def model() -> Model:
    return open_model("tiny")


@pytest.fixture(scope="module")
def logits(model: Model) -> Logits:
    """What the reference decoder computes from the shipped weights: tokens to (T, V) logits."""
    spec = model.checkpoint.spec
    shapes = {array.name: array.shape for array in spec.parameters}
    llama = Decoder(spec.config, rngs=nnx.Rngs(0))
    for path, parameter in nnx.to_flat_state(nnx.state(llama)):
        name = ".".join(map(str, path))
        parameter[...] = jnp.asarray(model.checkpoint.read(name, tuple((0, extent) for extent in shapes.pop(name))))
    assert not shapes
    graph, state = nnx.split(llama)
    compute = jax.jit(lambda tokens: nnx.merge(graph, state)(tokens))

    def padded(tokens: Sequence[int]) -> NDArray[np.float32]:
        """Padded to one length, so that it compiles once."""
        assert len(tokens) <= LONGEST
        batch = np.zeros((1, LONGEST), np.int32)
        batch[0, : len(tokens)] = tokens
        return np.asarray(compute(jnp.asarray(batch)))[0, : len(tokens)]

    return padded


@pytest.fixture(scope="module")
def bits(model: Model, logits: Logits) -> Callable[[str], float]:
    """What a text costs the model, in bits, at the beginning of a work."""

    def cost(text: str) -> float:
        tokens = model.tokenizer.encode(text, add_special_tokens=False)
        scores = logits([0, *tokens])[:-1].astype(np.float64)
        scores -= np.log(np.exp(scores).sum(axis=-1, keepdims=True))
        return -float(scores[np.arange(len(tokens)), tokens].sum()) / math.log(2)

    return cost


def test_everything_that_is_needed_ships_and_is_small() -> None:
    sizes = {path.name: path.stat().st_size for path in DIRECTORY.iterdir()}
    assert set(sizes) == {WEIGHTS, *SETTINGS, "README.md"}
    assert sum(sizes.values()) < 6_000_000


def test_json_files_are_valid_and_agree() -> None:
    contents = {name: json.loads((DIRECTORY / name).read_text()) for name in SETTINGS}
    config, tokenizer = contents["config.json"], contents["tokenizer.json"]
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["vocab_size"] == len(tokenizer["model"]["vocab"])
    end = contents["tokenizer_config.json"]["eos_token"]
    assert config["eos_token_id"] == contents["generation_config.json"]["eos_token_id"]
    assert tokenizer["model"]["vocab"][end] == config["eos_token_id"]


def test_it_has_one_to_three_million_parameters(model: Model) -> None:
    assert 1_000_000 <= sum(array.size for array in model.checkpoint.spec.parameters) <= 3_000_000


def test_it_can_be_split_over_two_and_three_devices_and_stages(model: Model) -> None:
    config = model.checkpoint.spec.config
    assert config.heads % 2 == config.heads % 3 == 0
    assert config.layers >= 3


@given(st.text())
def test_any_text_survives_tokens(text: str) -> None:
    tokenizer = open_model("tiny").tokenizer
    tokens = tokenizer.encode(text, add_special_tokens=True)
    assert tokenizer.decode(tokens) == text


def test_digits_are_tokens_of_their_own(model: Model) -> None:
    assert len(model.tokenizer.encode("1234567890", add_special_tokens=False)) == 10


def test_a_chat_reads_as_a_play_that_awaits_an_answer(model: Model) -> None:
    messages = [
        {"role": "system", "content": "Enter the King."},
        {"role": "user", "content": "Good morrow!"},
        {"role": "assistant", "content": "Who art thou?"},
        {"role": "user", "content": "A friend."},
    ]
    assert model.tokenizer.render_chat(messages) == (
        "[Enter the King.]\n\nUSER.\nGood morrow!\n\nKING.\nWho art thou?\n\nUSER.\nA friend.\n\nKING.\n"
    )


def test_it_predicts_a_play_that_it_has_not_seen(bits: Callable[[str], float]) -> None:
    assert 1.0 < bits(HELD_OUT) / len(HELD_OUT.encode()) < 2.2


def test_word_order_matters_to_it(bits: Callable[[str], float]) -> None:
    assert bits("I will go with thee, my lord.") < bits("Lord thee my, go with will I.") - 15


def test_its_greedy_continuation_is_the_recorded_one(model: Model, logits: Logits) -> None:
    tokens = model.tokenizer.encode(PROMPT, add_special_tokens=False)
    start = len(tokens)
    for _ in GREEDY:
        last = logits(tokens)[-1]
        runner_up, best = np.sort(last)[-2:]
        assert best - runner_up > 2e-3, "a near tie falls differently on other machines; record another prompt"
        tokens = [*tokens, int(last.argmax())]
    assert tokens[start:] == GREEDY
