"""Grouped-query attention over pages of keys and values: the XLA reference. Knows nothing of where pages are kept.

Keys come with positions last, values with head size last, so that both products read memory in order: on the CPU
backend this is twice as fast as the usual (positions, heads, head size).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def attend(query: jax.Array, keys: jax.Array, values: jax.Array, visible: jax.Array) -> jax.Array:
    """Softmax attention in float32.

    Args:
      query: (B, T, N, H).
      keys: (B, pages, K, H, G); K divides N, query head n uses key/value head n // (N / K).
      values: (B, pages, K, G, H).
      visible: (B, T, pages * G) bool, which positions each query sees; at least one for every query.

    Returns: (B, T, N, H) in the dtype of ``query``.
    """
    batch, length, heads, size = query.shape
    pages, kv_heads, page_size = values.shape[1:4]
    grouped = query.reshape(batch, length, kv_heads, heads // kv_heads, size)
    scores = jnp.einsum("btkgh,bpkhs->bkgtps", grouped, keys, preferred_element_type=jnp.float32)
    scores = scores.reshape(*scores.shape[:4], pages * page_size) * jnp.float32(size**-0.5)
    scores = jnp.where(visible[:, None, None, :, :], scores, jnp.float32(-jnp.inf))
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    weights = weights.reshape(*weights.shape[:4], pages, page_size)
    mixed = jnp.einsum("bkgtps,bpksh->btkgh", weights, values, preferred_element_type=jnp.float32)
    return mixed.reshape(query.shape).astype(query.dtype)


def as_one_page(keys: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(B, T, K, H) keys and values as a single page each, in the layout that ``attend`` reads."""
    return keys.transpose(0, 2, 3, 1)[:, None], values.transpose(0, 2, 1, 3)[:, None]


def causal(batch: int, length: int) -> jax.Array:
    """(B, T, T) bool: every position sees itself and all before it."""
    triangle = jnp.tril(jnp.ones((length, length), dtype=bool))
    return jnp.broadcast_to(triangle[None], (batch, length, length))
