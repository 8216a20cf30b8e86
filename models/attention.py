"""Grouped-query attention over given keys and values: the XLA reference. Knows nothing of where keys and values are kept."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def attend(query: jax.Array, keys: jax.Array, values: jax.Array, visible: jax.Array) -> jax.Array:
    """Softmax attention in float32.

    Args:
      query: (B, T, N, H).
      keys, values: (B, S, K, H); K divides N, query head n uses key/value head n // (N / K).
      visible: (B, T, S) bool, which positions each query sees; at least one for every query.

    Returns: (B, T, N, H) in the dtype of ``query``.
    """
    batch, length, heads, size = query.shape
    kv_heads = keys.shape[2]
    grouped = query.reshape(batch, length, kv_heads, heads // kv_heads, size)
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, keys, preferred_element_type=jnp.float32)
    scores = scores * jnp.float32(size**-0.5)
    scores = jnp.where(visible[:, None, None, :, :], scores, jnp.float32(-jnp.inf))
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    mixed = jnp.einsum("bkgts,bskh->btkgh", weights, values, preferred_element_type=jnp.float32)
    return mixed.reshape(query.shape).astype(query.dtype)


def causal(batch: int, length: int) -> jax.Array:
    """(B, T, T) bool: every position sees itself and all before it."""
    triangle = jnp.tril(jnp.ones((length, length), dtype=bool))
    return jnp.broadcast_to(triangle[None], (batch, length, length))
