"""A Llama-family decoder in Flax NNX, written for one tensor shard of any size.

Arrays may be whole or the shard that ``meshes.layout`` assigns to a tensor position; the code reads its sizes off the
arrays, and sums partial results over the mesh axis ``tensor`` when told that it runs under one. Every parameter carries
its logical axes. Where KV is kept is the caller's business: layers are given a ``KeyValueStore``.
"""

from __future__ import annotations

from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from spotjax.meshes.layout import kv_heads_per_shard
from spotjax.models.attention import as_one_page, attend, causal
from spotjax.models.config import DecoderConfig
from spotjax.models.rope import rotate, rotations
from spotjax.models.spec import Axes, ModelSpec

Rotation = tuple[jax.Array, jax.Array]
Parameter = nnx.Param[jax.Array]


class KeyValueStore(Protocol):
    """Where one layer keeps keys and values."""

    def extend(self, keys: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Takes (B, T, K, H) of the current positions; returns what ``attend`` takes: keys, values, visible."""
        ...


class TensorShard:
    """The shard of the ``tensor`` mesh axis that code runs as.

    Attributes:
      degree: M; 1 means whole arrays and no collectives.
      axis: name of the mapped axis when ``degree`` is above 1.
    """

    def __init__(self, degree: int = 1, axis: str = "tensor") -> None:
        self.degree, self.axis = degree, axis

    def index(self) -> jax.Array | int:
        """Which shard this is."""
        return jax.lax.axis_index(self.axis) if self.degree > 1 else 0

    def sum(self, partial: jax.Array) -> jax.Array:
        """Adds the partial results of all shards."""
        return jax.lax.psum(partial, self.axis) if self.degree > 1 else partial

    def concatenate(self, part: jax.Array) -> jax.Array:
        """Joins the shards' parts along the last axis."""
        return jax.lax.all_gather(part, self.axis, axis=part.ndim - 1, tiled=True) if self.degree > 1 else part


WHOLE = TensorShard()


def _parameter(rngs: nnx.Rngs, shape: tuple[int, ...], axes: Axes, fan_in: int | None) -> nnx.Param[jax.Array]:
    """A parameter with its logical axes; normal with variance 1 / fan_in, or ones where there is no fan-in."""
    if fan_in is None:
        value = jnp.ones(shape, jnp.float32)
    else:
        value = jax.random.normal(rngs.params(), shape, jnp.float32) * fan_in**-0.5
    return nnx.Param(value, logical_axes=axes)


class RMSNorm(nnx.Module):
    """Scales vectors to unit mean square (Zhang and Sennrich 2019)."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        self.epsilon = config.norm_epsilon
        self.scale = _parameter(rngs, (config.width,), ("embed",), None)

    def __call__(self, x: jax.Array) -> jax.Array:
        return normalize(x, self.scale[...], self.epsilon)


def normalize(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """RMS-normalises the last axis in float32 and multiplies by ``scale``."""
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
    normed = wide * jax.lax.rsqrt(mean_square + jnp.float32(epsilon))
    return (normed.astype(x.dtype)) * jnp.expand_dims(scale, tuple(range(x.ndim - 1)))


def project(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """(B, T, in) times (in, ...) as one plain matrix product; blocked layouts are 5-10 times slower on CPU."""
    flat = x.reshape(-1, x.shape[-1]) @ kernel.reshape(kernel.shape[0], -1)
    return flat.reshape(*x.shape[:-1], *kernel.shape[1:])


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions. Biases and norms exist where the configuration has them."""

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

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        for name, (shape, axes) in _module_arrays(config, "attention").items():
            scaled = name in ("query", "key", "value", "output")
            fan_in = config.heads * config.head_size if name == "output" else config.width
            setattr(self, name, _parameter(rngs, shape, axes, fan_in if scaled else None))
        _zero_biases(self, "query_bias", "key_bias", "value_bias", "output_bias")

    def __call__(self, x: jax.Array, rotation: Rotation, store: KeyValueStore, shard: TensorShard) -> jax.Array:
        c = self.config
        query = project(x, self.query[...])  # (B, T, N, H)
        keys = project(x, self.key[...])  # (B, T, K, H)
        values = project(x, self.value[...])
        if c.attention_bias:
            query = query + self.query_bias[...][None, None]
            keys = keys + self.key_bias[...][None, None]
            values = values + self.value_bias[...][None, None]
        if c.qk_norm:
            query = normalize(query, self.query_norm[...], c.norm_epsilon)
            keys = normalize(keys, self.key_norm[...], c.norm_epsilon)
        query, keys = rotate(query, rotation), rotate(keys, rotation)
        keys, values, visible = store.extend(keys, values)
        keys, values = self._align(keys, shard), self._align(values, shard)
        mixed = attend(query, keys, values, visible)  # (B, T, N, H)
        kernel = self.output[...]
        out = shard.sum(mixed.reshape(*x.shape[:-1], -1) @ kernel.reshape(-1, kernel.shape[-1]))
        return out + self.output_bias[...][None, None] if c.output_bias else out

    def _align(self, kv: jax.Array, shard: TensorShard) -> jax.Array:
        """Repeats this shard's kv heads per query head where they do not group evenly (see ``layout.tensor_range``)."""
        c, m = self.config, shard.degree
        if m == 1 or c.kv_heads % m == 0 or m % c.kv_heads == 0:
            return kv
        mine, held = c.heads // m, kv_heads_per_shard(c.heads, c.kv_heads, m)
        first = jnp.minimum(shard.index() * mine * c.kv_heads // c.heads, c.kv_heads - held)
        used = (shard.index() * mine + jnp.arange(mine)) * c.kv_heads // c.heads - first
        return jnp.take(kv, used, axis=2)


class FeedForward(nnx.Module):
    """SwiGLU (Shazeer 2020). Biases exist where the configuration has them."""

    gate: Parameter  # (D, F)
    up: Parameter  # (D, F)
    down: Parameter  # (F, D)
    gate_bias: Parameter  # (F,)
    up_bias: Parameter  # (F,)
    down_bias: Parameter  # (D,)

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        self.biased = config.mlp_bias
        for name, (shape, axes) in _module_arrays(config, "mlp").items():
            setattr(self, name, _parameter(rngs, shape, axes, shape[0] if len(shape) > 1 else None))
        _zero_biases(self, "gate_bias", "up_bias", "down_bias")

    def __call__(self, x: jax.Array, shard: TensorShard) -> jax.Array:
        gate, up = project(x, self.gate[...]), project(x, self.up[...])  # (B, T, F)
        if self.biased:
            gate, up = gate + self.gate_bias[...][None, None], up + self.up_bias[...][None, None]
        down = shard.sum(project(jax.nn.silu(gate) * up, self.down[...]))
        return down + self.down_bias[...][None, None] if self.biased else down


class DecoderLayer(nnx.Module):
    """Attention and feed-forward, each normalised before and added to the residual stream."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        self.attention_norm = RMSNorm(config, rngs=rngs)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = RMSNorm(config, rngs=rngs)
        self.mlp = FeedForward(config, rngs=rngs)

    def __call__(self, x: jax.Array, rotation: Rotation, store: KeyValueStore, shard: TensorShard = WHOLE) -> jax.Array:
        """(B, T, D) to (B, T, D)."""
        x = x + self.attention(self.attention_norm(x), rotation, store, shard)
        return x + self.mlp(self.mlp_norm(x), shard)


def embed(embedding: jax.Array, tokens: jax.Array, shard: TensorShard = WHOLE) -> jax.Array:
    """Token ids (B, T) to vectors (B, T, D); every shard holds an equal chunk of the rows."""
    if shard.degree == 1:
        return jnp.take(embedding, tokens, axis=0)
    local = tokens - shard.index() * embedding.shape[0]
    mine = (local >= 0) & (local < embedding.shape[0])
    rows = jnp.take(embedding, jnp.clip(local, 0, embedding.shape[0] - 1), axis=0)
    return shard.sum(jnp.where(mine[:, :, None], rows, jnp.zeros((), rows.dtype)))


def logits(
    config: DecoderConfig, x: jax.Array, scale: jax.Array, head: jax.Array, shard: TensorShard = WHOLE
) -> jax.Array:
    """Final norm and output projection.

    Args:
      x: (B, D) hidden vectors.
      scale: (D,) of the final norm.
      head: (D, V) kernel, or the (V, D) embedding when the embeddings are tied.

    Returns: (B, V) float32.
    """
    normed = normalize(x, scale, config.norm_epsilon)
    local = normed @ head.T if config.tied_embeddings else normed @ head
    return shard.concatenate(local.astype(jnp.float32))[:, : config.vocab]


class _NoStore:
    """Whole sequences without a cache."""

    def extend(self, keys: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        return *as_one_page(keys, values), causal(keys.shape[0], keys.shape[1])


class Decoder(nnx.Module):
    """The whole model on whole sequences, for training and as the reference that serving is checked against."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.embedding = _parameter(rngs, (config.vocab, config.width), ("vocab", "embed"), config.width)
        self.layers = nnx.List([DecoderLayer(config, rngs=rngs) for _ in range(config.layers)])
        self.norm = RMSNorm(config, rngs=rngs)
        if not config.tied_embeddings:
            self.head = _parameter(rngs, (config.width, config.vocab), ("embed", "vocab"), config.width)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Token ids (B, T) to logits (B, T, V) float32."""
        batch, length = tokens.shape
        positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], (batch, length))
        rotation = rotations(self.config, positions)
        x = embed(self.embedding[...], tokens)
        for layer in self.layers:
            x = layer(x, rotation, _NoStore())
        head = self.embedding[...] if self.config.tied_embeddings else self.head[...]
        flat = logits(self.config, x.reshape(batch * length, -1), self.norm.scale[...], head)
        return flat.reshape(batch, length, -1)


def _module_arrays(config: DecoderConfig, module: str) -> dict[str, tuple[tuple[int, ...], Axes]]:
    """Shape and axes of the arrays of one module of a layer, from the one list in ``spec``."""
    prefix = module + "."
    arrays = ModelSpec(config).layer_arrays
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def _zero_biases(module: nnx.Module, *names: str) -> None:
    """Biases start at zero, unlike norm scales."""
    for name in names:
        if hasattr(module, name):
            parameter = getattr(module, name)
            parameter[...] = jnp.zeros_like(parameter[...])
