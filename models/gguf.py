"""Reads GGUF files: metadata as a configuration, tensors de-quantized to float32. Tokenizers are read elsewhere."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from gguf.constants import GGML_QUANT_SIZES
from gguf.gguf_reader import GGUFReader, ReaderTensor
from gguf.quants import dequantize
from numpy.typing import NDArray

from spotjax.errors import CheckpointError
from spotjax.meshes.slices import Index, whole
from spotjax.models.config import DecoderConfig, RopeScaling, window_pattern
from spotjax.models.spec import ModelSpec
from spotjax.models.storage import TensorLayout, check_tensors, storages

ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""Values of ``general.architecture`` that are read."""

NAMES = {
    "embedding": "token_embd.weight",
    "norm.scale": "output_norm.weight",
    "head": "output.weight",
    "attention_norm.scale": "attn_norm.weight",
    "attention.query": "attn_q.weight",
    "attention.key": "attn_k.weight",
    "attention.value": "attn_v.weight",
    "attention.output": "attn_output.weight",
    "attention.query_bias": "attn_q.bias",
    "attention.key_bias": "attn_k.bias",
    "attention.value_bias": "attn_v.bias",
    "attention.output_bias": "attn_output.bias",
    "attention.query_norm": "attn_q_norm.weight",
    "attention.key_norm": "attn_k_norm.weight",
    "mlp_norm.scale": "ffn_norm.weight",
    "mlp.gate": "ffn_gate.weight",
    "mlp.up": "ffn_up.weight",
    "mlp.down": "ffn_down.weight",
    "mlp.gate_bias": "ffn_gate.bias",
    "mlp.up_bias": "ffn_up.bias",
    "mlp.down_bias": "ffn_down.bias",
}
LAYOUT = TensorLayout(NAMES, "blk.{}.")
ROPE_FACTORS = "rope_freqs.weight"
"""Per frequency, what Llama 3's scaling divides it by; converters write this instead of its parameters."""

LLAMA3_CONTEXT = 8192
"""Original context of every published Llama 3."""


class Metadata(msgspec.Struct):
    """The keys that matter, without the architecture they begin with; defaults are those of llama.cpp."""

    width: int = msgspec.field(name="embedding_length")
    layers: int = msgspec.field(name="block_count")
    mlp: int = msgspec.field(name="feed_forward_length")
    heads: int = msgspec.field(name="attention.head_count")
    max_positions: int = msgspec.field(name="context_length")
    norm_epsilon: float = msgspec.field(name="attention.layer_norm_rms_epsilon")
    kv_heads: int | None = msgspec.field(name="attention.head_count_kv", default=None)
    key_size: int | None = msgspec.field(name="attention.key_length", default=None)
    value_size: int | None = msgspec.field(name="attention.value_length", default=None)
    window: int = msgspec.field(name="attention.sliding_window", default=0)
    experts: int = msgspec.field(name="expert_count", default=0)
    rope_size: int | None = msgspec.field(name="rope.dimension_count", default=None)
    rope_base: float = msgspec.field(name="rope.freq_base", default=10_000.0)
    scaling: str = msgspec.field(name="rope.scaling.type", default="none")
    factor: float | None = msgspec.field(name="rope.scaling.factor", default=None)
    original: int | None = msgspec.field(name="rope.scaling.original_context_length", default=None)
    linear_factor: float | None = msgspec.field(name="rope.scale_linear", default=None)
    attention_factor: float = msgspec.field(name="rope.scaling.attn_factor", default=1.0)
    yarn_attention_factor: float = msgspec.field(name="rope.scaling.yarn_attn_factor", default=1.0)
    yarn_log_multiplier: float = msgspec.field(name="rope.scaling.yarn_log_multiplier", default=0.0)
    yarn_extrapolation: float = msgspec.field(name="rope.scaling.yarn_ext_factor", default=1.0)
    beta_fast: float = msgspec.field(name="rope.scaling.yarn_beta_fast", default=32.0)
    beta_slow: float = msgspec.field(name="rope.scaling.yarn_beta_slow", default=1.0)

    @property
    def head_size(self) -> int:
        """H, explicit or derived."""
        return self.key_size or self.width // self.heads


class GgufCheckpoint:
    """One GGUF file, memory-mapped until ``close``.

    Attributes:
      metadata: every key of the file with its value, tokenizer and chat template included.

    Raises:
      CheckpointError: the file is missing or damaged, the architecture is not supported, or a tensor is missing, has
        the wrong shape or a type that cannot be de-quantized, or is one that the model does not have.
    """

    def __init__(self, path: Path) -> None:
        try:
            reader = GGUFReader(path)
            self.metadata: Mapping[str, Any] = {key: field.contents() for key, field in reader.fields.items()}
        except (OSError, ValueError, IndexError, KeyError, OverflowError) as error:
            raise CheckpointError(f"{path} cannot be read as GGUF: {error}") from error
        # Not the reader: it keeps some arrays for each word of the vocabulary.
        self._tensors = {str(tensor.name): tensor for tensor in reader.tensors}
        try:
            self._spec = ModelSpec(_config(self.metadata, self._tensors))
        except (msgspec.ValidationError, ValueError) as error:
            raise CheckpointError(f"{path}: {error}") from error
        self._storages = storages(self._spec, LAYOUT)
        shapes = {name: _shape(tensor) for name, tensor in self._tensors.items()}
        check_tensors(self._storages.values(), shapes, path, ignored=(ROPE_FACTORS,))
        self._check_types(path)
        self._interleaved = self.metadata["general.architecture"] == "llama"

    def _check_types(self, path: Path) -> None:
        for name, tensor in self._tensors.items():
            _, block_bytes = GGML_QUANT_SIZES[tensor.tensor_type]
            try:
                dequantize(np.zeros((1, block_bytes), np.uint8), tensor.tensor_type)
            except NotImplementedError as error:
                raise CheckpointError(f"{path}: tensor {name} is {tensor.tensor_type.name}: {error}") from error

    @property
    def spec(self) -> ModelSpec:
        """Shapes and names of the model's arrays."""
        return self._spec

    def read(self, name: str, index: Index) -> NDArray[np.float32]:
        """See ``Checkpoint.read``."""
        if name not in self._storages:
            raise CheckpointError(f"the model has no array {name!r}")
        module, array = name.rsplit(".", 1) if "." in name else ("", name)
        rotated = module.endswith("attention") and array in ("query", "key", "query_bias", "key_bias")

        def read_tensor(tensor: str, ranges: Index) -> NDArray[np.float32]:
            block = _read_tensor(self._tensors[tensor], ranges)
            return _half_split(block, self._spec.config.head_size) if rotated and self._interleaved else block

        return self._storages[name].read(index, read_tensor)

    def close(self) -> None:
        """Unmaps the file."""
        self._tensors.clear()


def _half_split(rows: NDArray[np.float32], head_size: int) -> NDArray[np.float32]:
    """Rows of whole heads from ggml's order for rotation, pair after pair, to first halves before second halves.

    Converters to GGUF do the inverse for the architecture ``llama`` only.
    """
    heads = rows.shape[0] // head_size
    return rows.reshape(heads, head_size // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _read_tensor(tensor: ReaderTensor, ranges: Index) -> NDArray[np.float32]:
    """Index ranges of a tensor in float32; de-quantizes the blocks that these touch and no others."""
    *outer, (start, stop) = ranges
    block_size, _ = GGML_QUANT_SIZES[tensor.tensor_type]
    first, last = start // block_size, -(-stop // block_size)
    # In elements of the mapped array: bytes, but of floating-point tensors numbers.
    per_block = tensor.data.shape[-1] * block_size // int(tensor.shape[0])
    picks = (*(slice(*pair) for pair in outer), slice(first * per_block, last * per_block))
    block = dequantize(np.ascontiguousarray(tensor.data[picks]), tensor.tensor_type)
    return np.asarray(block[..., start - first * block_size : stop - first * block_size], np.float32)


def _shape(tensor: ReaderTensor) -> tuple[int, ...]:
    """Extents of a tensor, rows first (GGUF names the fastest one first)."""
    return tuple(int(extent) for extent in reversed(tensor.shape))


def _config(metadata: Mapping[str, Any], tensors: Mapping[str, ReaderTensor]) -> DecoderConfig:
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ValueError(f"general.architecture {architecture!r} is not supported, only {', '.join(ARCHITECTURES)}")
    if metadata.get("split.count", 1) > 1:
        raise ValueError("GGUF files that are split are not supported; merge them with llama-gguf-split --merge")
    prefix = f"{architecture}."
    named = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    values = msgspec.convert(named, Metadata)
    _refuse_unsupported(values, architecture)
    if "token_embd.weight" not in tensors:
        raise ValueError("tensor token_embd.weight is missing")
    return DecoderConfig(
        vocab=_shape(tensors["token_embd.weight"])[0],
        width=values.width,
        layers=values.layers,
        heads=values.heads,
        kv_heads=values.kv_heads or values.heads,
        head_size=values.head_size,
        mlp=values.mlp,
        max_positions=values.max_positions,
        rope_base=values.rope_base,
        rope_scaling=_rope_scaling(values, tensors),
        # Written as float32: 1e-5 comes back as 9.99999974738e-06.
        norm_epsilon=float(str(np.float32(values.norm_epsilon))),
        tied_embeddings="output.weight" not in tensors,
        attention_bias="blk.0.attn_q.bias" in tensors,
        output_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_gate.bias" in tensors,
        qk_norm=architecture == "qwen3",
        windows=window_pattern([values.window or None] * values.layers, values.max_positions),
    )


def _refuse_unsupported(values: Metadata, architecture: str) -> None:
    if values.experts:
        raise ValueError(f"expert_count {values.experts}: mixtures of experts are not supported")
    if architecture != "llama" and 0 < values.window < values.max_positions:  # which layers have it is not in the file
        raise ValueError(f"attention.sliding_window {values.window} is not supported for {architecture}")
    for name, size in (("attention.value_length", values.value_size), ("rope.dimension_count", values.rope_size)):
        if size not in (None, values.head_size):
            raise ValueError(f"{name} {size} is not supported, only the head size {values.head_size}")


def _rope_scaling(values: Metadata, tensors: Mapping[str, ReaderTensor]) -> RopeScaling | None:
    factors = tensors.get(ROPE_FACTORS)
    factor = values.factor or values.linear_factor
    kind = "linear" if values.scaling == "none" and values.linear_factor not in (None, 1) else values.scaling
    if kind not in ("none", "linear", "yarn"):
        raise ValueError(f"rope.scaling.type {kind!r} is not supported, only none, linear, yarn")
    if factors is not None:
        if kind != "none":
            raise ValueError(f"rope.scaling.type {kind!r} together with tensor {ROPE_FACTORS} is not supported")
        return _llama3(values, _read_tensor(factors, whole(_shape(factors))))
    if kind == "none":
        return None
    if factor is None:
        raise ValueError(f"rope.scaling.type {kind!r} needs rope.scaling.factor")
    if kind == "linear":
        return RopeScaling("linear", factor)
    if values.yarn_extrapolation != 1 or values.yarn_log_multiplier:
        raise ValueError("rope.scaling.yarn_ext_factor and rope.scaling.yarn_log_multiplier are not supported")
    scale = values.attention_factor * values.yarn_attention_factor
    return RopeScaling(
        "yarn",
        factor,
        values.original or values.max_positions,
        beta_fast=values.beta_fast,
        beta_slow=values.beta_slow,
        attention_factor=None if scale == 1 else scale * (0.1 * math.log(factor) + 1),
    )


def _llama3(values: Metadata, factors: NDArray[np.float32]) -> RopeScaling | None:
    """The Llama 3 scaling that gives these factors, with the wavelength bounds of the published models."""
    if np.all(factors == 1):
        return None
    scaling = RopeScaling("llama3", float(factors.max()), values.original or LLAMA3_CONTEXT)
    turns = scaling.original_positions * values.rope_base ** -(np.arange(len(factors)) / len(factors)) / (2 * math.pi)
    smooth = (turns - scaling.low_frequency) / (scaling.high_frequency - scaling.low_frequency)
    smooth = np.clip(smooth, 0, 1)
    if len(factors) != values.head_size // 2 or not np.allclose(
        factors, 1 / ((1 - smooth) / scaling.factor + smooth), rtol=1e-4
    ):
        raise ValueError(f"tensor {ROPE_FACTORS} holds another rotary scaling than that of Llama 3")
    return scaling
