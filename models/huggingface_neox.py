"""GPT-NeoX (Black et al. 2022) and Pythia as Hugging Face keeps them: keys of ``config.json``, names of tensors."""

from __future__ import annotations

from typing import Literal

import msgspec

from spotjax.models.config import DecoderConfig
from spotjax.models.huggingface_rope import RopeKeys, read_rope
from spotjax.models.storage import PART, TensorLayout

_QKV, _QKV_BIAS = "attention.query_key_value.weight", "attention.query_key_value.bias"
_NAMES = {
    "embedding": "gpt_neox.embed_in.weight",
    "norm.scale": "gpt_neox.final_layer_norm.weight",
    "norm.bias": "gpt_neox.final_layer_norm.bias",
    "head": "embed_out.weight",
    "attention_norm.scale": "input_layernorm.weight",
    "attention_norm.bias": "input_layernorm.bias",
    "attention.query": _QKV,
    "attention.key": _QKV,
    "attention.value": _QKV,
    "attention.output": "attention.dense.weight",
    "attention.query_bias": _QKV_BIAS,
    "attention.key_bias": _QKV_BIAS,
    "attention.value_bias": _QKV_BIAS,
    "attention.output_bias": "attention.dense.bias",
    "mlp_norm.scale": "post_attention_layernorm.weight",
    "mlp_norm.bias": "post_attention_layernorm.bias",
    "mlp.up": "mlp.dense_h_to_4h.weight",
    "mlp.up_bias": "mlp.dense_h_to_4h.bias",
    "mlp.down": "mlp.dense_4h_to_h.weight",
    "mlp.down_bias": "mlp.dense_4h_to_h.bias",
}
_PROJECTIONS = ("query", "key", "value")
LAYOUT = TensorLayout(
    _NAMES,
    "gpt_neox.layers.{}.",
    # Within every head its query, its key, its value.
    axes={f"attention.{name}": ((1, PART, 2), (0,)) for name in _PROJECTIONS}
    | {f"attention.{name}_bias": ((0, PART, 1),) for name in _PROJECTIONS},
    parts={
        f"attention.{name}{kind}": (number, 3) for number, name in enumerate(_PROJECTIONS) for kind in ("", "_bias")
    },
)
ACTIVATIONS: dict[str, Literal["relu", "gelu", "gelu_tanh"]] = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_fast": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
"""What transformers calls an activation; several names are the same function."""


class NeoxKeys(RopeKeys, kw_only=True):
    """The keys of ``config.json`` that matter; defaults are those of transformers."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    hidden_act: str = "gelu"
    rotary_pct: float = 0.25
    rotary_emb_base: float = 10_000.0
    layer_norm_eps: float = 1e-5
    use_parallel_residual: bool = True
    attention_bias: bool = True
    tie_word_embeddings: bool = False


def read_neox(content: bytes) -> DecoderConfig:
    """A model of type ``gpt_neox``.

    Raises:
      msgspec.MsgspecError, ValueError: keys are missing or wrong, or name what Spotjax does not run.
    """
    file = msgspec.json.decode(content, type=NeoxKeys)
    if file.hidden_act not in ACTIVATIONS:
        raise ValueError(f"hidden_act {file.hidden_act!r} is not supported, only {', '.join(ACTIVATIONS)}")
    if file.hidden_size % file.num_attention_heads:
        raise ValueError(f"hidden_size {file.hidden_size} is no multiple of {file.num_attention_heads} heads")
    head_size = file.hidden_size // file.num_attention_heads
    # Before version 5 of transformers these two had names of their own.
    file.rope_theta, file.partial_rotary_factor = file.rotary_emb_base, file.rotary_pct
    rope = read_rope(file)
    return DecoderConfig(
        vocab=file.vocab_size,
        width=file.hidden_size,
        layers=file.num_hidden_layers,
        heads=file.num_attention_heads,
        kv_heads=file.num_attention_heads,
        head_size=head_size,
        mlp=file.intermediate_size,
        max_positions=file.max_position_embeddings,
        rope_base=rope.base,
        rope_scaling=rope.scaling,
        rotary_size=int(head_size * rope.fraction),
        norm="layer",
        norm_epsilon=file.layer_norm_eps,
        parallel_residual=file.use_parallel_residual,
        activation=ACTIVATIONS[file.hidden_act],
        gated_mlp=False,
        tied_embeddings=file.tie_word_embeddings,
        attention_bias=file.attention_bias,
        output_bias=file.attention_bias,
        mlp_bias=True,
    )
