"""Models that tests save as checkpoints."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import tokenizers
from serving_cases import RandomCheckpoint
from tokenizers import models

from spotjax.checkpoint.completion import complete
from spotjax.checkpoint.parameters import ParameterWriter
from spotjax.models.catalog import Model
from spotjax.models.checkpoint import Checkpoint
from spotjax.models.config import DecoderConfig
from spotjax.models.orbax_checkpoint import OrbaxCheckpoint
from spotjax.models.orbax_part import StoredPart, make_context
from spotjax.models.tokenizer import Tokenizer

MANY_CHUNKS = DecoderConfig(vocab=911, width=96, layers=2, heads=12, kv_heads=4, head_size=32, mlp=366)
"""Several chunks of most arrays, the last ones shorter."""


def words(count: int) -> Tokenizer:
    """A tokenizer of ``w0`` ``w1`` and so on."""
    bpe = tokenizers.Tokenizer(models.BPE({f"w{number}": number for number in range(count)}, []))
    return Tokenizer(bpe, frozenset({1}))


def random_model(config: DecoderConfig) -> Model:
    """Random weights and as many words."""
    return Model("random", RandomCheckpoint(config), words(config.vocab))  # type: ignore[arg-type]


def save(weights: Checkpoint | RandomCheckpoint, directory: Path, dtype: str = "float32") -> OrbaxCheckpoint:
    """Weights, saved and opened again."""
    config, quantization = weights.spec.config, weights.spec.quantization
    writer = ParameterWriter(str(directory), config, dtype, quantization)
    for part, arrays in writer.parts.items():
        writer.write(part, {array.name: partial(weights.read, array.name) for array in arrays.values()})
    writer.close()
    complete(str(directory), config, dtype, words(config.vocab).files(), quantization=quantization)
    return OrbaxCheckpoint(directory)


def verify(checkpoint: OrbaxCheckpoint) -> None:
    """Reads all parameters and compares their checksums."""
    for name, record in checkpoint.manifest.parts.items():
        StoredPart(checkpoint.location, name, record, make_context()).verify()


def rounded(content: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values as they are after having been stored."""
    return content.astype(dtype).astype(np.float32)
