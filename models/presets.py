"""Well-known models by name as shapes without weights: enough to plan for and to simulate, nothing to serve.

``llama-3-8b`` and ``llama-3-70b`` have the exact shapes of their published configurations, in two bytes per element.
The other three are the models that SpotServe was measured with, GPT decoders in four bytes per element: OPT-6.7B as
published (learned positions, LayerNorm, ReLU, a feed-forward layer of 4 width), the others of that kind with GELU; with
the vocabularies of the original's measurements. What they call LLaMA-30B is a GPT of that size.
"""

from __future__ import annotations

from typing import Literal

from spotjax.errors import ConfigError
from spotjax.models.config import DecoderConfig, RopeScaling
from spotjax.models.spec import ModelSpec

_LLAMA3_SCALING = RopeScaling("llama3", factor=8.0, original_positions=8192)


def _gpt(layers: int, width: int, heads: int, vocab: int, activation: Literal["relu", "gelu"]) -> ModelSpec:
    config = DecoderConfig(
        vocab=vocab,
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_size=width // heads,
        mlp=4 * width,
        positions="learned",
        norm="layer",
        activation=activation,
        gated_mlp=False,
        tied_embeddings=True,
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
    )
    return ModelSpec(config, dtype_bytes=4)


def _llama3(layers: int, width: int, heads: int, mlp: int) -> ModelSpec:
    config = DecoderConfig(
        vocab=128_256,
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=8,
        head_size=128,
        mlp=mlp,
        max_positions=131_072,
        rope_base=500_000.0,
        rope_scaling=_LLAMA3_SCALING,
    )
    return ModelSpec(config, dtype_bytes=2)


PRESETS = {
    "opt-6.7b": _gpt(32, 4096, 32, 51_200, "relu"),
    "gpt-20b": _gpt(44, 6144, 48, 51_200, "gelu"),
    "llama-30b": _gpt(48, 7168, 56, 50_304, "gelu"),
    "llama-3-8b": _llama3(32, 4096, 32, 14_336),
    "llama-3-70b": _llama3(80, 8192, 64, 28_672),
}


def preset(name: str) -> ModelSpec:
    """The shapes of a well-known model.

    Raises:
      ConfigError: there is no preset of that name.
    """
    if name not in PRESETS:
        raise ConfigError(f"no model shapes are known as {name!r}; known are {', '.join(PRESETS)}")
    return PRESETS[name]
