"""Well-known models by name as shapes without weights: enough to plan for and to simulate, nothing to serve.

``opt-6.7b``, ``gpt-20b`` and ``llama-30b`` are the models that SpotServe was measured with, GPT decoders in four bytes
per element: OPT-6.7B as published (learned positions, LayerNorm, ReLU, a feed-forward layer of 4 width), the others of
that kind with GELU; with the vocabularies of the original's measurements. What they call LLaMA-30B is a GPT of that
size. All others have the shapes of their published configurations, in two bytes per element.
"""

from __future__ import annotations

from typing import Any, Literal

from spotjax.errors import ConfigError
from spotjax.models.config import DecoderConfig, Experts, RopeScaling
from spotjax.models.spec import ModelSpec

_LLAMA3_SCALING = RopeScaling("llama3", factor=8.0, original_positions=8192)
_GEMMA3_SCALING = RopeScaling("linear", factor=8.0)


def _of_the_paper(layers: int, width: int, heads: int, vocab: int, activation: Literal["relu", "gelu"]) -> ModelSpec:
    return ModelSpec(_gpt(layers, width, heads, vocab, activation=activation), dtype_bytes=4)


def _gpt(layers: int, width: int, heads: int, vocab: int, **others: Any) -> DecoderConfig:
    """LayerNorm, biases everywhere, a feed-forward layer of 4 width without a gate."""
    common: dict[str, Any] = {
        "positions": "learned", "tied_embeddings": True, "norm": "layer", "gated_mlp": False,
        "attention_bias": True, "output_bias": True, "mlp_bias": True,
    }  # fmt: skip
    return DecoderConfig(vocab, width, layers, heads, heads, width // heads, 4 * width, **(common | others))


def _opt(layers: int, width: int, heads: int, **others: Any) -> ModelSpec:
    return _published(_gpt(layers, width, heads, 50_272, activation="relu", **others))


def _neox(layers: int, width: int, heads: int, vocab: int = 50_304, activation: str = "gelu") -> ModelSpec:
    rotary = {"positions": "rotary", "rotary_size": width // heads // 4}
    return _published(
        _gpt(
            layers, width, heads, vocab, **rotary, parallel_residual=True, tied_embeddings=False, activation=activation
        )
    )


def _llama(layers: int, width: int, heads: int, kv_heads: int, mlp: int, vocab: int, **others: Any) -> ModelSpec:
    """Heads of 128 unless told otherwise."""
    head_size = others.pop("head_size", 128)
    return _published(DecoderConfig(vocab, width, layers, heads, kv_heads, head_size, mlp, **others))


def _llama3(layers: int, width: int, heads: int, mlp: int) -> ModelSpec:
    rope = {"max_positions": 131_072, "rope_base": 500_000.0, "rope_scaling": _LLAMA3_SCALING}
    return _llama(layers, width, heads, 8, mlp, 128_256, **rope)


def _mistral(vocab: int, **others: Any) -> ModelSpec:
    return _llama(32, 4096, 32, 8, 14_336, vocab, max_positions=32_768, **others)


def _qwen2(layers: int, width: int, heads: int, kv_heads: int, mlp: int, vocab: int, **others: Any) -> ModelSpec:
    common: dict[str, Any] = {
        "max_positions": 32_768, "rope_base": 1e6, "norm_epsilon": 1e-6, "attention_bias": True,
    }  # fmt: skip
    return _llama(layers, width, heads, kv_heads, mlp, vocab, **(common | others))


def _qwen3(
    layers: int,
    width: int,
    heads: int,
    mlp: int,
    *,
    kv_heads: int = 8,
    tied: bool = False,
    experts: Experts | None = None,
) -> ModelSpec:
    common = {"max_positions": 40_960, "rope_base": 1e6, "norm_epsilon": 1e-6, "qk_norm": True}
    return _llama(layers, width, heads, kv_heads, mlp, 151_936, **common, tied_embeddings=tied, experts=experts)


def _gemma(layers: int, width: int, heads: int, kv_heads: int, mlp: int, vocab: int, **others: Any) -> ModelSpec:
    common = {
        "head_size": 256, "norm_epsilon": 1e-6, "norm_place": "both", "zero_centered_norm": True,
        "activation": "gelu_tanh", "tied_embeddings": True, "embedding_scale": width**0.5,
    }  # fmt: skip
    return _llama(layers, width, heads, kv_heads, mlp, vocab, **(common | others))


def _gemma2(layers: int, width: int, heads: int, kv_heads: int, mlp: int, **others: Any) -> ModelSpec:
    common = {"max_positions": 8192, "windows": (4096, None), "attention_softcap": 50.0, "logit_softcap": 30.0}
    return _gemma(layers, width, heads, kv_heads, mlp, 256_000, **common, **others)


def _gemma3(layers: int, width: int, heads: int, kv_heads: int, mlp: int, **others: Any) -> ModelSpec:
    common: dict[str, Any] = {
        "max_positions": 131_072, "windows": (*(1024,) * 5, None), "rope_base": 1e6, "rope_scaling": _GEMMA3_SCALING,
        "local_rope_base": 1e4, "qk_norm": True, "vocab": 262_208,
    }  # fmt: skip
    return _gemma(layers, width, heads, kv_heads, mlp, **(common | others))


def _published(config: DecoderConfig) -> ModelSpec:
    return ModelSpec(config, dtype_bytes=2)


PRESETS = {
    "opt-6.7b": _of_the_paper(32, 4096, 32, 51_200, "relu"),
    "gpt-20b": _of_the_paper(44, 6144, 48, 51_200, "gelu"),
    "llama-30b": _of_the_paper(48, 7168, 56, 50_304, "gelu"),
    "llama-2-7b": _llama(32, 4096, 32, 32, 11_008, 32_000, max_positions=4096),
    "llama-2-13b": _llama(40, 5120, 40, 40, 13_824, 32_000, max_positions=4096),
    "llama-2-70b": _llama(80, 8192, 64, 8, 28_672, 32_000, max_positions=4096),
    "llama-3-8b": _llama3(32, 4096, 32, 14_336),
    "llama-3-70b": _llama3(80, 8192, 64, 28_672),
    "opt-125m": _opt(12, 768, 12),
    "opt-350m": _opt(24, 1024, 16, embedding_width=512, norm_place="after"),
    "opt-1.3b": _opt(24, 2048, 32),
    "opt-2.7b": _opt(32, 2560, 32),
    "opt-13b": _opt(40, 5120, 40),
    "opt-30b": _opt(48, 7168, 56),
    "opt-66b": _opt(64, 9216, 72),
    "pythia-70m": _neox(6, 512, 8),
    "pythia-160m": _neox(12, 768, 12),
    "pythia-410m": _neox(24, 1024, 16),
    "pythia-1b": _neox(16, 2048, 8),
    "pythia-1.4b": _neox(24, 2048, 16),
    "pythia-2.8b": _neox(32, 2560, 32),
    "pythia-6.9b": _neox(32, 4096, 32, 50_432),
    "pythia-12b": _neox(36, 5120, 40, 50_688),
    "gpt-neox-20b": _neox(44, 6144, 64, 50_432, activation="gelu_tanh"),
    "mistral-7b-v0.1": _mistral(32_000, windows=(4096,)),
    "mistral-7b-v0.3": _mistral(32_768, rope_base=1e6),
    "qwen2.5-0.5b": _qwen2(24, 896, 14, 2, 4864, 151_936, head_size=64, tied_embeddings=True),
    "qwen2.5-1.5b": _qwen2(28, 1536, 12, 2, 8960, 151_936, tied_embeddings=True),
    "qwen2.5-3b": _qwen2(36, 2048, 16, 2, 11_008, 151_936, tied_embeddings=True),
    "qwen2.5-7b": _qwen2(28, 3584, 28, 4, 18_944, 152_064),
    "qwen2.5-14b": _qwen2(48, 5120, 40, 8, 13_824, 152_064),
    "qwen2.5-32b": _qwen2(64, 5120, 40, 8, 27_648, 152_064),
    "qwen2.5-72b": _qwen2(80, 8192, 64, 8, 29_568, 152_064),
    "qwen3-0.6b": _qwen3(28, 1024, 16, 3072, tied=True),
    "qwen3-1.7b": _qwen3(28, 2048, 16, 6144, tied=True),
    "qwen3-4b": _qwen3(36, 2560, 32, 9728, tied=True),
    "qwen3-8b": _qwen3(36, 4096, 32, 12_288),
    "qwen3-14b": _qwen3(40, 5120, 40, 17_408),
    "qwen3-32b": _qwen3(64, 5120, 64, 25_600),
    "gemma-2-2b": _gemma2(26, 2304, 8, 4, 9216),
    "gemma-2-9b": _gemma2(42, 3584, 16, 8, 14_336),
    "gemma-2-27b": _gemma2(46, 4608, 32, 16, 36_864, head_size=128, attention_scale=144**-0.5),
    "gemma-3-1b": _gemma3(
        26, 1152, 4, 1, 6912, max_positions=32_768, windows=(*(512,) * 5, None), rope_scaling=None, vocab=262_144
    ),
    "gemma-3-4b": _gemma3(34, 2560, 8, 4, 10_240),
    "gemma-3-12b": _gemma3(48, 3840, 16, 8, 15_360),
    "gemma-3-27b": _gemma3(62, 5376, 32, 16, 21_504, head_size=128, attention_scale=168**-0.5),
    "mixtral-8x7b": _mistral(32_000, rope_base=1e6, experts=Experts(8, 2)),
    "mixtral-8x22b": _llama(
        56, 6144, 48, 8, 16_384, 32_768, max_positions=65_536, rope_base=1e6, experts=Experts(8, 2)
    ),
    "qwen1.5-moe-a2.7b": _qwen2(
        24, 2048, 16, 16, 1408, 151_936, max_positions=8192, experts=Experts(60, 4, normalized=False, shared_mlp=5632)
    ),
    "qwen2-57b-a14b": _qwen2(
        28, 3584, 28, 4, 2560, 151_936, experts=Experts(64, 8, normalized=False, shared_mlp=20_480)
    ),
    "qwen3-30b-a3b": _qwen3(48, 2048, 32, 768, kv_heads=4, experts=Experts(128, 8)),
}
"""Of Gemma 3 the language model."""


def preset(name: str) -> ModelSpec:
    """The shapes of a well-known model.

    Raises:
      ConfigError: there is no preset of that name.
    """
    if name not in PRESETS:
        raise ConfigError(f"no model shapes are known as {name!r}; known are {', '.join(PRESETS)}")
    return PRESETS[name]
