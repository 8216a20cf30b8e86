"""The models that engines are compared on, in the formats that they read: Hugging Face and GGUF."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain, islice, product
from pathlib import Path

import gguf
import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from spotjax.meshes.slices import whole
from spotjax.models.catalog import open_model
from spotjax.models.config import DecoderConfig
from spotjax.models.spec import ModelSpec
from spotjax.tools.tiny_directory import save_weights, settings

Weights = dict[str, NDArray[np.float32]]
RANDOM = "random-58m"
RANDOM_CONFIG = DecoderConfig(
    vocab=32000, width=512, layers=8, heads=8, kv_heads=8, head_size=64, mlp=1376, max_positions=2048
)
DEVIATION = 0.05
"""Of the random model's weights."""

_GGUF_NAMES = {
    "embedding": "token_embd", "norm.scale": "output_norm", "head": "output", "attention_norm.scale": "attn_norm",
    "attention.query": "attn_q", "attention.key": "attn_k", "attention.value": "attn_v",
    "attention.output": "attn_output", "mlp_norm.scale": "ffn_norm", "mlp.gate": "ffn_gate", "mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
}  # fmt: skip


def write_model(name: str, directory: Path, seed: int) -> None:
    """Writes ``random-58m``, or a plain Llama that ``open_model`` knows, as a Hugging Face directory with GGUF files.

    Raises:
      CheckpointError: there is no such model.
    """
    if name == RANDOM:
        config, weights, tokenizer, end = RANDOM_CONFIG, _random_weights(seed), _random_tokenizer(), 0
        files = {"tokenizer.json": tokenizer.to_str().encode()}
    else:
        model = open_model(name)
        config, end = model.checkpoint.spec.config, min(model.tokenizer.end_tokens)
        weights = {a.name: model.checkpoint.read(a.name, whole(a.shape)) for a in model.checkpoint.spec.parameters}
        files = {"tokenizer.json": model.tokenizer.files()["tokenizer.json"]}
    vocabulary = json.loads(files["tokenizer.json"])["model"]
    word = next(word for word, number in vocabulary["vocab"].items() if number == end)
    described = {name: json.dumps(content).encode() for name, content in _described(config, end, word).items()}
    directory.mkdir(parents=True, exist_ok=True)
    for file, content in (described | files).items():
        (directory / file).write_bytes(content)
    save_weights(config, weights, directory, np.float32)
    for kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.BF16):
        _write_gguf(config, weights, vocabulary, end, kind, directory / f"model-{kind.name.lower()}.gguf")


def _described(config: DecoderConfig, end: int, word: str) -> dict[str, dict[str, object]]:
    files = settings(config, end)
    tokens = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    return {
        "config.json": files["config.json"] | tokens | {"torch_dtype": "float32"},
        "generation_config.json": {"do_sample": False, **tokens},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.max_positions,
            "clean_up_tokenization_spaces": False, "bos_token": word, "eos_token": word, "unk_token": word,
        },
    }  # fmt: skip


def _random_weights(seed: int) -> Weights:
    draw = np.random.default_rng(seed)
    return {
        array.name: np.ones(array.shape, np.float32)
        if len(array.shape) == 1
        else draw.standard_normal(array.shape, dtype=np.float32) * np.float32(DEVIATION)
        for array in ModelSpec(RANDOM_CONFIG).parameters
    }


def _random_tokenizer() -> tokenizers.Tokenizer:
    """Words of one to three ASCII letters, as many as the model has tokens: whatever it says is text."""
    letters = [letter for letter in sorted(ByteLevel.alphabet()) if letter.isascii()]
    pairs = list(product(letters, letters))
    merges = list(islice(chain(pairs, product(map("".join, pairs), letters)), RANDOM_CONFIG.vocab - len(letters)))
    words = [*letters, *map("".join, merges)]
    tokenizer = tokenizers.Tokenizer(BPE(vocab={word: number for number, word in enumerate(words)}, merges=merges))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    return tokenizer


def _write_gguf(
    config: DecoderConfig, weights: Weights, vocabulary: dict[str, object], end: int,
    kind: gguf.GGMLQuantizationType, path: Path,
) -> None:  # fmt: skip
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.width)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.mlp)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_rope_dimension_count(config.head_size)
    writer.add_rope_freq_base(config.rope_base)
    writer.add_layer_norm_rms_eps(config.norm_epsilon)
    writer.add_vocab_size(config.vocab)
    _add_tokenizer(writer, config, vocabulary, end)
    for name, tensor in _gguf_tensors(config, weights):
        stored = gguf.GGMLQuantizationType.F32 if tensor.ndim == 1 else kind
        writer.add_tensor(name, gguf.quants.quantize(tensor, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: gguf.GGUFWriter, config: DecoderConfig, vocabulary: dict[str, object], end: int) -> None:
    numbers: dict[str, int] = vocabulary["vocab"]  # type: ignore[assignment]
    merges: list[str | list[str]] = vocabulary["merges"]  # type: ignore[assignment]
    words = [f"[unused {number}]" for number in range(config.vocab)]
    for word, number in numbers.items():
        words[number] = word
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(words)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(words))
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_bos_token_id(end)
    writer.add_eos_token_id(end)


def _gguf_tensors(config: DecoderConfig, weights: Weights) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Matrices (out, in); rows of queries and keys in the order that ggml rotates: pairs side by side."""
    for array in ModelSpec(config).parameters:
        name, value = array.name, weights[array.name]
        if array.layer is not None:
            name = name.removeprefix(f"layers.{array.layer}.")
        if value.ndim > 1 and name != "embedding":
            inputs = array.size // value.shape[-1] if name == "attention.output" else value.shape[0]
            value = value.reshape(inputs, -1).T
        if name in ("attention.query", "attention.key"):
            halves = value.reshape(-1, 2, config.head_size // 2, config.width)
            value = halves.swapaxes(1, 2).reshape(value.shape)
        prefix = "" if array.layer is None else f"blk.{array.layer}."
        yield f"{prefix}{_GGUF_NAMES[name]}.weight", np.ascontiguousarray(value)
