"""Reads Hugging Face directories: ``config.json`` and safetensors, in one file or sharded. Owns no tokenizer."""

from __future__ import annotations

import re
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
from spotjax.models.huggingface_config import read_config
from spotjax.models.spec import ModelSpec
from spotjax.models.storage import TensorLayout, check_tensors, storages

DTYPES = ("F32", "F16", "BF16")

CONSTANTS = re.compile(r"\.rotary_emb\.inv_freq$|\.(attn|attention)\.(masked_)?bias$")
"""Rotary frequencies and causal masks, which older versions of transformers saved."""

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class HuggingFaceCheckpoint:
    """A directory with ``config.json`` and safetensors; the files stay memory-mapped until ``close``.

    Raises:
      CheckpointError: a file is missing or damaged, the architecture is not supported, or a tensor is missing, has the
        wrong shape or type, or is one that the model does not have.
    """

    def __init__(self, directory: Path) -> None:
        config, layout = read_config(directory / "config.json")
        self._spec = ModelSpec(config)
        self._storages = storages(self._spec, layout)
        self._tensors: dict[str, Any] = {}
        with ExitStack() as files:
            for path in _safetensors_files(directory):
                self._map(path, files)
            self._tensors = _of_the_decoder(self._tensors, layout)
            shapes = {name: tuple(tensor.get_shape()) for name, tensor in self._tensors.items()}
            unneeded = _unneeded(shapes, layout.names["head"] if config.tied_embeddings else "")
            check_tensors(self._storages.values(), shapes, directory, unneeded)
            for name in dict.fromkeys(name for storage in self._storages.values() for name in storage.tensors):
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
        if name not in self._storages:
            raise CheckpointError(f"the model has no array {name!r}")
        return self._storages[name].read(index, self._read_tensor)

    def _read_tensor(self, tensor: str, ranges: Index) -> NDArray[np.float32]:
        content: NDArray[np.generic] = self._tensors[tensor][tuple(slice(*pair) for pair in ranges)]
        return content.astype(np.float32, copy=False)

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


def _of_the_decoder(tensors: dict[str, Any], layout: TensorLayout) -> dict[str, Any]:
    """Tensors named as in a language model, where they were saved as part of more, or as the decoder alone (GPT-2)."""
    tensors = {_renamed(name, layout): tensor for name, tensor in tensors.items() if not name.startswith(layout.unused)}
    prefix = layout.layer_prefix.partition(".")[0] + "."
    if any(name.startswith(prefix) for name in tensors):
        return tensors
    return {name if name == layout.names["head"] else prefix + name: tensor for name, tensor in tensors.items()}


def _renamed(name: str, layout: TensorLayout) -> str:
    for published, ours in layout.prefixes.items():
        if name.startswith(published):
            return ours + name.removeprefix(published)
    return name


def _unneeded(names: Iterable[str], head: str) -> set[str]:
    """Tensors that some checkpoints carry and nobody needs: tables of constants, and a head that is the embedding."""
    return {name for name in names if name == head or CONSTANTS.search(name)}
