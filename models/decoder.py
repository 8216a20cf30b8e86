"""A decoder in Flax NNX: what is before its layers, what is after them, and the whole of it on whole sequences.

As in ``layers.py``, arrays may be whole or one tensor shard's part.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from spotjax.models.attention import Scoring, as_one_page, attend, softcap, visibility
from spotjax.models.config import DecoderConfig
from spotjax.models.layers import DecoderLayer
from spotjax.models.norm import Norm, normalize
from spotjax.models.parameters import Parameter, add_parameters
from spotjax.models.projection import BY_XLA, Products, project
from spotjax.models.quantized import Matrix, Quantized, take_rows
from spotjax.models.rope import rotations
from spotjax.models.shard import WHOLE, TensorShard
from spotjax.models.spec import ModelSpec

EdgeArrays = Mapping[str, Matrix]
"""Parameters before the layers, or after them, by name: ``ModelSpec.inputs``, ``ModelSpec.outputs``."""


def embed(
    config: DecoderConfig, inputs: EdgeArrays, tokens: jax.Array, positions: jax.Array, shard: TensorShard = WHOLE
) -> jax.Array:
    """What the first layer is given.

    Args:
      config: of the model.
      inputs: every shard holds an equal chunk of the rows of the embedding, and of the learned positions.
      tokens: (B, T) ids.
      positions: (B, T) of the tokens; those beyond the model's longest context read as its last.

    Returns: (B, T, D).
    """
    x = _rows(inputs["embedding"], tokens, shard)
    if config.embedding_scale is not None:
        x = x * jnp.asarray(config.embedding_scale, x.dtype)
    if config.embedding_width is not None:
        x = project(x, inputs["input_projection"])
    if config.positions == "learned":
        x = x + _rows(inputs["positions"], jnp.minimum(positions, config.max_positions - 1), shard)
    return shard.sum(x)


def _rows(table: Matrix, wanted: jax.Array, shard: TensorShard) -> jax.Array:
    """Rows of a table, zeros where another shard has them."""
    if shard.degree == 1:
        return take_rows(table, wanted)
    local = wanted - shard.index() * table.shape[0]
    mine = (local >= 0) & (local < table.shape[0])
    rows = take_rows(table, jnp.clip(local, 0, table.shape[0] - 1))
    return jnp.where(mine[:, :, None], rows, jnp.zeros((), rows.dtype))


def logits(
    config: DecoderConfig,
    outputs: EdgeArrays,
    x: jax.Array,
    shard: TensorShard = WHOLE,
    products: Products = BY_XLA,
) -> jax.Array:
    """Final norm, output projection, soft cap.

    Args:
      config: of the model.
      outputs: the head is a (D, V) kernel, or the (V, D) embedding when the embeddings are tied.
      x: (B, D) hidden vectors.

    Returns: (B, V) float32.
    """
    if config.norm_place != "after":
        scale, bias = outputs["norm.scale"], outputs.get("norm.bias")
        assert not isinstance(scale, Quantized) and not isinstance(bias, Quantized), "norms are not quantized"
        x = normalize(config, x, scale, bias)
    if config.embedding_width is not None:
        x = project(x, outputs["output_projection"])
    tied = config.tied_embeddings
    local = products.score(x, outputs["embedding" if tied else "head"], transposed=tied)
    return softcap(shard.concatenate(local)[:, : config.vocab], config.logit_softcap)


class _NoStore:
    """Whole sequences without a cache."""

    def attend(self, query: jax.Array, keys: jax.Array, values: jax.Array, scoring: Scoring) -> jax.Array:
        positions = jnp.arange(query.shape[1], dtype=jnp.int32)[None]
        visible = visibility(positions, query.shape[1], scoring.window)
        return attend(query, *as_one_page(keys, values), visible, scoring)


class Decoder(nnx.Module):
    """The whole model on whole sequences, for training and as the reference that serving is checked against."""

    embedding: Parameter  # (V, D)
    positions: Parameter  # (positions, D)
    input_projection: Parameter  # (E, D)
    output_projection: Parameter  # (D, E)
    head: Parameter  # (D, V)

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        add_parameters(self, config, "", rngs)
        layers = [DecoderLayer(config, config.kind(layer), rngs=rngs) for layer in range(config.layers)]
        self.layers = nnx.List(layers)
        if config.norm_place != "after":
            self.norm = Norm(config, "norm", rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Token ids (B, T) to logits (B, T, V) float32."""
        batch, length = tokens.shape
        positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], (batch, length))
        spec = ModelSpec(self.config)
        rotation = [rotations(self.config, kind, positions) for kind in spec.kinds]
        x = embed(self.config, {name: self._array(name) for name in spec.inputs}, tokens, positions)
        for layer, kind in zip(self.layers, spec.layer_kinds, strict=True):
            x = layer(x, rotation[kind], _NoStore())
        outputs = {name: self._array(name) for name in spec.outputs}
        return logits(self.config, outputs, x.reshape(batch * length, -1)).reshape(batch, length, -1)

    def _array(self, name: str) -> jax.Array:
        owner, _, array = name.rpartition(".")
        found: Parameter = getattr(getattr(self, owner) if owner else self, array)
        return found[...]
