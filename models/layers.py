"""The layers of a decoder in Flax NNX, written for one tensor shard of any size.

Arrays may be whole or the shard that ``meshes.layout`` assigns to a tensor position; the code reads its sizes off the
arrays, and sums partial results over the mesh axis ``tensor`` when told that it runs under one. Every parameter carries
its logical axes. Where KV is kept is the caller's business: layers are given a ``KeyValueStore``.
"""

from __future__ import annotations

from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from spotjax.models.attention import Scoring
from spotjax.models.config import DecoderConfig, LayerKind
from spotjax.models.experts import MixtureOfExperts
from spotjax.models.norm import Norm, normalize
from spotjax.models.parameters import Parameter, add_parameters
from spotjax.models.projection import ACTIVATIONS, BY_XLA, Products
from spotjax.models.rope import Rotation, rotate
from spotjax.models.shard import WHOLE, TensorShard


class KeyValueStore(Protocol):
    """Where one layer keeps keys and values."""

    def attend(self, query: jax.Array, keys: jax.Array, values: jax.Array, scoring: Scoring) -> jax.Array:
        """Takes in what is new, and mixes the values of all positions that each query sees.

        Args:
          query: (B, T, N, H) of the current positions.
          keys, values: (B, T, K, H) of the same; K divides N, query head n uses kv head n // (N / K).
          scoring: of the layer.

        Returns: (B, T, N, H).
        """
        ...


class Attention(nnx.Module):
    """Grouped-query attention. Rotation, biases and norms exist where the configuration has them."""

    query: Parameter  # (D, N, H)
    key: Parameter  # (D, K, H)
    value: Parameter  # (D, K, H)
    output: Parameter  # (N, H, D)
    query_bias: Parameter  # (N, H)
    key_bias: Parameter  # (K, H)
    value_bias: Parameter  # (K, H)
    output_bias: Parameter  # (D,)
    query_norm: Parameter  # (H,)
    key_norm: Parameter  # (H,)

    def __init__(self, config: DecoderConfig, kind: LayerKind, *, rngs: nnx.Rngs) -> None:
        self.config, self.scoring = config, Scoring.of(config, kind)
        add_parameters(self, config, "attention", rngs)

    def __call__(
        self, x: jax.Array, rotation: Rotation | None, store: KeyValueStore, shard: TensorShard, products: Products
    ) -> jax.Array:
        c = self.config
        # (B, T, N, H), and twice (B, T, K, H)
        query, keys, values = products.project(x, [self.query[...], self.key[...], self.value[...]])
        if c.attention_bias:
            query = query + self.query_bias[...][None, None]
            keys = keys + self.key_bias[...][None, None]
            values = values + self.value_bias[...][None, None]
        if c.qk_norm:
            query = normalize(c, query, self.query_norm[...], None)
            keys = normalize(c, keys, self.key_norm[...], None)
        if rotation is not None:
            query, keys = rotate(query, rotation), rotate(keys, rotation)
        mixed = self._mix(query, keys, values, store, shard)  # (B, T, N, H)
        (out,) = products.project(mixed, [self.output[...]], inputs=2)
        out = shard.sum(out)
        return out + self.output_bias[...][None, None] if c.output_bias else out

    def _mix(
        self, query: jax.Array, keys: jax.Array, values: jax.Array, store: KeyValueStore, shard: TensorShard
    ) -> jax.Array:
        """Has the store attend, with queries placed so that each of the shard's kv heads has equally many.

        Where kv heads do not split evenly (see ``layout.tensor_range``), a shard lacks some of the queries of its first
        and last one. Zeros stand in for these.
        """
        c, m, scoring = self.config, shard.degree, self.scoring
        if m == 1 or c.kv_heads % m == 0 or m % c.kv_heads == 0:
            return store.attend(query, keys, values, scoring)
        batch, length, mine, size = query.shape
        group, held = c.heads // c.kv_heads, keys.shape[2]
        first = jnp.minimum(shard.index() * mine // group, c.kv_heads - held)
        place = shard.index() * mine - first * group
        wide = jnp.zeros((batch, length, held * group, size), query.dtype)
        mixed = store.attend(lax.dynamic_update_slice_in_dim(wide, query, place, 2), keys, values, scoring)
        return lax.dynamic_slice_in_dim(mixed, place, mine, 2)


class FeedForward(nnx.Module):
    """Two projections with an activation between, or with a gate (Shazeer 2020). Biases are as configured."""

    gate: Parameter  # (D, F)
    up: Parameter  # (D, F)
    down: Parameter  # (F, D)
    gate_bias: Parameter  # (F,)
    up_bias: Parameter  # (F,)
    down_bias: Parameter  # (D,)

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        add_parameters(self, config, "mlp", rngs)

    def __call__(self, x: jax.Array, shard: TensorShard, products: Products) -> jax.Array:
        c, activation = self.config, ACTIVATIONS[self.config.activation]
        kernels = [self.up[...], self.gate[...]] if c.gated_mlp else [self.up[...]]
        inner, *gate = products.project(x, kernels)  # (B, T, F)
        if c.mlp_bias:
            inner = inner + self.up_bias[...][None, None]
        if c.gated_mlp:
            inner = activation(gate[0] + self.gate_bias[...][None, None] if c.mlp_bias else gate[0]) * inner
        else:
            inner = activation(inner)
        (down,) = products.project(inner, [self.down[...]])
        down = shard.sum(down)
        return down + self.down_bias[...][None, None] if c.mlp_bias else down


class DecoderLayer(nnx.Module):
    """Attention and feed-forward, added to the residual stream; norms and order are as the configuration says."""

    def __init__(self, config: DecoderConfig, kind: LayerKind, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.attention_norm = Norm(config, "attention_norm", rngs=rngs)
        self.attention = Attention(config, kind, rngs=rngs)
        self.mlp_norm = Norm(config, "mlp_norm", rngs=rngs)
        self.mlp = MixtureOfExperts(config, rngs=rngs) if config.experts is not None else FeedForward(config, rngs=rngs)
        if config.norm_place == "both":
            self.attention_output_norm = Norm(config, "attention_output_norm", rngs=rngs)
            self.mlp_output_norm = Norm(config, "mlp_output_norm", rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        rotation: Rotation | None,
        store: KeyValueStore,
        shard: TensorShard = WHOLE,
        products: Products = BY_XLA,
    ) -> jax.Array:
        """(B, T, D) to (B, T, D)."""
        if self.config.norm_place == "both":
            mixed = self.attention(self.attention_norm(x), rotation, store, shard, products)
            x = x + self.attention_output_norm(mixed)
            return x + self.mlp_output_norm(self.mlp(self.mlp_norm(x), shard, products))
        if self.config.norm_place == "after":
            x = self.attention_norm(x + self.attention(x, rotation, store, shard, products))
            return self.mlp_norm(x + self.mlp(x, shard, products))
        mixed = x + self.attention(self.attention_norm(x), rotation, store, shard, products)
        return mixed + self.mlp(self.mlp_norm(x if self.config.parallel_residual else mixed), shard, products)
