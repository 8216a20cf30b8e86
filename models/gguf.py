"""Reads the tensors of GGUF files, de-quantized to float32. Configuration and tokenizer are read elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
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
from spotjax.models.gguf_config import ROPE_FACTORS, read_config
from spotjax.models.spec import ModelSpec
from spotjax.models.storage import PART, TensorLayout, check_tensors, storages

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
GEMMA = replace(
    LAYOUT,
    names={
        **NAMES,
        "attention_output_norm.scale": "post_attention_norm.weight",
        "mlp_output_norm.scale": "post_ffw_norm.weight",
    },
)
_PROJECTIONS = ("query", "key", "value")
GPT = TensorLayout(
    {
        **{name: NAMES[name] for name in ("embedding", "norm.scale", "head", "attention_norm.scale", "mlp_norm.scale")},
        **{name: NAMES[name] for name in NAMES if name.startswith(("attention.output", "mlp.up", "mlp.down"))},
        **{f"attention.{name}": "attn_qkv.weight" for name in _PROJECTIONS},
        **{f"attention.{name}_bias": "attn_qkv.bias" for name in _PROJECTIONS},
        "positions": "position_embd.weight",
        "norm.bias": "output_norm.bias",
        "attention_norm.bias": "attn_norm.bias",
        "mlp_norm.bias": "ffn_norm.bias",
    },
    LAYOUT.layer_prefix,
    # All queries, then all keys, then all values, also of GPT-NeoX.
    axes={f"attention.{name}": ((PART, 1, 2), (0,)) for name in _PROJECTIONS}
    | {f"attention.{name}_bias": ((PART, 0, 1),) for name in _PROJECTIONS},
    parts={
        f"attention.{name}{kind}": (number, 3) for number, name in enumerate(_PROJECTIONS) for kind in ("", "_bias")
    },
)
LAYOUTS = {"gemma2": GEMMA, "gemma3": GEMMA, "gpt2": GPT, "gptneox": GPT}


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
        shapes = {name: _shape(tensor) for name, tensor in self._tensors.items()}
        factors = self._tensors.get(ROPE_FACTORS)
        try:
            scaling = None if factors is None else _read_tensor(factors, whole(_shape(factors)))
            self._spec = ModelSpec(read_config(self.metadata, shapes, scaling))
        except (msgspec.ValidationError, ValueError) as error:
            raise CheckpointError(f"{path}: {error}") from error
        architecture = self.metadata["general.architecture"]
        self._storages = storages(self._spec, LAYOUTS.get(architecture, LAYOUT))
        check_tensors(self._storages.values(), shapes, path, ignored=(ROPE_FACTORS,))
        self._check_types(path)
        self._interleaved = architecture == "llama"

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
            if self._spec.config.zero_centered_norm and tensor.endswith("norm.weight"):
                return block - np.float32(1)  # which converters add
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
