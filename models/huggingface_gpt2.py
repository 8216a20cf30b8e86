"""GPT-2 (Radford et al. 2019) as Hugging Face keeps it: keys of ``config.json``, names of tensors."""

from __future__ import annotations

import msgspec

from spotjax.models.config import DecoderConfig
from spotjax.models.storage import PART, TensorLayout

_QKV, _QKV_BIAS = "attn.c_attn.weight", "attn.c_attn.bias"
_NAMES = {
    "embedding": "transformer.wte.weight",
    "positions": "transformer.wpe.weight",
    "norm.scale": "transformer.ln_f.weight",
    "norm.bias": "transformer.ln_f.bias",
    "head": "lm_head.weight",
    "attention_norm.scale": "ln_1.weight",
    "attention_norm.bias": "ln_1.bias",
    "attention.query": _QKV,
    "attention.key": _QKV,
    "attention.value": _QKV,
    "attention.output": "attn.c_proj.weight",
    "attention.query_bias": _QKV_BIAS,
    "attention.key_bias": _QKV_BIAS,
    "attention.value_bias": _QKV_BIAS,
    "attention.output_bias": "attn.c_proj.bias",
    "mlp_norm.scale": "ln_2.weight",
    "mlp_norm.bias": "ln_2.bias",
    "mlp.up": "mlp.c_fc.weight",
    "mlp.up_bias": "mlp.c_fc.bias",
    "mlp.down": "mlp.c_proj.weight",
    "mlp.down_bias": "mlp.c_proj.bias",
}
_PROJECTIONS = ("query", "key", "value")
LAYOUT = TensorLayout(
    _NAMES,
    "transformer.h.{}.",
    # Kernels are (in, out) here; all queries, then all keys, then all values.
    axes={f"attention.{name}": ((0,), (PART, 1, 2)) for name in _PROJECTIONS}
    | {f"attention.{name}_bias": ((PART, 0, 1),) for name in _PROJECTIONS}
    | {"attention.output": ((0, 1), (2,)), "mlp.up": ((0,), (1,)), "mlp.down": ((0,), (1,))},
    parts={
        f"attention.{name}{kind}": (number, 3) for number, name in enumerate(_PROJECTIONS) for kind in ("", "_bias")
    },
)


class Gpt2Keys(msgspec.Struct):
    """The keys of ``config.json`` that matter; defaults are those of transformers."""

    vocab_size: int
    n_embd: int
    n_layer: int
    n_head: int
    n_positions: int
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    tie_word_embeddings: bool = True


def read_gpt2(content: bytes) -> DecoderConfig:
    """A model of type ``gpt2``.

    Raises:
      msgspec.MsgspecError, ValueError: keys are missing or wrong, or name what Spotjax does not run.
    """
    file = msgspec.json.decode(content, type=Gpt2Keys)
    if file.activation_function not in ("gelu_new", "gelu_pytorch_tanh"):
        raise ValueError(f"activation_function {file.activation_function!r} is not supported, only 'gelu_new'")
    if not file.scale_attn_weights or file.scale_attn_by_inverse_layer_idx:
        raise ValueError("scale_attn_weights false and scale_attn_by_inverse_layer_idx true are not supported")
    if file.n_embd % file.n_head:
        raise ValueError(f"n_embd {file.n_embd} is no multiple of {file.n_head} heads")
    return DecoderConfig(
        vocab=file.vocab_size,
        width=file.n_embd,
        layers=file.n_layer,
        heads=file.n_head,
        kv_heads=file.n_head,
        head_size=file.n_embd // file.n_head,
        mlp=file.n_inner or 4 * file.n_embd,
        max_positions=file.n_positions,
        positions="learned",
        norm="layer",
        norm_epsilon=file.layer_norm_epsilon,
        activation="gelu_tanh",
        gated_mlp=False,
        tied_embeddings=file.tie_word_embeddings,
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
    )
