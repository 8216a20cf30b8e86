"""Reads Hugging Face's ``config.json``; what Spotjax cannot compute exactly is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from spotjax.errors import CheckpointError
from spotjax.models import (
    huggingface_experts,
    huggingface_gemma,
    huggingface_gpt2,
    huggingface_llama,
    huggingface_neox,
    huggingface_opt,
)
from spotjax.models.config import DecoderConfig
from spotjax.models.storage import TensorLayout


@dataclass(frozen=True, slots=True)
class Family:
    """Models that Hugging Face keeps alike.

    Attributes:
      read: ``config.json`` as a configuration.
      layout: of its checkpoints.
    """

    read: Callable[[bytes], DecoderConfig]
    layout: TensorLayout


_LLAMA = Family(huggingface_llama.read_llama, huggingface_llama.LAYOUT)
FAMILIES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "mixtral": Family(huggingface_experts.read_mixtral, huggingface_experts.MIXTRAL),
    "qwen2_moe": Family(huggingface_experts.read_qwen2_moe, huggingface_experts.QWEN),
    "qwen3_moe": Family(huggingface_experts.read_qwen3_moe, huggingface_experts.QWEN),
    "gemma2": Family(huggingface_gemma.read_gemma2, huggingface_gemma.LAYOUT),
    "gemma3_text": Family(huggingface_gemma.read_gemma3, huggingface_gemma.LAYOUT),
    "gemma3": Family(huggingface_gemma.read_gemma3_with_vision, huggingface_gemma.WITH_VISION),
    "opt": Family(huggingface_opt.read_opt, huggingface_opt.LAYOUT),
    "gpt_neox": Family(huggingface_neox.read_neox, huggingface_neox.LAYOUT),
    "gpt2": Family(huggingface_gpt2.read_gpt2, huggingface_gpt2.LAYOUT),
}
"""Values of ``model_type`` that are read; SmolLM2, TinyLlama and others say ``llama``."""

NO_DECODER = ("is_encoder_decoder", "add_cross_attention", "use_bidirectional_attention", "pruned_heads")
"""Keys that any ``config.json`` may have, and that change what is computed unless they are false or empty."""


def read_config(path: Path) -> tuple[DecoderConfig, TensorLayout]:
    """The model that a ``config.json`` describes, and how its weights are kept beside it.

    Raises:
      CheckpointError: no such file, not valid, or a model that Spotjax does not run.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist")
    try:
        content = path.read_bytes()
        keys = msgspec.json.decode(content, type=dict[str, Any])
        if (family := FAMILIES.get(keys.get("model_type", ""))) is None:
            raise ValueError(f"model_type {keys.get('model_type')!r} is not supported, only {', '.join(FAMILIES)}")
        _refuse_quantized(keys)
        _refuse_no_decoder(keys | (text if isinstance(text := keys.get("text_config"), dict) else {}))
        return family.read(content), family.layout
    except (msgspec.MsgspecError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def _refuse_quantized(keys: dict[str, Any]) -> None:
    if (quantized := keys.get("quantization_config")) is not None:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise ValueError(f"quantization_config ({method}) is not supported; use unquantized weights or a GGUF file")


def _refuse_no_decoder(keys: dict[str, Any]) -> None:
    """What every configuration of transformers may say, and no decoder here is."""
    if said := [key for key in NO_DECODER if keys.get(key)]:
        raise ValueError(f"{said[0]} {msgspec.json.encode(keys[said[0]]).decode()} is not supported")
