"""The configuration that a GGUF file's metadata comes to, as llama.cpp reads and its converters write it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from spotjax.models.config import DecoderConfig, RopeScaling, window_pattern

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "gpt2", "gptneox")
"""Values of ``general.architecture`` that are read."""
GPTS = ("gpt2", "gptneox")
ROPE_FACTORS = "rope_freqs.weight"
"""Per frequency, what Llama 3's scaling divides it by; converters write this instead of its parameters."""

LLAMA3_CONTEXT = 8192
"""Original context of every published Llama 3."""
WINDOW_EVERY = {"gemma2": 2, "gemma3": 6}
"""Of so many layers the last one sees all, unless the file says otherwise."""
GEMMA2_WINDOW, GEMMA2_ATTENTION_SOFTCAP, GEMMA2_LOGIT_SOFTCAP = 4096, 50.0, 30.0
"""Those of llama.cpp where a file does not say."""
GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3": 62}
"""The scale of attention is not in the file: only the 27B models have another than the usual one."""


class Metadata(msgspec.Struct):
    """The keys that matter, without the architecture they begin with; defaults are those of llama.cpp."""

    width: int = msgspec.field(name="embedding_length")
    layers: int = msgspec.field(name="block_count")
    mlp: int = msgspec.field(name="feed_forward_length")
    heads: int = msgspec.field(name="attention.head_count")
    max_positions: int = msgspec.field(name="context_length")
    rms_epsilon: float | None = msgspec.field(name="attention.layer_norm_rms_epsilon", default=None)
    layer_epsilon: float | None = msgspec.field(name="attention.layer_norm_epsilon", default=None)
    kv_heads: int | None = msgspec.field(name="attention.head_count_kv", default=None)
    key_size: int | None = msgspec.field(name="attention.key_length", default=None)
    value_size: int | None = msgspec.field(name="attention.value_length", default=None)
    window: int = msgspec.field(name="attention.sliding_window", default=0)
    window_every: int | None = msgspec.field(name="attention.sliding_window_pattern", default=None)
    attention_softcap: float | None = msgspec.field(name="attn_logit_softcapping", default=None)
    logit_softcap: float | None = msgspec.field(name="final_logit_softcapping", default=None)
    parallel_residual: bool = msgspec.field(name="use_parallel_residual", default=True)
    experts: int = msgspec.field(name="expert_count", default=0)
    rope_size: int | None = msgspec.field(name="rope.dimension_count", default=None)
    rope_base: float = msgspec.field(name="rope.freq_base", default=10_000.0)
    local_rope_base: float = msgspec.field(name="rope.freq_base_swa", default=10_000.0)
    scaling: str = msgspec.field(name="rope.scaling.type", default="none")
    factor: float | None = msgspec.field(name="rope.scaling.factor", default=None)
    original: int | None = msgspec.field(name="rope.scaling.original_context_length", default=None)
    linear_factor: float | None = msgspec.field(name="rope.scale_linear", default=None)
    attention_factor: float = msgspec.field(name="rope.scaling.attn_factor", default=1.0)
    yarn_attention_factor: float = msgspec.field(name="rope.scaling.yarn_attn_factor", default=1.0)
    yarn_log_multiplier: float = msgspec.field(name="rope.scaling.yarn_log_multiplier", default=0.0)
    yarn_extrapolation: float = msgspec.field(name="rope.scaling.yarn_ext_factor", default=1.0)
    beta_fast: float = msgspec.field(name="rope.scaling.yarn_beta_fast", default=32.0)
    beta_slow: float = msgspec.field(name="rope.scaling.yarn_beta_slow", default=1.0)

    @property
    def head_size(self) -> int:
        """H, explicit or derived."""
        return self.key_size or self.width // self.heads


def read_config(
    metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], factors: NDArray[np.float32] | None
) -> DecoderConfig:
    """What a file's model is.

    Args:
      metadata: all keys of the file.
      shapes: of all tensors, rows first.
      factors: the tensor ``ROPE_FACTORS``, if there is one.

    Raises:
      msgspec.ValidationError, ValueError: a key is missing or wrong, or names what Spotjax does not run.
    """
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ValueError(f"general.architecture {architecture!r} is not supported, only {', '.join(ARCHITECTURES)}")
    if metadata.get("split.count", 1) > 1:
        raise ValueError("GGUF files that are split are not supported; merge them with llama-gguf-split --merge")
    prefix = f"{architecture}."
    named = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    values = msgspec.convert(named, Metadata)
    _refuse_unsupported(values, architecture)
    if "token_embd.weight" not in shapes:
        raise ValueError("tensor token_embd.weight is missing")
    config = DecoderConfig(
        vocab=shapes["token_embd.weight"][0],
        width=values.width,
        layers=values.layers,
        heads=values.heads,
        kv_heads=values.kv_heads or values.heads,
        head_size=values.head_size,
        mlp=values.mlp,
        max_positions=values.max_positions,
        rope_base=values.rope_base,
        rope_scaling=_rope_scaling(values, factors),
        norm_epsilon=_epsilon(values, architecture),
        tied_embeddings="output.weight" not in shapes,
        output_bias="blk.0.attn_output.bias" in shapes,
    )
    if architecture in GPTS:
        return _gpt(config, values, shapes, architecture)
    config = replace(
        config,
        attention_bias="blk.0.attn_q.bias" in shapes,
        mlp_bias="blk.0.ffn_gate.bias" in shapes,
        qk_norm=architecture in ("qwen3", "gemma3"),
    )
    if architecture in WINDOW_EVERY:
        return _gemma(config, values, architecture)
    return replace(config, windows=window_pattern([values.window or None] * values.layers, values.max_positions))


def _gemma(config: DecoderConfig, values: Metadata, architecture: str) -> DecoderConfig:
    """Gemma 2 or 3."""
    c, second = config, architecture == "gemma2"
    window = values.window or (GEMMA2_WINDOW if second else None)
    every = values.window_every or WINDOW_EVERY[architecture]
    windows = [window if number % every else None for number in range(1, c.layers + 1)]
    softcaps = (values.attention_softcap, values.logit_softcap)
    if second:
        softcaps = (softcaps[0] or GEMMA2_ATTENTION_SOFTCAP, softcaps[1] or GEMMA2_LOGIT_SOFTCAP)
    elif softcaps[0]:
        raise ValueError("attn_logit_softcapping is not supported for gemma3")
    return replace(
        c,
        norm_place="both",
        zero_centered_norm=True,
        activation="gelu_tanh",
        embedding_scale=c.width**0.5,
        windows=window_pattern(windows, c.max_positions if second else None),
        local_rope_base=None if second else values.local_rope_base,
        attention_scale=(c.width // c.heads) ** -0.5 if c.layers == GEMMA_27B_LAYERS[architecture] else None,
        attention_softcap=softcaps[0] or None,
        logit_softcap=softcaps[1] or None,
    )


def _gpt(
    config: DecoderConfig, values: Metadata, shapes: Mapping[str, tuple[int, ...]], architecture: str
) -> DecoderConfig:
    """GPT-2, or GPT-NeoX, whose activation is not in the file: taken to be that of Pythia, not its approximation."""
    gpt = replace(
        config,
        norm="layer",
        activation="gelu_tanh",
        gated_mlp=False,
        attention_bias="blk.0.attn_qkv.bias" in shapes,
        mlp_bias="blk.0.ffn_up.bias" in shapes,
    )
    if architecture == "gpt2":
        return replace(gpt, positions="learned")
    return replace(gpt, activation="gelu", rotary_size=values.rope_size, parallel_residual=values.parallel_residual)


def _epsilon(values: Metadata, architecture: str) -> float:
    """That of the architecture's norms; written as float32, in which 1e-5 comes back as 9.99999974738e-06."""
    epsilon = values.layer_epsilon if architecture in GPTS else values.rms_epsilon
    if epsilon is None:
        raise ValueError(f"attention.layer_norm{'' if architecture in GPTS else '_rms'}_epsilon is missing")
    return float(str(np.float32(epsilon)))


def _refuse_unsupported(values: Metadata, architecture: str) -> None:
    if values.experts:
        raise ValueError(f"expert_count {values.experts}: mixtures of experts are not supported")
    windowed = ("llama", *WINDOW_EVERY)
    if architecture not in windowed and 0 < values.window < values.max_positions:  # in which layers is not in the file
        raise ValueError(f"attention.sliding_window {values.window} is not supported for {architecture}")
    sizes = [("attention.value_length", values.value_size)]
    if architecture != "gptneox":
        sizes.append(("rope.dimension_count", values.rope_size))
    for name, size in sizes:
        if size not in (None, values.head_size):
            raise ValueError(f"{name} {size} is not supported, only the head size {values.head_size}")


def _rope_scaling(values: Metadata, factors: NDArray[np.float32] | None) -> RopeScaling | None:
    factor = values.factor or values.linear_factor
    kind = "linear" if values.scaling == "none" and values.linear_factor not in (None, 1) else values.scaling
    if kind not in ("none", "linear", "yarn"):
        raise ValueError(f"rope.scaling.type {kind!r} is not supported, only none, linear, yarn")
    if factors is not None:
        if kind != "none":
            raise ValueError(f"rope.scaling.type {kind!r} together with tensor {ROPE_FACTORS} is not supported")
        return _llama3(values, factors)
    if kind == "none":
        return None
    if factor is None:
        raise ValueError(f"rope.scaling.type {kind!r} needs rope.scaling.factor")
    if kind == "linear":
        return RopeScaling("linear", factor)
    if values.yarn_extrapolation != 1 or values.yarn_log_multiplier:
        raise ValueError("rope.scaling.yarn_ext_factor and rope.scaling.yarn_log_multiplier are not supported")
    scale = values.attention_factor * values.yarn_attention_factor
    return RopeScaling(
        "yarn",
        factor,
        values.original or values.max_positions,
        beta_fast=values.beta_fast,
        beta_slow=values.beta_slow,
        attention_factor=None if scale == 1 else scale * (0.1 * math.log(factor) + 1),
    )


def _llama3(values: Metadata, factors: NDArray[np.float32]) -> RopeScaling | None:
    """The Llama 3 scaling that gives these factors, with the wavelength bounds of the published models."""
    if np.all(factors == 1):
        return None
    scaling = RopeScaling("llama3", float(factors.max()), values.original or LLAMA3_CONTEXT)
    turns = scaling.original_positions * values.rope_base ** -(np.arange(len(factors)) / len(factors)) / (2 * math.pi)
    smooth = (turns - scaling.low_frequency) / (scaling.high_frequency - scaling.low_frequency)
    smooth = np.clip(smooth, 0, 1)
    if len(factors) != values.head_size // 2 or not np.allclose(
        factors, 1 / ((1 - smooth) / scaling.factor + smooth), rtol=1e-4
    ):
        raise ValueError(f"tensor {ROPE_FACTORS} holds another rotary scaling than that of Llama 3")
    return scaling
