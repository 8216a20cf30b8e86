"""A Llama with random weights, for measurements that need a model of some size and no sense."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from spotjax.models.catalog import Model, open_model
from spotjax.models.config import DecoderConfig
from spotjax.models.spec import ArraySpec, ModelSpec
from spotjax.tools.tiny_directory import save_weights, settings

HEAD = 64


def random_config(width: int, layers: int) -> DecoderConfig:
    """Shapes like those of small models, with the shipped model's vocabulary."""
    tiny = open_model("tiny").checkpoint.spec.config
    heads = width // HEAD
    return replace(
        tiny, width=width, layers=layers, heads=heads, kv_heads=max(1, heads // 2), head_size=HEAD,
        mlp=width * 11 // 4, max_positions=2048,
    )  # fmt: skip


def write_random_model(directory: Path, config: DecoderConfig, seed: int) -> None:
    """Writes a Hugging Face directory, float16, with the shipped model's tokenizer."""
    tokenizer, spec = open_model("tiny").tokenizer, ModelSpec(config)
    draw = np.random.default_rng(seed)
    directory.mkdir(parents=True)
    save_weights(config, {array.name: _drawn(array, draw) for array in spec.parameters}, directory)
    files = {"config.json": json.dumps(settings(config, min(tokenizer.end_tokens))["config.json"]).encode()}
    for name, content in (files | tokenizer.files()).items():
        (directory / name).write_bytes(content)


def small_model(width: int, layers: int, directory: Path) -> Model:
    """A random model of that width, written beneath ``directory``; the shipped one if it is 0."""
    if not width:
        return open_model("tiny")
    write_random_model(directory / "random", random_config(width, layers), seed=0)
    return open_model(str(directory / "random"))


def _drawn(array: ArraySpec, draw: np.random.Generator) -> NDArray[np.float32]:
    """Vectors of ones; matrices that keep the size of what goes through them."""
    if len(array.shape) == 1:
        return np.ones(array.shape, np.float32)
    inputs = array.size // array.shape[-1] if array.name.endswith("attention.output") else array.shape[0]
    return draw.standard_normal(array.shape, dtype=np.float32) * np.float32(inputs**-0.5)
