"""Gemma 2 and 3: what their configurations say, what is refused, and language models beside vision towers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from spotjax.errors import CheckpointError
from spotjax.meshes.slices import whole
from spotjax.models.config import DecoderConfig, LayerKind, RopeScaling
from spotjax.models.huggingface import HuggingFaceCheckpoint
from spotjax.models.huggingface_config import read_config

GOLDEN = Path(__file__).parents[1] / "golden"
GEMMA2: dict[str, Any] = {"model_type": "gemma2"}
GEMMA3: dict[str, Any] = {"model_type": "gemma3_text"}
FULL, SLIDING = "full_attention", "sliding_attention"
LINEAR = {"rope_type": "linear", "factor": 8.0}


def config_of(tmp_path: Path, keys: dict[str, Any]) -> DecoderConfig:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(keys))
    return read_config(path)[0]


def test_defaults_of_gemma_2_are_those_of_transformers(tmp_path: Path) -> None:
    c = config_of(tmp_path, GEMMA2)
    assert (c.windows, c.attention_softcap, c.logit_softcap) == ((4096, None), 50.0, 30.0)
    assert (c.embedding_scale, c.attention_scale, c.qk_norm, c.local_rope_base) == (48.0, None, False, None)
    assert config_of(tmp_path, GEMMA2 | {"query_pre_attn_scalar": 144}).attention_scale == 1 / 12


def test_defaults_of_gemma_3_are_those_of_transformers(tmp_path: Path) -> None:
    c = config_of(tmp_path, GEMMA3)
    assert (c.windows, c.attention_softcap, c.logit_softcap) == ((*(4096,) * 5, None), None, None)
    assert (c.rope_base, c.rope_scaling, c.local_rope_base, c.qk_norm) == (1e6, None, 1e4, True)


def test_rotary_settings_of_gemma_3_read_the_same_in_both_spellings(tmp_path: Path) -> None:
    old = GEMMA3 | {"rope_theta": 5e5, "rope_local_base_freq": 2e4, "rope_scaling": LINEAR}
    new = GEMMA3 | {
        "rope_parameters": {
            FULL: LINEAR | {"rope_theta": 5e5},
            SLIDING: {"rope_type": "default", "rope_theta": 2e4},
        }
    }
    c = config_of(tmp_path, old)
    assert config_of(tmp_path, new) == c
    assert c.kind(0) == LayerKind(4096, 2e4, None)
    assert c.kind(5) == LayerKind(None, 5e5, RopeScaling("linear", 8.0))


def test_windows_of_gemma_3_mean_another_rotation_however_long_they_are(tmp_path: Path) -> None:
    c = config_of(tmp_path, GEMMA3 | {"sliding_window": 4096, "max_position_embeddings": 512})
    assert c.kind(0) != c.kind(5)
    assert config_of(tmp_path, GEMMA2 | {"max_position_embeddings": 512}).windows == ()


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        (GEMMA2 | {"hidden_activation": "silu"}, "hidden_activation 'silu'"),
        (GEMMA2 | {"layer_types": [SLIDING, "chunked_attention"]}, "chunked_attention are not supported"),
        (GEMMA2 | {"layer_types": [SLIDING, FULL]}, "layer_types has 2 entries for 26 layers"),
        (GEMMA2 | {"sliding_window": None}, "sliding_attention needs a sliding_window"),
        (GEMMA2 | {"use_bidirectional_attention": True}, "use_bidirectional_attention true"),
        (GEMMA2 | {"rope_parameters": {"rope_type": "dynamic"}}, "rope_parameters of type 'dynamic'"),
        (GEMMA3 | {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is not supported for Gemma 3"),
        (GEMMA3 | {"rope_parameters": {"rope_type": "default"}}, "by kind of layer; rope_type is none"),
        (GEMMA3 | {"rope_parameters": {SLIDING: LINEAR}}, "sliding_attention of type 'linear'"),
        ({"model_type": "gemma3", "text_config": {"use_bidirectional_attention": True}}, "use_bidirectional_attention"),
        ({"model_type": "gemma3"}, "text_config"),
        ({"model_type": "gemma3n"}, "'gemma3n' is not supported"),
    ],
)
def test_what_cannot_be_computed_exactly_is_refused_by_name(tmp_path: Path, keys: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        config_of(tmp_path, keys)


@pytest.mark.parametrize("spelling", ["language_model.model.", "model.language_model."])
def test_the_language_model_beside_a_vision_tower_is_the_same_model(tmp_path: Path, spelling: str) -> None:
    tensors = load_file(GOLDEN / "gemma3" / "model.safetensors")
    tower = "vision_tower." if spelling.startswith("language") else "model.vision_tower."
    beside = {spelling + name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(beside | {tower + "embeddings.weight": np.ones((2, 2), np.float32)}, tmp_path / "model.safetensors")
    text = json.loads((GOLDEN / "gemma3" / "config.json").read_text())
    keys = {"model_type": "gemma3", "vision_config": {}, "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(keys))
    found, expected = HuggingFaceCheckpoint(tmp_path), HuggingFaceCheckpoint(GOLDEN / "gemma3")
    assert found.spec == expected.spec
    for array in expected.spec.parameters:
        index = whole(array.shape)
        np.testing.assert_array_equal(found.read(array.name, index), expected.read(array.name, index))
