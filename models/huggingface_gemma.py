"""Gemma 2 and 3 (Gemma Team 2024, 2025) as Hugging Face keeps them: keys of ``config.json``, names of tensors.

Of Gemma 3 with a vision tower the language model is read, and nothing else.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec

from spotjax.models import huggingface_llama
from spotjax.models.config import DecoderConfig, window_pattern
from spotjax.models.huggingface_rope import RopeKeys, read_rope
from spotjax.models.huggingface_windows import FULL, SLIDING, read_windows

LAYOUT = replace(
    huggingface_llama.LAYOUT,
    names={
        **huggingface_llama.LAYOUT.names,
        "attention_norm.scale": "input_layernorm.weight",
        "attention_output_norm.scale": "post_attention_layernorm.weight",
        "mlp_norm.scale": "pre_feedforward_layernorm.weight",
        "mlp_output_norm.scale": "post_feedforward_layernorm.weight",
    },
)
WITH_VISION = replace(
    LAYOUT,
    prefixes={
        "language_model.model.": "model.",
        "language_model.lm_head.": "lm_head.",
        "model.language_model.": "model.",
    },
    unused=("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector."),
)
"""Beside a vision tower; in the spellings of transformers 4 and 5."""
LOCAL_ROPE_BASE = 10_000.0
GLOBAL_ROPE_BASE = 1_000_000.0


class GemmaKeys(msgspec.Struct, kw_only=True):
    """The keys of ``config.json`` that matter; defaults are those of transformers."""

    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 256
    hidden_activation: str = "gelu_pytorch_tanh"
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    query_pre_attn_scalar: float = 256
    sliding_window: int | None = 4096
    layer_types: list[str] | None = None
    rope_theta: float | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None


class Gemma2Keys(GemmaKeys, kw_only=True):
    """Those of Gemma 2."""

    vocab_size: int = 256_000
    max_position_embeddings: int = 8192
    final_logit_softcapping: float | None = 30.0
    attn_logit_softcapping: float | None = 50.0


class Gemma3Keys(GemmaKeys, kw_only=True):
    """Those of Gemma 3."""

    vocab_size: int = 262_208
    max_position_embeddings: int = 131_072
    final_logit_softcapping: float | None = None
    attn_logit_softcapping: float | None = None
    sliding_window_pattern: int = 6
    rope_local_base_freq: float = LOCAL_ROPE_BASE


class _TextConfig(msgspec.Struct):
    """What surrounds the keys of the language model where there is a vision tower."""

    text_config: msgspec.Raw


def read_gemma2(content: bytes) -> DecoderConfig:
    """A model of type ``gemma2``.

    Raises:
      msgspec.MsgspecError, ValueError: keys are missing or wrong, or name what Spotjax does not run.
    """
    file = msgspec.json.decode(content, type=Gemma2Keys)
    rope = read_rope(
        RopeKeys(
            file.max_position_embeddings,
            file.rope_theta or LOCAL_ROPE_BASE,
            rope_parameters=file.rope_parameters,
            rope_scaling=file.rope_scaling,
        )
    )
    return replace(
        _config(file),
        windows=window_pattern(_windows(file, every=2), file.max_position_embeddings),
        rope_base=rope.base,
        rope_scaling=rope.scaling,
        attention_softcap=file.attn_logit_softcapping,
    )


def read_gemma3(content: bytes) -> DecoderConfig:
    """A model of type ``gemma3_text``.

    Raises:
      msgspec.MsgspecError, ValueError: keys are missing or wrong, or name what Spotjax does not run.
    """
    file = msgspec.json.decode(content, type=Gemma3Keys)
    if file.attn_logit_softcapping is not None:
        raise ValueError("attn_logit_softcapping is not supported for Gemma 3")
    spelled = file.rope_parameters or {}
    if unknown := sorted(spelled.keys() - {FULL, SLIDING}):
        raise ValueError(f"rope_parameters of Gemma 3 are by kind of layer; {', '.join(unknown)} is none")
    whole = {"rope_theta": file.rope_theta or GLOBAL_ROPE_BASE} | (spelled.get(FULL) or {}) | (file.rope_scaling or {})
    sliding = {"rope_theta": file.rope_local_base_freq} | (spelled.get(SLIDING) or {})
    rope, local = (read_rope(RopeKeys(file.max_position_embeddings, rope_parameters=keys)) for keys in (whole, sliding))
    if local.scaling is not None:
        raise ValueError(f"rope_parameters of {SLIDING} of type {local.scaling.kind!r} are not supported, only default")
    return replace(
        _config(file),
        windows=window_pattern(_windows(file, every=file.sliding_window_pattern), None),
        rope_base=rope.base,
        rope_scaling=rope.scaling,
        local_rope_base=local.base,
        qk_norm=True,
    )


def read_gemma3_with_vision(content: bytes) -> DecoderConfig:
    """The language model in a model of type ``gemma3``.

    Raises:
      msgspec.MsgspecError, ValueError: keys are missing or wrong, or name what Spotjax does not run.
    """
    return read_gemma3(msgspec.json.decode(content, type=_TextConfig).text_config)


def _windows(file: GemmaKeys, every: int) -> list[int | None]:
    """Of all layers; where they are not spelled out, each ``every``-th one sees all."""
    numbers = range(1, file.num_hidden_layers + 1)
    layer_types = file.layer_types or [SLIDING if number % every else FULL for number in numbers]
    return read_windows(layer_types, file.num_hidden_layers, file.sliding_window)


def _config(file: Gemma2Keys | Gemma3Keys) -> DecoderConfig:
    """What both have in common."""
    if file.hidden_activation != "gelu_pytorch_tanh":
        raise ValueError(f"hidden_activation {file.hidden_activation!r} is not supported, only 'gelu_pytorch_tanh'")
    scalar = file.query_pre_attn_scalar
    return DecoderConfig(
        vocab=file.vocab_size,
        width=file.hidden_size,
        layers=file.num_hidden_layers,
        heads=file.num_attention_heads,
        kv_heads=file.num_key_value_heads,
        head_size=file.head_dim,
        mlp=file.intermediate_size,
        max_positions=file.max_position_embeddings,
        norm_place="both",
        norm_epsilon=file.rms_norm_eps,
        zero_centered_norm=True,
        activation="gelu_tanh",
        tied_embeddings=file.tie_word_embeddings,
        attention_bias=file.attention_bias,
        output_bias=file.attention_bias,
        attention_scale=None if scalar == file.head_dim else scalar**-0.5,
        logit_softcap=file.final_logit_softcapping,
        embedding_scale=file.hidden_size**0.5,
    )
