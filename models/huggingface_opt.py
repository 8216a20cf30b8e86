"""OPT (Zhang et al. 2022) as Hugging Face keeps it: keys of ``config.json``, names of tensors."""

from __future__ import annotations

import msgspec

from spotjax.models.config import DecoderConfig
from spotjax.models.storage import TensorLayout

_NAMES = {
    "embedding": "model.decoder.embed_tokens.weight",
    "positions": "model.decoder.embed_positions.weight",
    "input_projection": "model.decoder.project_in.weight",
    "norm.scale": "model.decoder.final_layer_norm.weight",
    "norm.bias": "model.decoder.final_layer_norm.bias",
    "output_projection": "model.decoder.project_out.weight",
    "head": "lm_head.weight",
    "attention_norm.scale": "self_attn_layer_norm.weight",
    "attention_norm.bias": "self_attn_layer_norm.bias",
    "attention.query": "self_attn.q_proj.weight",
    "attention.key": "self_attn.k_proj.weight",
    "attention.value": "self_attn.v_proj.weight",
    "attention.output": "self_attn.out_proj.weight",
    "attention.query_bias": "self_attn.q_proj.bias",
    "attention.key_bias": "self_attn.k_proj.bias",
    "attention.value_bias": "self_attn.v_proj.bias",
    "attention.output_bias": "self_attn.out_proj.bias",
    "mlp_norm.scale": "final_layer_norm.weight",
    "mlp_norm.bias": "final_layer_norm.bias",
    "mlp.up": "fc1.weight",
    "mlp.up_bias": "fc1.bias",
    "mlp.down": "fc2.weight",
    "mlp.down_bias": "fc2.bias",
}
PADDING_POSITIONS = 2
"""Rows of the table of positions before position 0: left for padding, which Spotjax has none of."""
LAYOUT = TensorLayout(_NAMES, "model.decoder.layers.{}.", skipped={"positions": PADDING_POSITIONS})


class OptKeys(msgspec.Struct):
    """The keys of ``config.json`` that matter; defaults are those of transformers."""

    vocab_size: int
    hidden_size: int
    ffn_dim: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    word_embed_proj_dim: int | None = None
    do_layer_norm_before: bool = True
    remove_final_layer_norm: bool = msgspec.field(name="_remove_final_layer_norm", default=False)
    layer_norm_elementwise_affine: bool = True
    activation_function: str = "relu"
    enable_bias: bool = True
    tie_word_embeddings: bool = True


def read_opt(content: bytes) -> DecoderConfig:
    """A model of type ``opt``; those before version 4.20 of transformers lack a final norm by mistake.

    Raises:
      msgspec.MsgspecError, ValueError: keys are missing or wrong, or name what Spotjax does not run.
    """
    file = msgspec.json.decode(content, type=OptKeys)
    if file.remove_final_layer_norm and file.do_layer_norm_before:
        raise ValueError("_remove_final_layer_norm true is not supported together with do_layer_norm_before true")
    if not file.layer_norm_elementwise_affine:
        raise ValueError("layer_norm_elementwise_affine false is not supported")
    if file.activation_function != "relu":
        raise ValueError(f"activation_function {file.activation_function!r} is not supported, only 'relu'")
    if file.hidden_size % file.num_attention_heads:
        raise ValueError(f"hidden_size {file.hidden_size} is no multiple of {file.num_attention_heads} heads")
    embedding_width = file.word_embed_proj_dim or file.hidden_size
    return DecoderConfig(
        vocab=file.vocab_size,
        width=file.hidden_size,
        layers=file.num_hidden_layers,
        heads=file.num_attention_heads,
        kv_heads=file.num_attention_heads,
        head_size=file.hidden_size // file.num_attention_heads,
        mlp=file.ffn_dim,
        max_positions=file.max_position_embeddings,
        positions="learned",
        norm="layer",
        norm_place="before" if file.do_layer_norm_before else "after",
        activation="relu",
        gated_mlp=False,
        embedding_width=None if embedding_width == file.hidden_size else embedding_width,
        tied_embeddings=file.tie_word_embeddings,
        attention_bias=file.enable_bias,
        output_bias=file.enable_bias,
        mlp_bias=file.enable_bias,
    )
