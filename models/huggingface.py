"""Reads Hugging Face directories: ``config.json`` and safetensors, in one file or sharded. Owns no tokenizer."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

# Registers bfloat16 with numpy, which has none of its own.
import ml_dtypes  # noqa: F401
import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from spotjax.errors import CheckpointError
from spotjax.meshes.slices import Index
from spotjax.models.checkpoint import check_tensors, read_array, tensor_names
from spotjax.models.huggingface_config import read_config
from spotjax.models.spec import ModelSpec

TENSOR_NAMES = {
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
LAYER_PREFIX = "model.layers.{}."
DTYPES = ("F32", "F16", "BF16")

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class HuggingFaceCheckpoint:
    """A directory with ``config.json`` and safetensors; the files stay memory-mapped until ``close``.

    Raises:
      CheckpointError: a file is missing or damaged, the architecture is not supported, or a tensor is missing, has the
        wrong shape or type, or is one that the model does not have.
    """

    def __init__(self, directory: Path) -> None:
        self._spec = ModelSpec(read_config(directory / "config.json"))
        self._arrays = {array.name: array for array in self._spec.parameters}
        self._names = tensor_names(self._spec, TENSOR_NAMES, LAYER_PREFIX)
        self._tensors: dict[str, Any] = {}
        with ExitStack() as files:
            for path in _safetensors_files(directory):
                self._map(path, files)
            shapes = {name: tuple(tensor.get_shape()) for name, tensor in self._tensors.items()}
            check_tensors(self._spec, self._names, shapes, directory, _unneeded(shapes, self._spec))
            for name in self._names.values():
                if (dtype := self._tensors[name].get_dtype()) not in DTYPES:
                    raise CheckpointError(f"{directory}: tensor {name} is {dtype}, only {', '.join(DTYPES)} are read")
            self._files = files.pop_all()

    def _map(self, path: Path, files: ExitStack) -> None:
        try:
            file = files.enter_context(safe_open(path, "numpy"))
            self._tensors |= {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error

    @property
    def spec(self) -> ModelSpec:
        """Shapes and names of the model's arrays."""
        return self._spec

    def read(self, name: str, index: Index) -> NDArray[np.float32]:
        """See ``Checkpoint.read``."""
        if name not in self._arrays:
            raise CheckpointError(f"the model has no array {name!r}")
        tensor = self._tensors[self._names[name]]

        def read_tensor(ranges: Index) -> NDArray[np.float32]:
            block: NDArray[np.float32] = tensor[tuple(slice(*pair) for pair in ranges)].astype(np.float32, copy=False)
            return block

        return read_array(self._arrays[name], index, read_tensor)

    def close(self) -> None:
        """Unmaps the files."""
        self._tensors.clear()
        self._files.close()


def _safetensors_files(directory: Path) -> list[Path]:
    """The files that hold the tensors: those of the index, else the single one."""
    if not (directory / INDEX).is_file():
        if not (directory / SINGLE).is_file():
            raise CheckpointError(f"{directory} has neither {SINGLE} nor {INDEX}; only safetensors weights are read")
        return [directory / SINGLE]
    try:
        weights = msgspec.json.decode((directory / INDEX).read_bytes(), type=dict[str, Any])["weight_map"]
        return [directory / name for name in sorted(set(msgspec.convert(weights, dict[str, str]).values()))]
    except (msgspec.MsgspecError, KeyError) as error:
        raise CheckpointError(f"{directory / INDEX} is not a safetensors index: {error}") from error


def _unneeded(names: Iterable[str], spec: ModelSpec) -> set[str]:
    """Tensors that some checkpoints carry and nobody needs: rotary tables, and the head where it is the embedding."""
    tables = {name for name in names if name.endswith("rotary_emb.inv_freq")}
    return tables | {TENSOR_NAMES["head"]} if spec.config.tied_embeddings else tables
