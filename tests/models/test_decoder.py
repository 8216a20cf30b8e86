"""The whole decoder against Hugging Face, and its arrays against the ModelSpec that everything else plans with."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from serving_cases import CASES, GEMMA, NEOX, OPT, POST_NORM, SHARED_HEADS, RandomCheckpoint, checkpoint, golden

from spotjax.meshes.slices import whole
from spotjax.models.attention import Scoring, as_one_page, attend, visibility
from spotjax.models.checkpoint import Checkpoint
from spotjax.models.config import DecoderConfig
from spotjax.models.decoder import Decoder
from spotjax.models.huggingface import HuggingFaceCheckpoint
from spotjax.models.spec import ModelSpec

EVERYTHING = replace(SHARED_HEADS, attention_bias=True, output_bias=True, mlp_bias=True, qk_norm=True)


def abstract(config: DecoderConfig) -> dict[str, nnx.Param[jax.Array]]:
    """Every parameter of the model by the name that ModelSpec gives it, without content."""
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    return {".".join(map(str, path)): value for path, value in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def logits(weights: Checkpoint, tokens: np.ndarray) -> np.ndarray:
    """Logits (T, V) of one sequence."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Decoder(weights.spec.config, rngs=nnx.Rngs(0))))
    shapes = {array.name: array.shape for array in weights.spec.parameters}
    for path, parameter in (flat := nnx.to_flat_state(state)):
        name = ".".join(map(str, path))
        parameter.set_value(jnp.asarray(weights.read(name, whole(shapes[name]))))
    run = jax.jit(lambda state, tokens: nnx.merge(graph, state)(tokens))
    return np.asarray(run(nnx.from_flat_state(flat), jnp.asarray(tokens)[None]))[0]


@cache
def golden_logits(case: str) -> np.ndarray:
    """Logits of the longest golden prompt and its continuation."""
    return logits(checkpoint(case), np.concatenate([golden(case)["prompt_2"], golden(case)["greedy_2"]]))


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_hugging_face(case: str) -> None:
    expected = golden(case)["logits"]
    np.testing.assert_allclose(golden_logits(case)[: len(expected)], expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("case", CASES)
def test_every_greedy_token_of_hugging_face_is_the_most_likely_one(case: str) -> None:
    prompt, continuation = golden(case)["prompt_2"], golden(case)["greedy_2"]
    chosen = np.argmax(golden_logits(case), axis=-1)
    np.testing.assert_array_equal(chosen[len(prompt) - 1 : -1], continuation)


def test_logits_equal_those_of_installed_transformers(tmp_path: Path) -> None:
    reason = "needs torch and transformers: pip install spotjax[parity]"
    torch = pytest.importorskip("torch", reason=reason)
    pytest.importorskip("transformers", reason=reason)
    from spotjax.tools.make_golden import CASES as OPTIONS
    from spotjax.tools.make_golden import random_model

    tokens = np.random.default_rng(5).integers(3, 128, 50)
    for number, (name, options) in enumerate(OPTIONS.items()):
        reference = random_model(options, torch.float16, seed=1000 + number)
        with torch.no_grad():
            expected = reference(torch.tensor(tokens[None])).logits[0].numpy()
        reference.save_pretrained(tmp_path / name)
        found = logits(HuggingFaceCheckpoint(tmp_path / name), tokens)
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max(), err_msg=name)


@pytest.mark.parametrize(
    "config",
    [*(pytest.param(checkpoint(case).spec.config, id=case) for case in CASES), pytest.param(EVERYTHING, id="biases")],
)
def test_parameters_are_exactly_those_of_the_spec(config: DecoderConfig) -> None:
    found = {name: (value.shape, value.get_metadata("logical_axes")) for name, value in abstract(config).items()}
    assert found == {array.name: (array.shape, array.axes) for array in ModelSpec(config).parameters}


@pytest.mark.parametrize("config", [EVERYTHING, POST_NORM, GEMMA], ids=["llama", "gpt", "gemma"])
def test_biases_start_at_zero_and_norms_at_multiplying_by_one(config: DecoderConfig) -> None:
    with jax.default_prng_impl("unsafe_rbg"):  # compiles in a third of the time
        model = nnx.jit(lambda: Decoder(replace(config, layers=1), rngs=nnx.Rngs(3)))()
    for path, parameter in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        name = str(path[-1])
        if name.endswith("bias"):
            np.testing.assert_array_equal(parameter[...], 0)
        elif name.endswith("norm") or name == "scale":
            np.testing.assert_array_equal(parameter[...], 0 if config.zero_centered_norm else 1)
        else:
            assert float(jnp.std(parameter[...])) > 0


@pytest.mark.parametrize(
    "config", [EVERYTHING, NEOX, OPT, POST_NORM, GEMMA], ids=["llama", "neox", "opt", "post-norm", "gemma"]
)
def test_no_position_sees_a_later_token(config: DecoderConfig) -> None:
    weights = RandomCheckpoint(config)
    tokens = np.random.default_rng(0).integers(0, EVERYTHING.vocab, 20)
    changed = tokens.copy()
    changed[12:] = (changed[12:] + 1) % EVERYTHING.vocab
    before, after = logits(weights, tokens), logits(weights, changed)
    np.testing.assert_array_equal(before[:12], after[:12])
    assert np.abs(before[12:] - after[12:]).max() > 0.01


@pytest.mark.parametrize("layers", [1, 3])
def test_a_token_reaches_as_far_as_windows_and_layers_carry_it(layers: int) -> None:
    window = 4
    weights = RandomCheckpoint(replace(SHARED_HEADS, layers=layers, windows=(window,)))
    tokens = np.random.default_rng(0).integers(0, SHARED_HEADS.vocab, 20)
    changed = tokens.copy()
    changed[2] = (changed[2] + 1) % SHARED_HEADS.vocab
    differs = np.abs(logits(weights, tokens) - logits(weights, changed)).max(axis=-1) > 0
    assert np.flatnonzero(differs).tolist() == list(range(2, 2 + layers * (window - 1) + 1))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "scoring"),
    [
        (4, 4, Scoring(0.5)), (4, 2, Scoring(0.5)), (6, 1, Scoring(0.3)), (4, 2, Scoring(0.5, window=3)),
        (4, 2, Scoring(0.5, softcap=0.7)),
    ],
)  # fmt: skip
def test_attention_equals_a_loop_over_heads_and_positions(heads: int, kv_heads: int, scoring: Scoring) -> None:
    generator = np.random.default_rng(heads)
    length, size = 7, 4
    query = generator.normal(size=(2, length, heads, size)).astype(np.float32)
    keys, values = (generator.normal(size=(2, length, kv_heads, size)).astype(np.float32) for _ in range(2))
    pages = as_one_page(jnp.asarray(keys), jnp.asarray(values))
    visible = visibility(jnp.arange(length)[None], length, scoring.window)
    found = attend(jnp.asarray(query), *pages, visible, scoring)
    for row in range(2):
        for position in range(length):
            seen = slice(max(0, position + 1 - (scoring.window or length)), position + 1)
            for head in range(heads):
                shared = head // (heads // kv_heads)
                scores = keys[row, seen, shared] @ query[row, position, head] * scoring.scale
                if scoring.softcap:
                    scores = scoring.softcap * np.tanh(scores / scoring.softcap)
                weights = np.exp(scores - scores.max())
                expected = weights @ values[row, seen, shared] / weights.sum()
                np.testing.assert_allclose(found[row, position, head], expected, atol=1e-5)


def test_attention_gives_the_same_whatever_lies_in_masked_positions() -> None:
    generator = np.random.default_rng(1)
    query = jnp.asarray(generator.normal(size=(1, 1, 2, 4)), jnp.float32)
    keys = generator.normal(size=(1, 3, 1, 4, 8)).astype(np.float32)  # three pages of eight positions
    values = generator.normal(size=(1, 1, 24, 4)).astype(np.float32)
    visible = jnp.arange(24)[None, None, :] < 10
    before = attend(query, jnp.asarray(keys), jnp.asarray(values), visible, Scoring(0.5))
    keys[:, 1, :, :, 2:], keys[:, 2] = 1e6, -1e6
    values[:, :, 10:] = 1e6
    after = attend(query, jnp.asarray(keys), jnp.asarray(values), visible, Scoring(0.5))
    np.testing.assert_array_equal(before, after)
