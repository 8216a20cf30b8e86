"""Which ``config.json`` is read as what, and which is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from spotjax.errors import CheckpointError
from spotjax.models.config import DecoderConfig, RopeScaling
from spotjax.models.huggingface_config import read_config

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 50,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 4096,
}


FULL, SLIDING = "full_attention", "sliding_attention"


def config_of(tmp_path: Path, **changes: Any) -> DecoderConfig:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({key: value for key, value in (CONFIG | changes).items() if value != "absent"}))
    return read_config(path)[0]


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"factor": 4, "original_max_position_embeddings": 1024}


@pytest.mark.parametrize(
    ("rope", "scaling"),
    [
        (None, None),
        ({"rope_type": "default"}, None),
        ({"rope_type": "linear", "factor": 2}, RopeScaling("linear", 2.0)),
        ({"rope_type": "llama3"} | LLAMA3, RopeScaling("llama3", 8.0, 8192, 1.0, 4.0)),
        ({"rope_type": "yarn"} | YARN, RopeScaling("yarn", 4.0, 1024)),
        ({"rope_type": "yarn", "factor": 4}, RopeScaling("yarn", 4.0, 4096)),
        ({"rope_type": "yarn", "original_max_position_embeddings": 512}, RopeScaling("yarn", 8.0, 512)),
        (
            {"rope_type": "yarn", "beta_fast": 16, "beta_slow": 2, "attention_factor": 1.5} | YARN,
            RopeScaling("yarn", 4.0, 1024, beta_fast=16.0, beta_slow=2.0, attention_factor=1.5),
        ),
        (
            {"rope_type": "yarn", "mscale": 0.5, "mscale_all_dim": 0.5} | YARN,
            RopeScaling("yarn", 4.0, 1024, attention_factor=1.0),
        ),
    ],
)
def test_rope_scaling_reads_the_same_in_all_spellings(tmp_path: Path, rope: Any, scaling: RopeScaling | None) -> None:
    base = {"rope_theta": 5e5}
    assert config_of(tmp_path, rope_scaling=rope, **base).rope_scaling == scaling
    new = config_of(tmp_path, rope_parameters=(rope or {"rope_type": "default"}) | base)
    assert (new.rope_scaling, new.rope_base) == (scaling, 5e5)
    if rope:
        oldest = {"type" if key == "rope_type" else key: value for key, value in rope.items()}
        assert config_of(tmp_path, rope_scaling=oldest, **base) == new


def test_defaults_are_those_of_transformers(tmp_path: Path) -> None:
    c = config_of(tmp_path)
    assert (c.kv_heads, c.head_size, c.rope_base, c.norm_epsilon, c.tied_embeddings) == (3, 4, 1e4, 1e-6, False)
    assert config_of(tmp_path, head_dim=8, num_key_value_heads=1).head_size == 8


@pytest.mark.parametrize(
    ("changes", "flags"),
    [
        ({"model_type": "llama", "attention_bias": True}, (True, True, False, False)),
        ({"model_type": "llama", "mlp_bias": True}, (False, False, True, False)),
        ({"model_type": "mistral", "sliding_window": None}, (False, False, False, False)),
        ({"model_type": "mistral", "sliding_window": 4096}, (False, False, False, False)),
        ({"model_type": "qwen2"}, (True, False, False, False)),
        ({"model_type": "qwen3"}, (False, False, False, True)),
        ({"model_type": "qwen3", "attention_bias": True}, (True, True, False, True)),
    ],
)
def test_each_architecture_has_its_biases_and_norms(
    tmp_path: Path, changes: dict[str, Any], flags: tuple[bool, ...]
) -> None:
    c = config_of(tmp_path, **changes)
    assert (c.attention_bias, c.output_bias, c.mlp_bias, c.qk_norm) == flags


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({"model_type": "mistral", "max_position_embeddings": 32768}, (4096,)),
        ({"model_type": "mistral", "sliding_window": 1024, "layer_types": [SLIDING, SLIDING]}, (1024,)),
        ({"model_type": "mistral", "sliding_window": None}, ()),
        ({"model_type": "mistral", "sliding_window": 4096}, ()),
        ({"model_type": "llama", "sliding_window": 64}, ()),
        ({"model_type": "qwen2", "sliding_window": 64}, ()),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 64}, ()),
        ({"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}, (None, 64)),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 64, "layer_types": [SLIDING, FULL]},
            (64, None),
        ),
    ],
)
def test_windows_are_where_transformers_has_them(
    tmp_path: Path, changes: dict[str, Any], windows: tuple[int | None, ...]
) -> None:
    assert config_of(tmp_path, **changes).windows == windows


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"model_type": "bloom"},
            r"'bloom' is not supported, only llama, mistral, .*gemma2, .*gpt2",
        ),
        ({"model_type": "absent"}, r"None is not supported"),
        ({"vocab_size": "absent"}, "vocab_size"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"num_key_value_heads": 2}, "kv_heads 2 must divide heads 3"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config .awq."),
        ({"model_type": "qwen3", "layer_types": [FULL, SLIDING]}, "sliding_attention needs a sliding_window"),
        ({"model_type": "qwen3", "layer_types": [FULL, "chunked_attention"]}, "chunked_attention are not supported"),
        ({"model_type": "qwen3", "layer_types": [FULL]}, "layer_types has 1 entries for 2 layers"),
        ({"model_type": "llama", "layer_types": [SLIDING, FULL]}, "sliding_attention needs a sliding_window"),
        ({"model_type": "mistral", "layer_types": [SLIDING, FULL]}, "other than sliding_attention is not supported"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder true"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads .* is not supported"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling of type 'dynamic'"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "rope_scaling of type 'longrope'"),
        ({"rope_parameters": {"rope_type": "proportional"}}, "rope_parameters of type 'proportional'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "linear needs a factor"),
        ({"rope_scaling": {"type": "llama3", "factor": 8}}, "low_freq_factor"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "truncate": False}}, "truncate"),
        ({"rope_scaling": {"type": "linear", "factor": 2, "twist": 1}}, "twist"),
        ({"rope_scaling": {"type": "linear", "factor": "two"}}, "factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}}, "partial_rotary_factor"),
    ],
)
def test_what_cannot_be_computed_exactly_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(CheckpointError, match=named):
        config_of(tmp_path, **changes)


@pytest.mark.parametrize("content", ["", "not json", "[1]"])
def test_a_damaged_config_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config.json"):
        read_config(tmp_path / "config.json")


def test_a_missing_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config.json does not exist"):
        read_config(tmp_path / "config.json")
