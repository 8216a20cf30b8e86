"""Reads Hugging Face's ``config.json`` as a DecoderConfig; what Spotjax cannot compute exactly is refused by name."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec

from spotjax.errors import CheckpointError
from spotjax.models.config import DecoderConfig, RopeScaling

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
"""Values of ``model_type`` that are read; SmolLM2, TinyLlama and others say ``llama``."""

ROPE_KINDS = ("default", "linear", "llama3", "yarn")


class RopeParameters(msgspec.Struct, forbid_unknown_fields=True):
    """``rope_parameters`` (transformers 5) or ``rope_scaling`` (before)."""

    rope_type: str | None = None
    type: str | None = None
    rope_theta: float | None = None
    partial_rotary_factor: float = 1.0
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


class ConfigFile(msgspec.Struct):
    """The keys of ``config.json`` that matter; defaults are those of transformers."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    rope_theta: float = 10_000.0
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None
    partial_rotary_factor: float = 1.0
    original_max_position_embeddings: int | None = None
    use_sliding_window: bool = False
    sliding_window: int | None = 4096
    layer_types: list[str] | None = None
    quantization_config: dict[str, Any] | None = None


def read_config(path: Path) -> DecoderConfig:
    """The model that a ``config.json`` describes.

    Raises:
      CheckpointError: no such file, not valid, or a model that Spotjax does not run.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist")
    try:
        content = path.read_bytes()
        architecture = msgspec.json.decode(content, type=dict[str, Any]).get("model_type")
        if architecture not in ARCHITECTURES:
            raise CheckpointError(
                f"{path}: model_type {architecture!r} is not supported, only {', '.join(ARCHITECTURES)}"
            )
        return _model(msgspec.json.decode(content, type=ConfigFile))
    except (msgspec.MsgspecError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def _model(file: ConfigFile) -> DecoderConfig:
    _refuse_unsupported(file)
    rope_base, rope_scaling = _rope(file)
    llama, qwen2, qwen3 = (file.model_type == name for name in ("llama", "qwen2", "qwen3"))
    biased = file.attention_bias and (llama or qwen3)
    return DecoderConfig(
        vocab=file.vocab_size,
        width=file.hidden_size,
        layers=file.num_hidden_layers,
        heads=file.num_attention_heads,
        kv_heads=file.num_key_value_heads or file.num_attention_heads,
        head_size=file.head_dim or file.hidden_size // file.num_attention_heads,
        mlp=file.intermediate_size,
        max_positions=file.max_position_embeddings,
        rope_base=rope_base,
        rope_scaling=rope_scaling,
        norm_epsilon=file.rms_norm_eps,
        tied_embeddings=file.tie_word_embeddings,
        attention_bias=biased or qwen2,
        output_bias=biased,
        mlp_bias=file.mlp_bias and llama,
        qk_norm=qwen3,
    )


def _refuse_unsupported(file: ConfigFile) -> None:
    if file.quantization_config is not None:
        method = file.quantization_config.get("quant_method")
        raise ValueError(f"quantization_config ({method}) is not supported; use unquantized weights or a GGUF file")
    if file.hidden_act not in ("silu", "swish"):
        raise ValueError(f"hidden_act {file.hidden_act!r} is not supported, only 'silu'")
    windowed = file.model_type == "mistral" or file.use_sliding_window
    if windowed and file.sliding_window is not None and file.sliding_window < file.max_position_embeddings:
        raise ValueError(
            f"sliding_window {file.sliding_window} is not supported; null, or at least max_position_embeddings "
            f"({file.max_position_embeddings}), is"
        )
    if kinds := set(file.layer_types or ()) - {"full_attention"}:
        raise ValueError(f"layer_types {', '.join(sorted(kinds))} are not supported, only full_attention")


def _rope(file: ConfigFile) -> tuple[float, RopeScaling | None]:
    """Base of the rotary frequencies and their scaling, in either spelling."""
    values = file.rope_scaling or file.rope_parameters or {}
    spelling = "rope_scaling" if file.rope_scaling else "rope_parameters"
    kind = values.get("rope_type", values.get("type", "default"))
    if kind not in ROPE_KINDS:
        raise ValueError(f"{spelling} of type {kind!r} is not supported, only {', '.join(ROPE_KINDS)}")
    try:
        rope = msgspec.convert(values, RopeParameters, strict=False)
    except msgspec.ValidationError as error:
        raise ValueError(f"{spelling}: {error}") from error
    if min(rope.partial_rotary_factor, file.partial_rotary_factor) != 1:
        raise ValueError("partial_rotary_factor other than 1 is not supported")
    if not rope.truncate:
        raise ValueError(f"{spelling}: truncate false is not supported")
    base = rope.rope_theta or file.rope_theta
    original = file.original_max_position_embeddings or rope.original_max_position_embeddings
    original = original or file.max_position_embeddings
    if kind == "default":
        return base, None
    factor = rope.factor
    if factor is None and kind == "yarn":
        factor = file.max_position_embeddings / original
    if factor is None:
        raise ValueError(f"{spelling} of type {kind} needs a factor")
    if kind == "linear":
        return base, RopeScaling("linear", factor)
    if kind == "llama3":
        if rope.low_freq_factor is None or rope.high_freq_factor is None:
            raise ValueError(f"{spelling} of type llama3 needs low_freq_factor and high_freq_factor")
        return base, RopeScaling("llama3", factor, original, rope.low_freq_factor, rope.high_freq_factor)
    return base, RopeScaling(
        "yarn",
        factor,
        original,
        beta_fast=rope.beta_fast or 32.0,
        beta_slow=rope.beta_slow or 1.0,
        attention_factor=_attention_factor(rope, factor),
    )


def _attention_factor(rope: RopeParameters, factor: float) -> float | None:
    """YaRN's scale of attention, where ``mscale`` and ``mscale_all_dim`` may give it; None for the paper's."""
    if rope.attention_factor is None and rope.mscale and rope.mscale_all_dim and factor > 1:
        return (0.1 * rope.mscale * math.log(factor) + 1) / (0.1 * rope.mscale_all_dim * math.log(factor) + 1)
    return rope.attention_factor
