"""OPT, GPT-NeoX, Pythia and GPT-2: published configurations have their published sizes; what is not run is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from spotjax.errors import CheckpointError
from spotjax.meshes.slices import whole
from spotjax.models.config import DecoderConfig, RopeScaling
from spotjax.models.huggingface import HuggingFaceCheckpoint
from spotjax.models.huggingface_config import read_config
from spotjax.models.spec import ModelSpec

GOLDEN = Path(__file__).parents[1] / "golden"


def opt(layers: int, width: int, heads: int, **changes: Any) -> dict[str, Any]:
    """The keys of a published OPT."""
    return {
        "model_type": "opt", "vocab_size": 50_272, "hidden_size": width, "ffn_dim": 4 * width,
        "num_hidden_layers": layers, "num_attention_heads": heads, "max_position_embeddings": 2048,
        "word_embed_proj_dim": width, "activation_function": "relu", "do_layer_norm_before": True,
    } | changes  # fmt: skip


def neox(layers: int, width: int, heads: int, vocab: int = 50_304, **changes: Any) -> dict[str, Any]:
    """The keys of a published Pythia."""
    return {
        "model_type": "gpt_neox", "vocab_size": vocab, "hidden_size": width, "intermediate_size": 4 * width,
        "num_hidden_layers": layers, "num_attention_heads": heads, "max_position_embeddings": 2048,
        "rotary_pct": 0.25, "rotary_emb_base": 10_000, "hidden_act": "gelu", "use_parallel_residual": True,
        "tie_word_embeddings": False,
    } | changes  # fmt: skip


def gpt2(layers: int, width: int, heads: int, **changes: Any) -> dict[str, Any]:
    """The keys of a published GPT-2."""
    return {
        "model_type": "gpt2", "vocab_size": 50_257, "n_embd": width, "n_layer": layers, "n_head": heads,
        "n_positions": 1024, "activation_function": "gelu_new",
    } | changes  # fmt: skip


def config_of(tmp_path: Path, keys: dict[str, Any]) -> DecoderConfig:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(keys))
    return read_config(path)[0]


# Parameters of the published checkpoints, without rows of OPT's positions that only padding has.
PARAMETERS = [
    ("opt-125m", opt(12, 768, 12), 125_239_296 - 2 * 768),
    ("opt-350m", opt(24, 1024, 16, word_embed_proj_dim=512, do_layer_norm_before=False), 331_196_416 - 2 * 1024),
    ("opt-1.3b", opt(24, 2048, 32), 1_315_758_080 - 2 * 2048),
    ("opt-2.7b", opt(32, 2560, 32), 2_651_596_800 - 2 * 2560),
    ("opt-6.7b", opt(32, 4096, 32), 6_658_473_984 - 2 * 4096),
    ("pythia-70m", neox(6, 512, 8), 70_426_624),
    ("pythia-160m", neox(12, 768, 12), 162_322_944),
    ("pythia-1.4b", neox(24, 2048, 16), 1_414_647_808),
    ("pythia-6.9b", neox(32, 4096, 32, 50_432), 6_857_302_016),
    ("gpt-neox-20b", neox(44, 6144, 64, 50_432, hidden_act="gelu_fast"), 20_554_567_680),
    ("gpt2", gpt2(12, 768, 12), 124_439_808),
    ("gpt2-xl", gpt2(48, 1600, 25), 1_557_611_200),
]


@pytest.mark.parametrize(
    ("keys", "parameters"), [case[1:] for case in PARAMETERS], ids=[case[0] for case in PARAMETERS]
)
def test_published_models_have_exactly_their_parameters(tmp_path: Path, keys: dict[str, Any], parameters: int) -> None:
    assert sum(array.size for array in ModelSpec(config_of(tmp_path, keys)).parameters) == parameters


@pytest.mark.parametrize(
    ("layers", "width", "heads", "billions"),
    [(40, 5120, 40, 13.0), (48, 7168, 56, 30.0), (64, 9216, 72, 65.7)],
)
def test_large_opts_have_the_sizes_of_their_names(
    tmp_path: Path, layers: int, width: int, heads: int, billions: float
) -> None:
    spec = ModelSpec(config_of(tmp_path, opt(layers, width, heads)))
    assert sum(array.size for array in spec.parameters) / 1e9 == pytest.approx(billions, rel=0.015)


def test_rotary_settings_of_neox_read_the_same_in_both_spellings(tmp_path: Path) -> None:
    keys = neox(2, 64, 4, rotary_pct=0.5, rotary_emb_base=500.0)
    old = config_of(tmp_path, keys)
    del keys["rotary_pct"], keys["rotary_emb_base"]
    rope = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}
    assert config_of(tmp_path, keys | {"rope_parameters": rope}) == old
    assert (old.rotary_size, old.rope_base) == (8, 500.0)
    scaled = config_of(tmp_path, keys | {"rope_scaling": {"type": "linear", "factor": 2.0}})
    assert (scaled.rope_scaling, scaled.rotary_size, scaled.rope_base) == (RopeScaling("linear", 2.0), 4, 10_000.0)


@pytest.mark.parametrize(("name", "function"), [("gelu", "gelu"), ("gelu_fast", "gelu_tanh"), ("relu", "relu")])
def test_activations_of_neox_by_their_names(tmp_path: Path, name: str, function: str) -> None:
    assert config_of(tmp_path, neox(2, 64, 4, hidden_act=name)).activation == function


def test_settings_that_arrays_depend_on(tmp_path: Path) -> None:
    without = ModelSpec(config_of(tmp_path, opt(2, 64, 4, enable_bias=False))).layer_arrays
    assert [name for name in without if "bias" in name] == ["attention_norm.bias", "mlp_norm.bias"]
    sparse = ModelSpec(config_of(tmp_path, neox(2, 64, 4, attention_bias=False))).layer_arrays
    assert not [name for name in sparse if name.startswith("attention.") and "bias" in name]
    tied = ModelSpec(config_of(tmp_path, neox(2, 64, 4, tie_word_embeddings=True)))
    assert "embedding" in tied.outputs and "head" not in tied.outputs
    assert "head" in ModelSpec(config_of(tmp_path, opt(2, 64, 4, tie_word_embeddings=False))).outputs


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        (opt(2, 64, 4, activation_function="gelu"), "activation_function 'gelu'"),
        (opt(2, 64, 4, layer_norm_elementwise_affine=False), "layer_norm_elementwise_affine false"),
        (opt(2, 64, 4, _remove_final_layer_norm=True), "_remove_final_layer_norm true"),
        (opt(2, 65, 4), "hidden_size 65 is no multiple of 4 heads"),
        (opt(2, 64, 4, quantization_config={"quant_method": "gptq"}), "quantization_config .gptq."),
        (neox(2, 64, 4, hidden_act="quick_gelu"), "hidden_act 'quick_gelu'"),
        (neox(2, 64, 4, rotary_pct=0.2), "rotary_size must be even and from 2 to head_size 16, got 3"),
        (neox(2, 64, 4, rope_scaling={"type": "dynamic", "factor": 2.0}), "rope_scaling of type 'dynamic'"),
        (gpt2(2, 64, 4, activation_function="gelu"), "activation_function 'gelu'"),
        (gpt2(2, 64, 4, scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx true"),
        (gpt2(2, 64, 4, scale_attn_weights=False), "scale_attn_weights false"),
        (gpt2(2, 64, 4, add_cross_attention=True), "add_cross_attention true"),
        (opt(2, 64, 4, is_encoder_decoder=True), "is_encoder_decoder true"),
        ({"model_type": "gptj"}, "'gptj' is not supported"),
    ],
)
def test_what_cannot_be_computed_exactly_is_refused_by_name(tmp_path: Path, keys: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        config_of(tmp_path, keys)


@pytest.mark.parametrize(
    ("keys", "without_effect"),
    [
        (gpt2(2, 64, 4), {"reorder_and_upcast_attn": True}),  # attention is computed in float32 in any case
        (opt(2, 64, 4), {"layerdrop": 0.5, "dropout": 0.1, "pad_token_id": 1}),
        (opt(2, 64, 4, do_layer_norm_before=False), {"_remove_final_layer_norm": True}),  # it has none
        (neox(2, 64, 4), {"attention_dropout": 0.5, "pruned_heads": {}}),
    ],
)
def test_settings_without_effect_on_what_is_computed_are_read(
    tmp_path: Path, keys: dict[str, Any], without_effect: dict[str, Any]
) -> None:
    assert config_of(tmp_path, keys | without_effect) == config_of(tmp_path, keys)


def test_gpt2_is_read_as_it_was_published(tmp_path: Path) -> None:
    """As a bare decoder, with the causal masks."""
    tensors = load_file(GOLDEN / "gpt2" / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    bare |= {f"h.{layer}.attn.bias": np.ones((1, 1, 4, 4), np.float32) for layer in range(4)}
    save_file(bare, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((GOLDEN / "gpt2" / "config.json").read_text())
    found, expected = HuggingFaceCheckpoint(tmp_path), HuggingFaceCheckpoint(GOLDEN / "gpt2")
    for array in expected.spec.parameters:
        index = whole(array.shape)
        np.testing.assert_array_equal(found.read(array.name, index), expected.read(array.name, index))


@pytest.mark.parametrize("case", ["gpt-neox", "gpt2"])
def test_a_joined_tensor_of_another_size_is_named_with_both_shapes(tmp_path: Path, case: str) -> None:
    tensors = load_file(GOLDEN / case / "model.safetensors")
    name = next(name for name in tensors if "query_key_value.weight" in name or "c_attn.weight" in name)
    tensors[name] = np.ascontiguousarray(tensors[name][:-1])
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((GOLDEN / case / "config.json").read_text())
    with pytest.raises(CheckpointError, match=f"tensor {name} has shape .* the configuration says"):
        HuggingFaceCheckpoint(tmp_path)
