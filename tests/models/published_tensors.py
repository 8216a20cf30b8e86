"""The arrays of a model as transformers' source says how to find them in published tensors, written out one by one."""

from __future__ import annotations

import numpy as np

from spotjax.models.config import DecoderConfig, Experts
from spotjax.models.spec import ArraySpec

Tensors = dict[str, np.ndarray]


def published(array: ArraySpec, c: DecoderConfig, tensors: Tensors) -> np.ndarray:
    """One array, in our layout."""
    if "model.decoder.embed_tokens.weight" in tensors:
        return _opt(array, c, tensors)
    if "gpt_neox.embed_in.weight" in tensors:
        return _neox(array, c, tensors)
    return _gpt2(array, c, tensors) if "transformer.wte.weight" in tensors else _llama(array, c, tensors)


def _llama(array: ArraySpec, c: DecoderConfig, tensors: Tensors) -> np.ndarray:
    if array.layer is None:
        return {
            "embedding": lambda: tensors["model.embed_tokens.weight"],
            "norm.scale": lambda: tensors["model.norm.weight"],
            "head": lambda: tensors["lm_head.weight"].T,
        }[array.name]()
    layer = f"model.layers.{array.layer}."
    name = array.name.removeprefix(f"layers.{array.layer}.")
    letters = {"query": ("q", c.heads), "key": ("k", c.kv_heads), "value": ("v", c.kv_heads)}
    module, _, rest = name.partition(".")
    if module == "attention":
        base, _, kind = rest.partition("_")
        if kind == "norm":
            return tensors[f"{layer}self_attn.{letters[base][0]}_norm.weight"]
        if rest == "output":
            return tensors[f"{layer}self_attn.o_proj.weight"].T.reshape(c.heads, c.head_size, c.width)
        if rest == "output_bias":
            return tensors[f"{layer}self_attn.o_proj.bias"]
        letter, heads = letters[base]
        if kind == "bias":
            return tensors[f"{layer}self_attn.{letter}_proj.bias"].reshape(heads, c.head_size)
        return tensors[f"{layer}self_attn.{letter}_proj.weight"].T.reshape(c.width, heads, c.head_size)
    if module == "mlp" and c.experts is not None:
        return _experts(rest, c.experts, layer, tensors)
    if module == "mlp":
        base, _, kind = rest.partition("_")
        return tensors[f"{layer}mlp.{base}_proj.bias"] if kind else tensors[f"{layer}mlp.{base}_proj.weight"].T
    # The same name is of a norm before the feed-forward layer, or of one after attention.
    mlp_norm = "pre_feedforward_layernorm" if c.norm_place == "both" else "post_attention_layernorm"
    norms = {
        "attention_norm": "input_layernorm", "attention_output_norm": "post_attention_layernorm",
        "mlp_norm": mlp_norm, "mlp_output_norm": "post_feedforward_layernorm",
    }  # fmt: skip
    return tensors[f"{layer}{norms[module]}.weight"]


def _experts(name: str, experts: Experts, layer: str, tensors: Tensors) -> np.ndarray:
    mixtral = f"{layer}block_sparse_moe.gate.weight" in tensors
    if name == "router":
        return tensors[f"{layer}{'block_sparse_moe' if mixtral else 'mlp'}.gate.weight"].T
    if name == "shared_router":
        return tensors[f"{layer}mlp.shared_expert_gate.weight"].T
    if name.startswith("shared_"):
        return tensors[f"{layer}mlp.shared_expert.{name.removeprefix('shared_')}_proj.weight"].T
    # w2(act_fn(w1(hidden_states)) * w3(hidden_states))
    letters = {"gate": "w1", "up": "w3", "down": "w2"}
    one = f"block_sparse_moe.experts.{{}}.{letters[name]}" if mixtral else f"mlp.experts.{{}}.{name}_proj"
    return np.stack([tensors[f"{layer}{one.format(n)}.weight"].T for n in range(experts.count)])


def _local(array: ArraySpec) -> tuple[str, str]:
    """Module, or nothing, and name of an array."""
    prefix = "" if array.layer is None else f"layers.{array.layer}."
    module, _, name = array.name.removeprefix(prefix).rpartition(".")
    return module, name


def _opt(array: ArraySpec, c: DecoderConfig, tensors: Tensors) -> np.ndarray:
    t = {name.removeprefix("model.decoder."): tensor for name, tensor in tensors.items()}
    module, name = _local(array)
    if array.layer is None:
        found = {
            "embedding": lambda: t["embed_tokens.weight"],
            "positions": lambda: t["embed_positions.weight"][2:],  # OPTLearnedPositionalEmbedding.offset
            "input_projection": lambda: t["project_in.weight"].T,
            "output_projection": lambda: t["project_out.weight"].T,
            "scale": lambda: t["final_layer_norm.weight"],
            "bias": lambda: t["final_layer_norm.bias"],
        }
        return found[name]()
    layer = f"layers.{array.layer}."
    if module.endswith("norm"):
        norm = {"attention_norm": "self_attn_layer_norm", "mlp_norm": "final_layer_norm"}[module]
        return t[f"{layer}{norm}.{'weight' if name == 'scale' else 'bias'}"]
    base, _, bias = name.partition("_")
    if module == "mlp":
        matrix = {"up": "fc1", "down": "fc2"}[base]
        return t[f"{layer}{matrix}.bias"] if bias else t[f"{layer}{matrix}.weight"].T
    matrix = f"{layer}self_attn." + {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "out_proj"}[base]
    if base == "output":
        return t[f"{matrix}.bias"] if bias else t[f"{matrix}.weight"].T.reshape(c.heads, c.head_size, c.width)
    return t[f"{matrix}.bias"].reshape(c.heads, -1) if bias else t[f"{matrix}.weight"].T.reshape(c.width, c.heads, -1)


def _neox(array: ArraySpec, c: DecoderConfig, tensors: Tensors) -> np.ndarray:
    t = {name.removeprefix("gpt_neox."): tensor for name, tensor in tensors.items()}
    module, name = _local(array)
    if array.layer is None:
        found = {
            "embedding": lambda: t["embed_in.weight"],
            "head": lambda: t["embed_out.weight"].T,
            "scale": lambda: t["final_layer_norm.weight"],
            "bias": lambda: t["final_layer_norm.bias"],
        }
        return found[name]()
    layer = f"layers.{array.layer}."
    if module.endswith("norm"):
        norm = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}[module]
        return t[f"{layer}{norm}.{'weight' if name == 'scale' else 'bias'}"]
    base, _, bias = name.partition("_")
    if module == "mlp":
        matrix = {"up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h"}[base]
        return t[f"{layer}{matrix}.bias"] if bias else t[f"{layer}{matrix}.weight"].T
    if base == "output":
        matrix = f"{layer}attention.dense"
        return t[f"{matrix}.bias"] if bias else t[f"{matrix}.weight"].T.reshape(c.heads, c.head_size, c.width)
    fused = t[f"{layer}attention.query_key_value.{'bias' if bias else 'weight'}"]
    # view(*input_shape, -1, 3 * self.head_size), then chunk(3, dim=-1)
    mine = np.split(fused.reshape(c.heads, 3 * c.head_size, -1), 3, axis=1)[("query", "key", "value").index(base)]
    return mine[..., 0] if bias else mine.transpose(2, 0, 1)


def _gpt2(array: ArraySpec, c: DecoderConfig, tensors: Tensors) -> np.ndarray:
    t = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    module, name = _local(array)
    if array.layer is None:
        found = {
            "embedding": lambda: t["wte.weight"],
            "positions": lambda: t["wpe.weight"],
            "scale": lambda: t["ln_f.weight"],
            "bias": lambda: t["ln_f.bias"],
        }
        return found[name]()
    layer = f"h.{array.layer}."
    if module.endswith("norm"):
        norm = {"attention_norm": "ln_1", "mlp_norm": "ln_2"}[module]
        return t[f"{layer}{norm}.{'weight' if name == 'scale' else 'bias'}"]
    base, _, bias = name.partition("_")
    kind = "bias" if bias else "weight"
    if module == "mlp":
        return t[f"{layer}mlp.{'c_fc' if base == 'up' else 'c_proj'}.{kind}"]
    if base == "output":
        output = t[f"{layer}attn.c_proj.{kind}"]
        return output if bias else output.reshape(c.heads, c.head_size, c.width)
    # Conv1D is (in, out); c_attn(hidden_states).split(self.split_size, dim=2)
    mine = np.split(t[f"{layer}attn.c_attn.{kind}"], 3, axis=-1)[("query", "key", "value").index(base)]
    return mine.reshape(*mine.shape[:-1], c.heads, c.head_size)
