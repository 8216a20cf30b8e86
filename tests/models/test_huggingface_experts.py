"""Mixtral, Qwen2-MoE and Qwen3-MoE: published configurations are the presets; what is not run is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from spotjax.errors import CheckpointError
from spotjax.models.config import DecoderConfig, Experts
from spotjax.models.huggingface_config import read_config
from spotjax.models.presets import PRESETS
from spotjax.models.spec import ModelSpec

MIXTRAL: dict[str, Any] = {
    "model_type": "mixtral", "vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 14_336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32_768,
    "num_local_experts": 8, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5, "rope_theta": 1_000_000.0,
    "sliding_window": None, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip
MIXTRAL_22B = MIXTRAL | {
    "vocab_size": 32_768, "hidden_size": 6144, "intermediate_size": 16_384, "num_hidden_layers": 56,
    "num_attention_heads": 48, "max_position_embeddings": 65_536,
}  # fmt: skip
QWEN2: dict[str, Any] = {
    "model_type": "qwen2_moe", "vocab_size": 151_936, "hidden_size": 2048, "intermediate_size": 5632,
    "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 16, "max_position_embeddings": 8192,
    "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632, "num_experts": 60,
    "num_experts_per_tok": 4, "norm_topk_prob": False, "decoder_sparse_step": 1, "use_sliding_window": False,
    "rope_theta": 1_000_000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
}  # fmt: skip
QWEN2_57B = QWEN2 | {
    "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
    "moe_intermediate_size": 2560, "shared_expert_intermediate_size": 20_480, "num_experts": 64,
    "num_experts_per_tok": 8, "max_position_embeddings": 32_768,
}  # fmt: skip
QWEN3: dict[str, Any] = {
    "model_type": "qwen3_moe", "vocab_size": 151_936, "hidden_size": 2048, "intermediate_size": 6144, "head_dim": 128,
    "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 40_960,
    "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "rope_theta": 1_000_000.0, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False, "sliding_window": None, "use_sliding_window": False,
}  # fmt: skip
PUBLISHED = [
    ("mixtral-8x7b", MIXTRAL, 12.9),
    ("mixtral-8x22b", MIXTRAL_22B, 39.2),
    ("qwen1.5-moe-a2.7b", QWEN2, 2.7),
    ("qwen2-57b-a14b", QWEN2_57B, 14.2),
    ("qwen3-30b-a3b", QWEN3, 3.3),
]
"""And how many billions of parameters are said to compute a token."""


def config_of(tmp_path: Path, keys: dict[str, Any]) -> DecoderConfig:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(keys))
    return read_config(path)[0]


def active(spec: ModelSpec) -> float:
    """Parameters that compute a token, in billions, the embedding among them."""
    experts = spec.config.experts
    assert experts is not None
    share = experts.per_token / experts.count
    return sum(array.size * (share if "expert" in array.axes else 1) for array in spec.parameters) / 1e9


@pytest.mark.parametrize(("name", "keys", "billions"), PUBLISHED, ids=[case[0] for case in PUBLISHED])
def test_published_configurations_read_as_presets_that_compute_a_token_with_as_many_parameters(
    tmp_path: Path, name: str, keys: dict[str, Any], billions: float
) -> None:
    spec = ModelSpec(config_of(tmp_path, keys))
    assert spec.config == PRESETS[name].config
    assert active(spec) == pytest.approx(billions, rel=0.03)


def test_settings_of_experts_are_read(tmp_path: Path) -> None:
    assert config_of(tmp_path, MIXTRAL).experts == Experts(8, 2, normalized=True)
    assert config_of(tmp_path, QWEN2).experts == Experts(60, 4, normalized=False, shared_mlp=5632)
    assert config_of(tmp_path, QWEN3).experts == Experts(128, 8, normalized=True)
    renamed = {key: value for key, value in QWEN3.items() if key != "num_experts"} | {"num_local_experts": 16}
    assert config_of(tmp_path, renamed).experts == Experts(16, 8, normalized=True)
    assert not config_of(tmp_path, QWEN2 | {"qkv_bias": False}).attention_bias


def test_what_a_file_leaves_out_is_what_transformers_assumes(tmp_path: Path) -> None:
    for keys, left_out in (
        (MIXTRAL, "rms_norm_eps sliding_window rope_theta num_key_value_heads"),
        (QWEN2, "qkv_bias"),
    ):
        short = {key: value for key, value in keys.items() if key not in left_out.split()}
        assert config_of(tmp_path, short) == config_of(tmp_path, keys)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        (QWEN2 | {"decoder_sparse_step": 2}, "decoder_sparse_step 2 is not supported"),
        (QWEN3 | {"mlp_only_layers": [0, 3]}, r"mlp_only_layers \[0, 3\] is not supported"),
        (QWEN3 | {"use_sliding_window": True}, "use_sliding_window true"),
        (MIXTRAL | {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        (MIXTRAL | {"num_experts_per_tok": 9}, "per_token must be from 1 to the 8 experts, got 9"),
        ({key: value for key, value in QWEN2.items() if key != "num_experts"}, "num_experts is missing"),
        ({key: value for key, value in MIXTRAL.items() if key != "num_local_experts"}, "num_local_experts"),
    ],
)
def test_what_cannot_be_computed_exactly_is_refused_by_name(tmp_path: Path, keys: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        config_of(tmp_path, keys)
