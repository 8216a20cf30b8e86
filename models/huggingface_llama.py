"""The Llama family as Hugging Face keeps it: keys of ``config.json``, names of tensors."""

from __future__ import annotations

import msgspec

from spotjax.models.config import DecoderConfig, window_pattern
from spotjax.models.huggingface_rope import RopeKeys, read_rope
from spotjax.models.huggingface_windows import FULL, SLIDING, read_windows
from spotjax.models.storage import TensorLayout

_NAMES = {
    "embedding": "model.embed_tokens.weight",
    "norm.scale": "model.norm.weight",
    "head": "lm_head.weight",
    "attention_norm.scale": "input_layernorm.weight",
    "attention.query": "self_attn.q_proj.weight",
    "attention.key": "self_attn.k_proj.weight",
    "attention.value": "self_attn.v_proj.weight",
    "attention.output": "self_attn.o_proj.weight",
    "attention.query_bias": "self_attn.q_proj.bias",
    "attention.key_bias": "self_attn.k_proj.bias",
    "attention.value_bias": "self_attn.v_proj.bias",
    "attention.output_bias": "self_attn.o_proj.bias",
    "attention.query_norm": "self_attn.q_norm.weight",
    "attention.key_norm": "self_attn.k_norm.weight",
    "mlp_norm.scale": "post_attention_layernorm.weight",
    "mlp.gate": "mlp.gate_proj.weight",
    "mlp.up": "mlp.up_proj.weight",
    "mlp.down": "mlp.down_proj.weight",
    "mlp.gate_bias": "mlp.gate_proj.bias",
    "mlp.up_bias": "mlp.up_proj.bias",
    "mlp.down_bias": "mlp.down_proj.bias",
}
LAYOUT = TensorLayout(_NAMES, "model.layers.{}.")


class LlamaKeys(RopeKeys, kw_only=True):
    """The keys of ``config.json`` that matter; defaults are those of transformers."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    use_sliding_window: bool = False
    sliding_window: int | None = 4096
    max_window_layers: int = 28
    layer_types: list[str] | None = None


def read_llama(content: bytes) -> DecoderConfig:
    """A model of type ``llama``, ``mistral``, ``qwen2`` or ``qwen3``.

    Raises:
      msgspec.MsgspecError, ValueError: keys are missing or wrong, or name what Spotjax does not run.
    """
    file = msgspec.json.decode(content, type=LlamaKeys)
    _refuse_unsupported(file)
    rope = read_rope(file)
    if rope.fraction != 1:
        raise ValueError("partial_rotary_factor other than 1 is not supported")
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
        rope_base=rope.base,
        rope_scaling=rope.scaling,
        norm_epsilon=file.rms_norm_eps,
        tied_embeddings=file.tie_word_embeddings,
        attention_bias=biased or qwen2,
        output_bias=biased,
        mlp_bias=file.mlp_bias and llama,
        qk_norm=qwen3,
        windows=window_pattern(_windows(file), file.max_position_embeddings),
    )


def _refuse_unsupported(file: LlamaKeys) -> None:
    if file.hidden_act not in ("silu", "swish"):
        raise ValueError(f"hidden_act {file.hidden_act!r} is not supported, only 'silu'")


def _windows(file: LlamaKeys) -> list[int | None]:
    """Of all layers: Mistral's are alike; Qwen's first ones see all, unless it is spelled out."""
    layers, mistral = file.num_hidden_layers, file.model_type == "mistral"
    windowed = mistral or (file.use_sliding_window and file.model_type != "llama")
    window, first = file.sliding_window if windowed else None, 0 if mistral else file.max_window_layers
    layer_types = [FULL if window is None or layer < first else SLIDING for layer in range(layers)]
    if mistral and file.layer_types not in (None, layer_types):
        raise ValueError(f"layer_types other than {layer_types[0]} is not supported with this sliding_window")
    return read_windows(file.layer_types or layer_types, layers, window)
