"""Mixtral, Qwen2-MoE and Qwen3-MoE as Hugging Face keeps them: keys of ``config.json``, names of tensors.

All but their feed-forward layers is that of a dense relative, and is read as such.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec

from spotjax.models import huggingface_llama
from spotjax.models.config import DecoderConfig, Experts
from spotjax.models.huggingface_llama import read_llama
from spotjax.models.storage import TensorLayout

_SHARED = {
    "mlp.shared_gate": "mlp.shared_expert.gate_proj.weight",
    "mlp.shared_up": "mlp.shared_expert.up_proj.weight",
    "mlp.shared_down": "mlp.shared_expert.down_proj.weight",
    "mlp.shared_router": "mlp.shared_expert_gate.weight",
}
_MIXTRAL = {
    "mlp.router": "block_sparse_moe.gate.weight",
    "mlp.gate": "block_sparse_moe.experts.{}.w1.weight",
    "mlp.up": "block_sparse_moe.experts.{}.w3.weight",
    "mlp.down": "block_sparse_moe.experts.{}.w2.weight",
}
_QWEN = {
    "mlp.router": "mlp.gate.weight",
    "mlp.gate": "mlp.experts.{}.gate_proj.weight",
    "mlp.up": "mlp.experts.{}.up_proj.weight",
    "mlp.down": "mlp.experts.{}.down_proj.weight",
}
_DENSE = huggingface_llama.LAYOUT
MIXTRAL = TensorLayout({**_DENSE.names, **_MIXTRAL}, _DENSE.layer_prefix)
QWEN = TensorLayout({**_DENSE.names, **_QWEN, **_SHARED}, _DENSE.layer_prefix)


class MixtralKeys(msgspec.Struct):
    """The keys of ``config.json`` that matter of experts."""

    num_local_experts: int
    num_experts_per_tok: int


class QwenKeys(msgspec.Struct):
    """The same of Qwen; defaults are those of transformers."""

    num_experts_per_tok: int
    moe_intermediate_size: int
    num_experts: int | None = None
    num_local_experts: int | None = None
    shared_expert_intermediate_size: int = 0
    norm_topk_prob: bool = False
    decoder_sparse_step: int = 1
    mlp_only_layers: list[int] | None = None
    qkv_bias: bool = True
    use_sliding_window: bool = False


def read_mixtral(content: bytes) -> DecoderConfig:
    """A model of type ``mixtral``: Mistral with experts.

    Raises:
      msgspec.MsgspecError, ValueError: keys are missing or wrong, or name what Spotjax does not run.
    """
    keys = msgspec.json.decode(content, type=MixtralKeys)
    defaults = {"rms_norm_eps": 1e-5, "sliding_window": None, "rope_theta": 1e6, "num_key_value_heads": 8}
    dense = _read_dense(content, "mistral", defaults)
    return replace(dense, experts=Experts(keys.num_local_experts, keys.num_experts_per_tok))


def read_qwen2_moe(content: bytes) -> DecoderConfig:
    """A model of type ``qwen2_moe``: Qwen2 with experts, and one that every token goes through. Raises as above."""
    keys = _read_qwen(content)
    dense = _read_dense(content, "qwen2", {"num_key_value_heads": 16})
    experts = replace(_experts(keys), shared_mlp=keys.shared_expert_intermediate_size)
    return replace(dense, mlp=keys.moe_intermediate_size, attention_bias=keys.qkv_bias, experts=experts)


def read_qwen3_moe(content: bytes) -> DecoderConfig:
    """A model of type ``qwen3_moe``: Qwen3 with experts. Raises as above."""
    keys = _read_qwen(content)
    dense = _read_dense(content, "qwen3", {"num_key_value_heads": 4})
    return replace(dense, mlp=keys.moe_intermediate_size, experts=_experts(keys))


def _read_dense(content: bytes, relative: str, defaults: dict[str, Any]) -> DecoderConfig:
    keys = msgspec.json.decode(content, type=dict[str, Any])
    return read_llama(msgspec.json.encode(defaults | keys | {"model_type": relative}))


def _read_qwen(content: bytes) -> QwenKeys:
    keys = msgspec.json.decode(content, type=QwenKeys)
    if keys.decoder_sparse_step != 1 or keys.mlp_only_layers:
        name = "mlp_only_layers" if keys.mlp_only_layers else "decoder_sparse_step"
        raise ValueError(f"{name} {getattr(keys, name)} is not supported, only experts in every layer")
    if keys.use_sliding_window:
        raise ValueError("use_sliding_window true is not supported with experts")
    return keys


def _experts(keys: QwenKeys) -> Experts:
    count = keys.num_experts if keys.num_experts is not None else keys.num_local_experts
    if count is None:
        raise ValueError("num_experts is missing")
    return Experts(count, keys.num_experts_per_tok, normalized=keys.norm_topk_prob)
