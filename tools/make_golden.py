"""Makes the golden files of the parity tests: tiny random checkpoints, and what Hugging Face transformers computes.

    pip install spotjax[parity]
    python -m spotjax.tools.make_golden tests/golden
    python -m spotjax.tools.make_golden tests/golden --smollm2 PATH/SmolLM2-135M-Instruct.Q4_1.gguf

The first form writes, for each of ``CASES``, ``<name>/config.json`` and ``<name>/model*.safetensors`` (weights that
float16 or bfloat16 hold exactly) and ``<name>/golden.npz``:

    prompt_0 .. prompt_2   int32 [T], token ids
    greedy_0 .. greedy_2   int32 [24] or [64], greedy continuation, end tokens ignored
    margin_0 .. margin_2   float32, smallest lead of a chosen token's logit over the runner-up
    logits                 float32 [T, V] of the longest prompt

The second writes ``smollm2.npz`` alone, with ``text_<n>`` (prompt as text), ``prompt_<n>``, ``greedy_<n>`` [32] and
``margin_<n>``, from the published Q4_1 file de-quantized to float32; it needs ``accelerate`` and ``gguf`` as well.

All in float32 on the CPU with eager attention and experts. Norms and biases are random too, and the attention is made
sharp, so that a mistake in any of them shows. Imports nothing of Spotjax: it is the other side of the comparison.
"""

# mypy: disable-error-code="import-not-found"
# torch and transformers are not part of the environment that types are checked in.

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.models.auto.configuration_auto import AutoConfig

PROMPT_LENGTHS = (5, 19, 40)
NEW_TOKENS = 24
MANY_NEW_TOKENS = 64
SMOLLM2_NEW_TOKENS = 32
MARGIN = 2e-3
"""Greedy choices closer than this could fall either way in another order of summation; such a seed is passed over."""
VARIETY = 10
"""Distinct tokens of the greedy continuations together; a model that repeats itself shows no mistakes."""

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "vocab_size": 192,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMAS: dict[str, dict[str, Any]] = {
    "llama-mha": {"vocab_size": 257},
    "llama-gqa-llama3": {
        "num_key_value_heads": 3,
        "head_dim": 16,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 1000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "llama-gqa-linear-bias": {
        "num_key_value_heads": 2,
        "intermediate_size": 97,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    },
    "llama-gqa-yarn": {
        "num_key_value_heads": 3,
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "beta_fast": 8.0,
            "beta_slow": 1.0,
            "original_max_position_embeddings": 64,
        },
    },
    "mistral": {
        "model_type": "mistral",
        "num_hidden_layers": 5,
        "num_key_value_heads": 2,
        "sliding_window": None,
    },
    "qwen2": {
        "model_type": "qwen2",
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "hidden_size": 72,
        "vocab_size": 128,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
    },
    "qwen3": {
        "model_type": "qwen3",
        "num_hidden_layers": 6,
        "num_key_value_heads": 3,
        "head_dim": 10,
        "intermediate_size": 100,
        "vocab_size": 131,
        "use_sliding_window": False,
    },
}
OPT: dict[str, Any] = {
    "model_type": "opt",
    "hidden_size": 48,
    "word_embed_proj_dim": 48,
    "ffn_dim": 100,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "vocab_size": 193,
    "max_position_embeddings": 128,
    "init_std": 0.4,
    "bos_token_id": 2,
    "eos_token_id": 2,
}
NEOX: dict[str, Any] = {
    "model_type": "gpt_neox",
    "hidden_size": 60,
    "intermediate_size": 97,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "vocab_size": 131,
    "max_position_embeddings": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.4},
    "initializer_range": 0.4,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "n_embd": 48,
    "n_layer": 4,
    "n_head": 6,
    "n_positions": 128,
    "vocab_size": 190,
    "initializer_range": 0.4,
    "bos_token_id": 2,
    "eos_token_id": 2,
}
GEMMA: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 97,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "vocab_size": 131,
    "max_position_embeddings": 128,
    "initializer_range": 0.12,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
WINDOWED: dict[str, dict[str, Any]] = {
    "mistral-window": LLAMA
    | {"model_type": "mistral", "num_hidden_layers": 3, "num_key_value_heads": 3, "sliding_window": 7},
    "qwen2-window": LLAMA
    | {
        "model_type": "qwen2",
        "num_key_value_heads": 2,
        "vocab_size": 128,
        "use_sliding_window": True,
        "sliding_window": 12,
        "max_window_layers": 3,
    },
}
"""Windows are shorter than every prompt but the first."""
GEMMAS: dict[str, dict[str, Any]] = {
    "gemma2": GEMMA
    | {
        "model_type": "gemma2",
        "sliding_window": 9,
        "query_pre_attn_scalar": 1,
        "attn_logit_softcapping": 8.0,
        "final_logit_softcapping": 20.0,
    },
    "gemma3": GEMMA
    | {
        "model_type": "gemma3_text",
        "num_hidden_layers": 7,
        "num_key_value_heads": 1,
        "hidden_size": 42,
        "intermediate_size": 64,
        "query_pre_attn_scalar": 3,
        "initializer_range": 0.1,
        "sliding_window": 6,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    },
}
GPTS: dict[str, dict[str, Any]] = {
    "opt": OPT,
    "opt-post-norm": OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 24, "ffn_dim": 96},
    "gpt-neox": NEOX,
    "gpt-neox-sequential": NEOX
    | {
        "use_parallel_residual": False,
        "hidden_act": "gelu_fast",
        "attention_bias": False,
        "hidden_size": 48,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 0.5},
    },
    "gpt2": GPT2,
}
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {
        "model_type": "mixtral",
        "num_key_value_heads": 2,
        "intermediate_size": 40,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    },
    "qwen2-moe": {
        "model_type": "qwen2_moe",
        "num_key_value_heads": 3,
        "num_experts": 5,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 22,
        "shared_expert_intermediate_size": 50,
        "vocab_size": 131,
    },
    "qwen3-moe": {
        "model_type": "qwen3_moe",
        "num_key_value_heads": 2,
        "head_dim": 10,
        "num_experts": 12,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 17,
        "norm_topk_prob": True,
    },
}
CASES = {name: LLAMA | case for name, case in (LLAMAS | MIXTURES).items()} | WINDOWED | GEMMAS | GPTS
SERVED = (*GPTS, *GEMMAS, "mixtral")
"""Cases with long continuations: they are also served while instances are taken."""
STORED_AS = {"mistral": torch.bfloat16, "llama-mha": torch.float32}
"""How weights are stored, else as float16; values are rounded to 16 bits in any case."""
NORMS = ("norm.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight")
"""How the names of scales end."""
SHARDED = "qwen3"
"""The case that is written as several safetensors files with an index."""

CHATS: tuple[Sequence[dict[str, str]], ...] = (
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "system", "content": "You answer in one short sentence."},
        {"role": "user", "content": "Name three primary colors."},
        {"role": "assistant", "content": "Red, yellow and blue."},
        {"role": "user", "content": "And what do you get from mixing the 2nd with the 3rd? Ça va, 你好?"},
    ],
)
STORY = "Once upon a time, in a small village,"


def random_model(case: dict[str, Any], stored_as: torch.dtype, seed: int) -> PreTrainedModel:
    """A model whose weights, biases and norms are random and representable in 16 bits, in float32."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(**case)
    config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    rounded = torch.float16 if stored_as == torch.float32 else stored_as
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(NORMS):
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
            elif name.endswith(".bias"):
                parameter.normal_(std=0.2)
            parameter.copy_(parameter.to(rounded).float())
    return model


def greedy(model: PreTrainedModel, prompt: Sequence[int], new_tokens: int) -> tuple[list[int], float]:
    """Greedy continuation without a cache, and the smallest lead of a chosen token over the runner-up."""
    tokens = list(prompt)
    margin = float("inf")
    for _ in range(new_tokens):
        logits = model(torch.tensor([tokens])).logits[0, -1]
        best, second = torch.topk(logits, 2).values.tolist()
        margin = min(margin, best - second)
        tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :], margin


def golden(model: PreTrainedModel, prompts: Sequence[Sequence[int]], new_tokens: int) -> dict[str, np.ndarray]:
    """Prompts, greedy continuations and margins under the names of the module's docstring."""
    arrays: dict[str, np.ndarray] = {}
    for number, prompt in enumerate(prompts):
        tokens, margin = greedy(model, prompt, new_tokens)
        arrays[f"prompt_{number}"] = np.array(prompt, np.int32)
        arrays[f"greedy_{number}"] = np.array(tokens, np.int32)
        arrays[f"margin_{number}"] = np.array(margin, np.float32)
    return arrays


def smallest_margin(arrays: dict[str, np.ndarray]) -> float:
    """The closest of all greedy choices."""
    return min(float(value) for name, value in arrays.items() if name.startswith("margin_"))


def distinct_tokens(arrays: dict[str, np.ndarray]) -> int:
    """How many tokens the greedy continuations are made of."""
    return len({int(token) for key in arrays if key.startswith("greedy") for token in arrays[key]})


def write_case(name: str, target: Path) -> None:
    """Writes one of ``CASES``, with the first seed that leaves no near tie among the greedy choices."""
    stored_as = STORED_AS.get(name, torch.float16)
    for seed in range(100):
        model = random_model(CASES[name], stored_as, seed)
        generator = np.random.default_rng(seed)
        prompts = [generator.integers(3, model.config.vocab_size, length).tolist() for length in PROMPT_LENGTHS]
        arrays = golden(model, prompts, MANY_NEW_TOKENS if name in SERVED else NEW_TOKENS)
        if smallest_margin(arrays) > MARGIN and distinct_tokens(arrays) >= VARIETY:
            break
    else:
        raise RuntimeError(f"{name}: every seed gave a near tie or a repetition; change the case")
    arrays["logits"] = model(torch.tensor([prompts[-1]])).logits[0].numpy()

    shutil.rmtree(target / name, ignore_errors=True)
    model.to(stored_as).save_pretrained(target / name, max_shard_size="60KB" if name == SHARDED else "1GB")
    (target / name / "generation_config.json").unlink()
    drop_version(target / name / "config.json")
    np.savez_compressed(target / name / "golden.npz", allow_pickle=False, **arrays)
    print(f"{name}: seed {seed}, margin {smallest_margin(arrays):.4f}, {distinct_tokens(arrays)} distinct tokens")


def drop_version(path: Path) -> None:
    """Removes the transformers version, so that another one writes the same file."""
    config = json.loads(path.read_text())
    config.pop("transformers_version", None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def write_smollm2(gguf: Path, target: Path) -> None:
    """Writes ``smollm2.npz`` from the published GGUF, read and tokenized by transformers."""
    source: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, attn_implementation="eager").eval()
    texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in CHATS] + [
        STORY
    ]
    prompts = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    arrays = golden(model, prompts, SMOLLM2_NEW_TOKENS)
    for number, text in enumerate(texts):
        arrays[f"text_{number}"] = np.array(text)
        print(repr(text), "->", repr(tokenizer.decode(arrays[f"greedy_{number}"])))
    np.savez_compressed(target / "smollm2.npz", allow_pickle=False, **arrays)
    print(f"smollm2: smallest margin {smallest_margin(arrays):.4f}")


def main() -> None:
    """Entry point; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Make golden files with Hugging Face transformers.")
    parser.add_argument("target", type=Path, help="directory to write into, e.g. tests/golden")
    parser.add_argument(
        "--smollm2", type=Path, metavar="GGUF", help="write smollm2.npz from this file, and nothing else"
    )
    parser.add_argument("--case", choices=CASES, action="append", help="write this case instead of all; repeatable")
    arguments = parser.parse_args()
    arguments.target.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        if arguments.smollm2:
            write_smollm2(arguments.smollm2, arguments.target)
            return
        for name in arguments.case or CASES:
            write_case(name, arguments.target)


if __name__ == "__main__":
    main()
